// Decode attention without tensor cores: float32, and half precision whose rows are not aligned to 16 bytes.
//
// Half a warp is one worker. It takes a few keys at a time, each lane four dimensions of 64, and sums over its lanes.
#pragma once

#include "decode_finish.cuh"

namespace emokernels {

template <typename T, bool ALIGNED> EMO_DEVICE float4 load4(const T* address) {
  if constexpr (ALIGNED) {
    static_assert(sizeof(T) == 4);
    const uint4 bits = load16(address);
    float4 x;
    memcpy(&x, &bits, sizeof(x));
    return x;
  } else {
    return float4{to_float(address[0]), to_float(address[1]), to_float(address[2]), to_float(address[3])};
  }
}

EMO_DEVICE float dot(float4 a, float4 b, float sum) {
  return fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, fmaf(a.w, b.w, sum))));
}

// The row of a key, `step` bytes after that of the key before.
template <typename T> EMO_DEVICE const T* row_at(const T* rows, int key, int step) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(rows) + int64_t(key) * step);
}

inline constexpr int kSimtRows = 4;

template <typename T, int DIM, bool ALIGNED>
EMO_KERNEL(kDecodeThreads, 2) decode_simt(EMO_PARAMS(DecodeParams) p) {
  constexpr int LANES = 16, WORKERS = kDecodeThreads / LANES, ROWS = kSimtRows, CHUNKS = DIM / 64;
  constexpr int KEYS = DIM <= 128 ? 4 : 2;
  EMO_SHARED float4 q[ROWS][CHUNKS][LANES];
  EMO_SHARED Route routes[ROWS * kRoleSlots];
  EMO_SHARED Workers<WORKERS, ROWS, DIM> workers;

  const int worker = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  const Place at(p, blockIdx.x, ROWS);
  const int first_row = at.tile * ROWS;
  const Sequence sequence(p, at.batch);
  const Span span(p, sequence, at.split, WORKERS * KEYS);

  for (int item = threadIdx.x; item < ROWS * CHUNKS * LANES; item += kDecodeThreads) {
    const Row row(p, at, first_row + item / (CHUNKS * LANES));
    const int d = item % (CHUNKS * LANES) * 4;
    const T* address =
        static_cast<const T*>(p.q) + at.batch * p.q_stride[0] + row.head * p.q_stride[1] + row.query * p.q_stride[2];
    q[0][0][item] = row.exists && d < p.dim ? load4<T, false>(address + d) : float4{0.0f, 0.0f, 0.0f, 0.0f};
  }
  load_routes(p, at, first_row, ROWS, routes);
  sync_block();

  const Scaling scaling(p);
  Softmax softmax[ROWS];
  Sight sight[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) sight[r] = Sight(p, at, sequence, Row(p, at, first_row + r));
  const T* k_rows = static_cast<const T*>(p.k) + at.batch * p.k_stride[0] + at.key_head * p.k_stride[1] + lane * 4;
  const T* v_rows = static_cast<const T*>(p.v) + at.batch * p.v_stride[0] + at.key_head * p.v_stride[1] + lane * 4;
  const uint8_t* roles = p.roles == nullptr ? nullptr : p.roles + at.batch * p.roles_stride;

  float4 values[ROWS][CHUNKS] = {};
  for (int first = span.begin; first < span.end; first += WORKERS * KEYS) {
    const int key = first + worker * KEYS;
    float4 k[KEYS][CHUNKS], v[KEYS][CHUNKS];
#pragma unroll
    for (int i = 0; i < KEYS; ++i) {
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        const bool inside = c * 64 + lane * 4 < p.dim;
        const int j = span.clamped(key + i);
        const float4 nothing{0.0f, 0.0f, 0.0f, 0.0f};
        k[i][c] = inside ? load4<T, ALIGNED>(row_at(k_rows, j, p.k_step) + c * 64) : nothing;
        v[i][c] = inside ? load4<T, ALIGNED>(row_at(v_rows, j, p.v_step) + c * 64) : nothing;
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float s[KEYS], gain[KEYS], top = -INFINITY;
#pragma unroll
      for (int i = 0; i < KEYS; ++i) {
        s[i] = 0.0f;
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) s[i] = dot(q[r][c][lane], k[i][c], s[i]);
      }
#pragma unroll
      for (int i = 0; i < KEYS; ++i) {
#pragma unroll
        for (int lanes = LANES / 2; lanes > 0; lanes /= 2) s[i] += shuffle_xor(s[i], lanes);
        const int j = span.clamped(key + i);
        const Route route = routes[r * kRoleSlots + (roles != nullptr ? roles[j] % kRoleSlots : 0)];
        float logit = route.logit(scaling.logit(s[i]));
        if (p.mask_kind != MaskKind::none) logit = masked(p, logit, fetch_mask(p, sight[r].mask, j));
        s[i] = sight[r].sees(key + i) ? logit : -INFINITY;
        gain[i] = route.gain;
        top = fmaxf(top, s[i]);
      }
      const float fade = softmax[r].raise(top);
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) values[r][c] = scaled(values[r][c], fade);
#pragma unroll
      for (int i = 0; i < KEYS; ++i) {
        const float weight = softmax[r].weight(s[i]);
        softmax[r].sum += weight;
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) add_scaled(values[r][c], weight * gain[i], v[i][c]);
      }
    }
  }

#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    if (lane == 0) {
      workers.top[worker][r] = softmax[r].top;
      workers.sum[worker][r] = softmax[r].sum;
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) workers.values[worker][r][c * LANES + lane] = values[r][c];
  }
  sync_block();
  workers.template write<T>(p, at, first_row);
}

}  // namespace emokernels
