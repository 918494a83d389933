// Decode attention for half and bfloat16 on the tensor cores, straight from memory to registers.
//
// Each warp walks over its keys 16 at a time. Transposed products keep a warp's rows (up to 8 query heads x queries of
// one key head) in the narrow dimension:
//
//   S^T [16 keys x 8 rows]  = K [16 x D] Q^T [D x 8]
//   O^T [D x 8 rows]       += V^T [D x 16] P^T [16 x 8]
//
// so that every element of K and V is read once, in 16-byte loads, for all rows. Fragments are filled without shared
// memory because the order of D inside a product is free: a lane's 16 bytes of K are two products' worth of columns,
// and its 16 bytes of V are one row of each of eight tiles. Two byte permutations pair the keys of V; movmatrix turns
// P^T into the layout of the second product. The next K is on its way while the softmax and the second product run, the
// next V during the first product.
#pragma once

#include "decode_finish.cuh"

namespace emokernels {

// DIM: the head dimension (EXACT), or more. TILES: of 8 rows each. ROUTED: whether to look tables up.
template <typename T, int DIM, int TILES, bool ROUTED, bool EXACT>
EMO_KERNEL(kDecodeThreads, DIM* TILES <= 128 ? 3 : 2) decode_mma(EMO_PARAMS(DecodeParams) p) {
  constexpr int WARPS = kDecodeThreads / 32, KEYS = 16, ROWS = 8 * TILES;
  constexpr int K_CHUNKS = DIM / 32, V_CHUNKS = DIM / 64;
  constexpr bool AHEAD = DIM <= 128;  // larger heads have no registers left to load before they need to
  EMO_SHARED uint4 q_fragments[TILES][K_CHUNKS][32];
  EMO_SHARED Route routes[ROUTED ? ROWS * kRoleSlots : 1];
  EMO_SHARED Sight sight[ROWS];
  EMO_SHARED Place place;  // in shared memory because registers are what is scarce below
  EMO_SHARED Workers<WARPS, ROWS, DIM> workers;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
  if (threadIdx.x == 0) place = Place(p, blockIdx.x, ROWS);
  sync_block();
  const Place at = place;
  const int first_row = at.tile * ROWS;
  const Sequence sequence(p, at.batch);
  const Span span(p, sequence, at.split, WARPS * KEYS);

  // Q in the order in which lanes need it, so that a fragment is one 16-byte load without bank conflicts.
  for (int item = threadIdx.x; item < TILES * K_CHUNKS * 32; item += kDecodeThreads) {
    const int chunk = item / 32 % K_CHUNKS, owner = item % 32;
    const Row row(p, at, first_row + item / 32 / K_CHUNKS * 8 + owner / 4);
    const T* q =
        static_cast<const T*>(p.q) + at.batch * p.q_stride[0] + row.head * p.q_stride[1] + row.query * p.q_stride[2];
    T values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int d = chunk * 32 + owner % 4 * 8 + i;
      values[i] = row.exists && d < p.dim ? q[d] : from_float<T>(0.0f);
    }
    memcpy(&q_fragments[0][0][item], values, sizeof(uint4));
  }
  if (threadIdx.x < ROWS) sight[threadIdx.x] = Sight(p, at, sequence, Row(p, at, first_row + threadIdx.x));
  if constexpr (ROUTED) load_routes(p, at, first_row, ROWS, routes);
  sync_block();

  // This lane's part of S^T: keys `group` and `group + 8` of the step, rows 2 * pair and 2 * pair + 1 of each tile.
  const Scaling scaling(p);
  Softmax softmax[TILES][2];

  const char* k_rows = reinterpret_cast<const char*>(static_cast<const T*>(p.k) + at.batch * p.k_stride[0] +
                                                     at.key_head * p.k_stride[1] + pair * 8);
  const char* v_rows = reinterpret_cast<const char*>(static_cast<const T*>(p.v) + at.batch * p.v_stride[0] +
                                                     at.key_head * p.v_stride[1] + group * 8);
  const uint8_t* roles = p.roles != nullptr ? p.roles + at.batch * p.roles_stride : nullptr;
  uint4 k[2][K_CHUNKS], v[4][V_CHUNKS];
  uint32_t mask_bits[TILES][4];
  int role[2];

  const auto load_k = [&](int key) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const char* row = k_rows + int64_t(span.clamped(key + group + half * 8)) * p.k_step;
#pragma unroll
      for (int chunk = 0; chunk < K_CHUNKS; ++chunk) {
        k[half][chunk] = EXACT || chunk * 32 + pair * 8 < p.dim ? load16(row + chunk * 64) : zero16();
      }
    }
  };
  const auto load_v = [&](int key) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const char* row = v_rows + int64_t(span.clamped(key + pair * 2 + i % 2 + i / 2 * 8)) * p.v_step;
#pragma unroll
      for (int chunk = 0; chunk < V_CHUNKS; ++chunk) {
        v[i][chunk] = EXACT || chunk * 64 + group * 8 < p.dim ? load16(row + chunk * 128) : zero16();
      }
    }
  };
  const auto load_about_keys = [&](int key) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = span.clamped(key + group + half * 8);
      if constexpr (ROUTED) role[half] = roles != nullptr ? roles[j] % kRoleSlots : 0;
      if (p.mask_kind != MaskKind::none) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            mask_bits[tile][half * 2 + r] = fetch_mask(p, sight[tile * 8 + 2 * pair + r].mask, j);
          }
        }
      }
    }
  };

  float values[TILES][V_CHUNKS][4][4] = {};
  int key = span.begin + warp * KEYS;
  load_about_keys(key);
  if constexpr (AHEAD) {
    load_k(key);
    load_v(key);
  }
  for (; key < span.end; key += WARPS * KEYS) {
    forget_memory();
    if constexpr (!AHEAD) load_k(key);
    float s[TILES][4] = {}, other[TILES][4] = {};
#pragma unroll
    for (int chunk = 0; chunk < K_CHUNKS; ++chunk) {
      const uint32_t low[4] = {k[0][chunk].x, k[1][chunk].x, k[0][chunk].y, k[1][chunk].y};
      const uint32_t high[4] = {k[0][chunk].z, k[1][chunk].z, k[0][chunk].w, k[1][chunk].w};
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        const uint4 q = q_fragments[tile][chunk][lane];
        mma<T>(s[tile], low, q.x, q.y);
        mma<T>(other[tile], high, q.z, q.w);
      }
    }
    forget_memory();
    if constexpr (AHEAD) load_k(key + WARPS * KEYS);

#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int j = key + group + e / 2 * 8;
        float logit = scaling.logit(s[tile][e] + other[tile][e]);
        if constexpr (ROUTED) {
          logit = routes[(tile * 8 + 2 * pair + e % 2) * kRoleSlots + role[e / 2]].logit(logit);
        }
        if (p.mask_kind != MaskKind::none) logit = masked(p, logit, mask_bits[tile][e]);
        s[tile][e] = sight[tile * 8 + 2 * pair + e % 2].sees(j) ? logit : -INFINITY;
      }
    }
    if constexpr (!AHEAD) {
      forget_memory();
      load_v(key);
    }
    uint32_t weights[TILES][2];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      float fade[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float top = fmaxf(s[tile][r], s[tile][2 + r]);
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) top = fmaxf(top, shuffle_xor(top, lanes));
        fade[r] = softmax[tile][r].raise(top);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[tile][e] = softmax[tile][e % 2].weight(s[tile][e]);
        softmax[tile][e % 2].sum += s[tile][e];
        if constexpr (ROUTED) s[tile][e] *= routes[(tile * 8 + 2 * pair + e % 2) * kRoleSlots + role[e / 2]].gain;
      }
      weights[tile][0] = transpose8x8(pack<T>(s[tile][0], s[tile][1]));
      weights[tile][1] = transpose8x8(pack<T>(s[tile][2], s[tile][3]));
#pragma unroll
      for (int chunk = 0; chunk < V_CHUNKS; ++chunk) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) values[tile][chunk][j][e] *= fade[e % 2];
        }
      }
    }

#pragma unroll
    for (int chunk = 0; chunk < V_CHUNKS; ++chunk) {
      const uint32_t words[4][4] = {{v[0][chunk].x, v[1][chunk].x, v[2][chunk].x, v[3][chunk].x},
                                    {v[0][chunk].y, v[1][chunk].y, v[2][chunk].y, v[3][chunk].y},
                                    {v[0][chunk].z, v[1][chunk].z, v[2][chunk].z, v[3][chunk].z},
                                    {v[0][chunk].w, v[1][chunk].w, v[2][chunk].w, v[3][chunk].w}};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t a[4] = {
            byte_permute(words[j][0], words[j][1], 0x5410), byte_permute(words[j][0], words[j][1], 0x7632),
            byte_permute(words[j][2], words[j][3], 0x5410), byte_permute(words[j][2], words[j][3], 0x7632)};
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) mma<T>(values[tile][chunk][j], a, weights[tile][0], weights[tile][1]);
      }
    }
    forget_memory();
    load_about_keys(key + WARPS * KEYS);
    if constexpr (AHEAD) load_v(key + WARPS * KEYS);
  }

#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = tile * 8 + 2 * pair + r;
      float sum = softmax[tile][r].sum;
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) sum += shuffle_xor(sum, lanes);
      if (group == 0) {
        workers.top[warp][row] = softmax[tile][r].top;
        workers.sum[warp][row] = sum;
      }
      // Product j of a chunk holds d = 8 * group + 2 j in element r and the d after it in element 2 + r.
#pragma unroll
      for (int chunk = 0; chunk < V_CHUNKS; ++chunk) {
        const float(&x)[4][4] = values[tile][chunk];
        float4* out = &workers.values[warp][row][chunk * 16 + group * 2];
        out[0] = float4{x[0][r], x[0][2 + r], x[1][r], x[1][2 + r]};
        out[1] = float4{x[2][r], x[2][2 + r], x[3][r], x[3][2 + r]};
      }
    }
  }
  sync_block();
  workers.template write<T>(p, place, place.tile * ROWS);
}

}  // namespace emokernels
