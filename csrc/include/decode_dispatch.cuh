// Which decode kernels run for a problem. `run(kernel, blocks, threads)` launches one; a test runs it in loops instead.
#pragma once

#include "decode_mma.cuh"
#include "decode_simt.cuh"

namespace emokernels {

inline int64_t decode_blocks(const DecodeParams& p, int rows_per_tile) {
  const int rows = p.heads / p.key_heads * p.n;
  return int64_t(ceil_div(rows, rows_per_tile)) * p.splits * p.key_heads * p.batch;
}

template <typename T, int DIM, int TILES, typename Run> void run_mma(const DecodeParams& p, Run run) {
  const int64_t blocks = decode_blocks(p, 8 * TILES);
  if (p.routed()) {
    run(decode_mma<T, DIM, TILES, true, true>, blocks, kDecodeThreads);
  } else {
    run(decode_mma<T, DIM, TILES, false, true>, blocks, kDecodeThreads);
  }
}

template <typename T, typename Run> void run_mma(const DecodeParams& p, Run run) {
  // Two tiles of rows per block where the accumulators fit into the registers.
  const bool wide = p.heads / p.key_heads * p.n > 8;
  if (p.dim == 64) return wide ? run_mma<T, 64, 2>(p, run) : run_mma<T, 64, 1>(p, run);
  if (p.dim == 128) return wide ? run_mma<T, 128, 2>(p, run) : run_mma<T, 128, 1>(p, run);
  if (p.dim == 256) return run_mma<T, 256, 1>(p, run);
  // Head dimensions in between share one kernel with and without tables: absent tables are the identity.
  const int64_t blocks = decode_blocks(p, 8);
  if (p.dim < 64) return run(decode_mma<T, 64, 1, true, false>, blocks, kDecodeThreads);
  if (p.dim < 128) return run(decode_mma<T, 128, 1, true, false>, blocks, kDecodeThreads);
  run(decode_mma<T, 256, 1, true, false>, blocks, kDecodeThreads);
}

template <typename T, bool ALIGNED, typename Run> void run_simt(const DecodeParams& p, Run run) {
  const int64_t blocks = decode_blocks(p, kSimtRows);
  if (p.dim <= 64) {
    run(decode_simt<T, 64, ALIGNED>, blocks, kDecodeThreads);
  } else if (p.dim <= 128) {
    run(decode_simt<T, 128, ALIGNED>, blocks, kDecodeThreads);
  } else {
    run(decode_simt<T, 256, ALIGNED>, blocks, kDecodeThreads);
  }
}

template <typename T, typename Run> void run_merge(const DecodeParams& p, Run run) {
  if (p.splits > 1) run(decode_merge<T>, int64_t(p.batch) * p.heads * p.n, kDecodeThreads);
}

template <typename Run> void run_decode(const DecodeParams& p, Run run) {
  switch (p.dtype) {
    case Dtype::f32:
      p.aligned ? run_simt<float, true>(p, run) : run_simt<float, false>(p, run);
      return run_merge<float>(p, run);
    case Dtype::f16:
      p.aligned ? run_mma<half_t>(p, run) : run_simt<half_t, false>(p, run);
      return run_merge<half_t>(p, run);
    case Dtype::bf16:
      p.aligned ? run_mma<bf16_t>(p, run) : run_simt<bf16_t, false>(p, run);
      return run_merge<bf16_t>(p, run);
  }
}

}  // namespace emokernels
