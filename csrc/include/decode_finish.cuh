// How partial results become one: workers of a block through shared memory, blocks of different splits in a second kernel.
#pragma once

#include "decode_scores.cuh"

namespace emokernels {

// Four values to T, stored together.
template <typename T> EMO_DEVICE void store4(T* address, float4 x) {
  if constexpr (sizeof(T) == 4) {
    store16(address, uint4{bits_of(x.x), bits_of(x.y), bits_of(x.z), bits_of(x.w)});
  } else {
    store8(address, uint2{pack<T>(x.x, x.y), pack<T>(x.z, x.w)});
  }
}

EMO_DEVICE void add_scaled(float4& sum, float factor, float4 x) {
  sum.x = fmaf(factor, x.x, sum.x);
  sum.y = fmaf(factor, x.y, sum.y);
  sum.z = fmaf(factor, x.z, sum.z);
  sum.w = fmaf(factor, x.w, sum.w);
}

EMO_DEVICE float4 scaled(float4 x, float factor) {
  return float4{x.x * factor, x.y * factor, x.z * factor, x.w * factor};
}

// Results of the workers of a block, each over its own keys: weighted sums of values and the softmax they belong to.
template <int WORKERS, int ROWS, int DIM> struct Workers {
  float4 values[WORKERS][ROWS][DIM / 4];
  float top[WORKERS][ROWS];
  float sum[WORKERS][ROWS];

  // Merges the workers in a fixed order and writes the rows: to z and lse, or to the split's place in the workspace.
  template <typename T> EMO_DEVICE void write(const DecodeParams& p, const Place& at, int first_row) const {
    const int64_t outputs = int64_t(p.batch) * p.heads * p.n;
    for (int item = threadIdx.x; item < ROWS * (DIM / 4); item += kDecodeThreads) {
      const int r = item / (DIM / 4), column = item % (DIM / 4);
      const Row row(p, at, first_row + r);
      if (!row.exists || column * 4 >= p.dim) continue;
      Softmax total;
      for (int w = 0; w < WORKERS; ++w) total.top = fmaxf(total.top, top[w][r]);
      float4 weighted{0.0f, 0.0f, 0.0f, 0.0f};
      for (int w = 0; w < WORKERS; ++w) {
        const float share = total.weight(top[w][r]);
        total.sum = fmaf(share, sum[w][r], total.sum);
        add_scaled(weighted, share, values[w][r][column]);
      }
      const float4 z = scaled(weighted, total.sum > 0.0f ? 1.0f / total.sum : 0.0f);
      const float lse = total.sum > 0.0f ? (total.top + log2f(total.sum)) * kLn2 : -INFINITY;
      if (p.splits == 1) {
        T* out = static_cast<T*>(p.z) + at.batch * p.z_stride[0] + row.head * p.z_stride[1] + row.query * p.z_stride[2];
        store4(out + column * 4, z);
        if (column == 0) p.lse[row.output(p, at)] = lse;
      } else {
        const int64_t place = at.split * outputs + row.output(p, at);
        store4(p.partial_z + place * p.dim + column * 4, z);
        if (column == 0) p.partial_lse[place] = lse;
      }
    }
  }
};

// One block per (batch row, head, query): z = sum_s exp(lse_s - lse) z_s over the splits, in a fixed order.
template <typename T> EMO_KERNEL(kDecodeThreads, 1) decode_merge(EMO_PARAMS(DecodeParams) p) {
  constexpr int WARPS = kDecodeThreads / 32, CHUNKS = 256 / 128;
  EMO_SHARED float weights[kMaxSplits];
  EMO_SHARED float4 sums[WARPS][CHUNKS][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t outputs = int64_t(p.batch) * p.heads * p.n, output = blockIdx.x;

  // Every warp finds the same maximum and sum, lane by lane over the splits.
  float lse[kMaxSplits / 32], top = -INFINITY;
#pragma unroll
  for (int i = 0; i < kMaxSplits / 32; ++i) {
    const int split = i * 32 + lane;
    lse[i] = split < p.splits ? p.partial_lse[split * outputs + output] : -INFINITY;
    top = fmaxf(top, lse[i]);
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) top = fmaxf(top, shuffle_xor(top, lanes));
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kMaxSplits / 32; ++i) sum += top == -INFINITY ? 0.0f : expf(lse[i] - top);
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
  if (warp == 0) {
#pragma unroll
    for (int i = 0; i < kMaxSplits / 32; ++i) {
      weights[i * 32 + lane] = sum > 0.0f ? expf(lse[i] - top) / sum : 0.0f;
    }
  }
  sync_block();

  float4 z[CHUNKS] = {};
  for (int split = warp; split < p.splits; split += WARPS) {
    const float* partial = p.partial_z + (split * outputs + output) * p.dim;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const int d = c * 128 + lane * 4;
      if (d < p.dim) add_scaled(z[c], weights[split], *reinterpret_cast<const float4*>(partial + d));
    }
  }
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) sums[warp][c][lane] = z[c];
  sync_block();

  if (warp == 0) {
    const int query = int(output % p.n), head = int(output / p.n % p.heads), batch = int(output / p.n / p.heads);
    T* out = static_cast<T*>(p.z) + batch * p.z_stride[0] + head * p.z_stride[1] + query * p.z_stride[2];
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const int d = c * 128 + lane * 4;
      for (int w = 1; w < WARPS; ++w) add_scaled(z[c], 1.0f, sums[w][c][lane]);
      if (d < p.dim) store4(out + d, z[c]);
    }
    if (lane == 0) p.lse[output] = sum > 0.0f ? top + logf(sum) : -INFINITY;
  }
}

}  // namespace emokernels
