// emokernels_native::gated_activation: checks what could make a kernel touch foreign memory, and launches.
#include "activation.cuh"
#include "launch.h"

namespace emokernels {
namespace {

template <typename T>
void set_values(const char* name, const OptionalTensor& tensor, ScalarType dtype, const ActivationParams& p,
                EditValues<T>& values) {
  values.values = pointer<T>(tensor);
  if (!tensor.has_value()) return;
  check_dim(name, *tensor, 3);
  check_dtype(name, *tensor, dtype);
  STD_TORCH_CHECK((tensor->size(0) == 1 || tensor->size(0) == p.batch) &&
                      (tensor->size(1) == 1 || tensor->size(1) == p.positions) && tensor->size(2) == p.edits,
                  name, ": expected [B|1, N|1, n]");
  for (int dim = 0; dim < 3; ++dim) values.stride[dim] = shared_stride(*tensor, dim);
}

void gated_activation_op(Tensor gate, OptionalTensor up, OptionalTensor index, OptionalTensor scale,
                         OptionalTensor shift, OptionalTensor replace, OptionalTensor mask, int64_t act, Tensor out) {
  check_dim("gate", gate, 3);
  check_rows("gate", gate, 2);
  ActivationParams p{};
  p.batch = gate.size(0);
  p.positions = gate.size(1);
  p.width = gate.size(2);
  STD_TORCH_CHECK(out.is_contiguous() && out.numel() == gate.numel(), "out: expected contiguous [B, N, F]");
  check_dtype("out", out, gate.scalar_type());
  p.gate = gate.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.aligned = is_aligned(gate) && is_aligned(out);
  for (int dim = 0; dim < 2; ++dim) p.gate_stride[dim] = gate.stride(dim);
  if (up.has_value()) {
    check_dim("up", *up, 3);
    check_rows("up", *up, 2);
    check_dtype("up", *up, gate.scalar_type());
    for (int dim = 0; dim < 3; ++dim) STD_TORCH_CHECK(up->size(dim) == gate.size(dim), "up: expected gate's shape");
    p.up = up->const_data_ptr();
    p.aligned = p.aligned && is_aligned(*up);
    for (int dim = 0; dim < 2; ++dim) p.up_stride[dim] = up->stride(dim);
  }
  const ScalarType type = gate.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
                  "gate: expected float32, float16 or bfloat16");
  p.dtype = type == ScalarType::Float ? Dtype::f32 : type == ScalarType::Half ? Dtype::f16 : Dtype::bf16;
  STD_TORCH_CHECK(act >= 0 && act <= int64_t(Act::quick_gelu), "act: expected a number of emokernels.native.ACTS");
  p.act = Act(act);

  if (index.has_value()) {
    const int64_t last = index->dim() - 1;
    check_dtype("index", *index, ScalarType::Long);
    STD_TORCH_CHECK(index->is_contiguous() && (last == 0 || (last == 1 && (index->size(0) == 1 || index->size(0) == p.batch))),
                    "index: expected contiguous [n] or [B, n]");
    STD_TORCH_CHECK(index->size(last) < (int64_t(1) << 30), "index: expected fewer edits");
    p.index = pointer<int64_t>(index);
    p.edits = int32_t(index->size(last));
    p.index_stride = last == 0 ? 0 : shared_stride(*index, 0);
    STD_TORCH_CHECK(replace.has_value() == mask.has_value(), "mask: expected replace and mask together");
    set_values("scale", scale, ScalarType::Float, p, p.scale);
    set_values("shift", shift, ScalarType::Float, p, p.shift);
    set_values("replace", replace, ScalarType::Float, p, p.replace);
    set_values("mask", mask, ScalarType::Bool, p, p.mask);
  }
  // Several rows per block once there are enough blocks for any GPU: fewer blocks to start, edits looked up less often.
  p.rows_per_block = p.batch * p.positions * (p.width / 1024 + 1) > 8192 ? 4 : 1;

  const Launcher launch(gate);
  run_activation(p, [&](auto kernel, int64_t blocks, int64_t columns, int threads) {
    launch(kernel, p, blocks, columns, threads);
  });
}

}  // namespace
}  // namespace emokernels

STABLE_TORCH_LIBRARY_IMPL(EMO_NAMESPACE, EMO_DISPATCH_KEY, m) {
  m.impl("gated_activation", TORCH_BOX(&emokernels::gated_activation_op));
}
