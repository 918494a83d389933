// The gated activation of an MLP, a = act(gate) * up, with edits of a few columns; one pass over memory.
#pragma once

#include "platform.cuh"

namespace emokernels {

inline constexpr int kActivationThreads = 128;

enum class Act : int { silu = 0, gelu = 1, gelu_tanh = 2, relu = 3, quick_gelu = 4 };

// Values of an edit, [B|1, N|1, n]; strides count elements and are 0 along a shared dimension.
template <typename T> struct EditValues {
  const T* values;
  int64_t stride[3];

  EMO_DEVICE T at(int64_t batch, int64_t position, int64_t edit) const {
    return values[batch * stride[0] + position * stride[1] + edit * stride[2]];
  }
};

struct ActivationParams {
  const void* gate;      // [B, N, F], the last dimension contiguous
  const void* up;        // like gate, or null
  void* out;             // [B, N, F] contiguous
  const int64_t* index;  // [n] or [B, n] contiguous; null without edits
  EditValues<float> scale;
  EditValues<float> shift;
  EditValues<float> replace;
  EditValues<uint8_t> mask;
  int64_t gate_stride[2];  // batch, position
  int64_t up_stride[2];
  int64_t index_stride;    // of the batch dimension
  int64_t batch;
  int64_t positions;
  int64_t width;
  int32_t edits;           // n
  int32_t rows_per_block;  // positions of one batch row that a block does one after the other
  Act act;
  Dtype dtype;
  int32_t aligned;  // all three can be accessed 16 bytes at a time
};

// x / y; the short form for results that are rounded to half precision.
template <typename T> EMO_DEVICE float divide(float x, float y) {
  if constexpr (sizeof(T) == 4) {
    return x / y;
  } else {
    return fast_divide(x, y);
  }
}

template <typename T> EMO_DEVICE float activate(Act act, float x) {
  switch (act) {
    case Act::silu:
      return divide<T>(x, 1.0f + expf(-x));
    case Act::gelu:
      return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
    case Act::gelu_tanh:
      return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * fmaf(0.044715f * x * x, x, x)));
    case Act::relu:
      return x > 0.0f || x != x ? x : 0.0f;
    case Act::quick_gelu:
      return divide<T>(x, 1.0f + expf(-1.702f * x));
  }
  return x;
}

// A block does rows_per_block rows of kActivationThreads * VECTOR columns. With edits it first marks which of its columns
// are edited, once for all its rows, so that a column costs the same wherever its edit stands in the index.
template <typename T, int VECTOR, bool EDITED>
EMO_KERNEL(kActivationThreads, 8) gated_activation(EMO_PARAMS(ActivationParams) p) {
  constexpr int COLUMNS = kActivationThreads * VECTOR;
  EMO_SHARED int edit_of[EDITED ? COLUMNS : 1];  // 1 + position in the index; 0: not edited
  const int64_t blocks_per_batch = (p.positions + p.rows_per_block - 1) / p.rows_per_block;
  const int64_t batch = blockIdx.x / blocks_per_batch;
  const int64_t first = blockIdx.x % blocks_per_batch * p.rows_per_block;
  const int64_t last = first + p.rows_per_block < p.positions ? first + p.rows_per_block : p.positions;
  const int64_t first_column = int64_t(blockIdx.y) * COLUMNS;
  const int mine = threadIdx.x * VECTOR;
  const int64_t column = first_column + mine;

  bool edited = false;
  if constexpr (EDITED) {
    for (int i = threadIdx.x; i < COLUMNS; i += kActivationThreads) edit_of[i] = 0;
    sync_block();
    for (int i = threadIdx.x; i < p.edits; i += kActivationThreads) {
      const int64_t at = p.index[batch * p.index_stride + i] - first_column;
      if (at >= 0 && at < COLUMNS) edit_of[at] = i + 1;
    }
    sync_block();
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) edited = edited || edit_of[mine + i] != 0;
  }
  if (column >= p.width) return;

  for (int64_t position = first; position < last; ++position) {
    T gate[VECTOR];
    load_vector(gate, static_cast<const T*>(p.gate) + batch * p.gate_stride[0] + position * p.gate_stride[1] + column);
    float a[VECTOR];
    if (p.up != nullptr) {
      T up[VECTOR];
      load_vector(up, static_cast<const T*>(p.up) + batch * p.up_stride[0] + position * p.up_stride[1] + column);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) a[i] = activate<T>(p.act, to_float(gate[i])) * to_float(up[i]);
    } else {
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) a[i] = activate<T>(p.act, to_float(gate[i]));
    }
    if (EDITED && edited) {
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        const int at = edit_of[mine + i] - 1;
        if (at < 0) continue;
        if (p.scale.values) a[i] *= p.scale.at(batch, position, at);
        if (p.shift.values) a[i] += p.shift.at(batch, position, at);
        if (p.mask.values && p.mask.at(batch, position, at)) a[i] = p.replace.at(batch, position, at);
      }
    }
    store_rounded(static_cast<T*>(p.out) + (batch * p.positions + position) * p.width + column, a);
  }
}

// Launches the kernel for the problem through `run(kernel, blocks, columns of blocks, threads)`.
template <typename T, int VECTOR, typename Run> void run_activation(const ActivationParams& p, Run run) {
  const int64_t blocks = p.batch * ((p.positions + p.rows_per_block - 1) / p.rows_per_block);
  const int64_t columns = (p.width + kActivationThreads * VECTOR - 1) / (kActivationThreads * VECTOR);
  if (p.index != nullptr) {
    run(gated_activation<T, VECTOR, true>, blocks, columns, kActivationThreads);
  } else {
    run(gated_activation<T, VECTOR, false>, blocks, columns, kActivationThreads);
  }
}

template <typename T, typename Run> void run_activation(const ActivationParams& p, Run run) {
  p.aligned ? run_activation<T, kVector<T>>(p, run) : run_activation<T, 1>(p, run);
}

template <typename Run> void run_activation(const ActivationParams& p, Run run) {
  switch (p.dtype) {
    case Dtype::f32:
      return run_activation<float>(p, run);
    case Dtype::f16:
      return run_activation<half_t>(p, run);
    case Dtype::bf16:
      return run_activation<bf16_t>(p, run);
  }
}

}  // namespace emokernels
