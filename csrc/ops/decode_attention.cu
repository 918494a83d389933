// emokernels_native::decode_attention: checks what could make a kernel touch foreign memory, and launches.
#include "decode_dispatch.cuh"
#include "launch.h"

namespace emokernels {
namespace {

Dtype dtype_of(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::Float) return Dtype::f32;
  if (type == ScalarType::Half) return Dtype::f16;
  STD_TORCH_CHECK(type == ScalarType::BFloat16, "q: expected float32, float16 or bfloat16");
  return Dtype::bf16;
}

// Bytes between neighbours along a dimension, which the kernels keep in 32 bits.
int32_t step_of(const char* name, const Tensor& tensor, int dim) {
  const int64_t step = shared_stride(tensor, dim) * int64_t(tensor.element_size());
  STD_TORCH_CHECK(step >= 0 && step < (int64_t(1) << 31), name, ": neighbouring keys are too far apart");
  return int32_t(step);
}

// A table [B|1, H, 6, 6], or null; the stride of its batch dimension.
const float* table(const char* name, const OptionalTensor& tensor, const DecodeParams& p, int64_t* stride) {
  if (!tensor.has_value()) return nullptr;
  check_dim(name, *tensor, 4);
  check_dtype(name, *tensor, ScalarType::Float);
  STD_TORCH_CHECK(tensor->is_contiguous() && (tensor->size(0) == 1 || tensor->size(0) == p.batch) &&
                      tensor->size(1) == p.heads && tensor->size(2) == kRoles && tensor->size(3) == kRoles,
                  name, ": expected a contiguous table [B|1, H, 6, 6]");
  *stride = shared_stride(*tensor, 0);
  return pointer<float>(tensor);
}

const uint8_t* role_bytes(const char* name, const OptionalTensor& tensor, const DecodeParams& p, int64_t length,
                          int64_t* stride) {
  if (!tensor.has_value()) return nullptr;
  check_dim(name, *tensor, 2);
  check_dtype(name, *tensor, ScalarType::Byte);
  check_rows(name, *tensor, 1);
  STD_TORCH_CHECK((tensor->size(0) == 1 || tensor->size(0) == p.batch) && tensor->size(1) == length, name,
                  ": expected [B|1, ", length, "]");
  *stride = shared_stride(*tensor, 0);
  return pointer<uint8_t>(tensor);
}

void set_mask(const OptionalTensor& mask, DecodeParams& p) {
  p.mask_kind = MaskKind::none;
  if (!mask.has_value()) return;
  check_dim("mask", *mask, 4);
  const ScalarType type = mask->scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Bool || type == ScalarType::Float || type == ScalarType::Half ||
                      type == ScalarType::BFloat16,
                  "mask: expected bool, float32, float16 or bfloat16");
  p.mask_kind = type == ScalarType::Bool    ? MaskKind::boolean
                : type == ScalarType::Float ? MaskKind::f32
                : type == ScalarType::Half  ? MaskKind::f16
                                            : MaskKind::bf16;
  // The lowest finite number of the mask's dtype hides, like -inf.
  p.mask_floor = type == ScalarType::Half ? -65504.0f : type == ScalarType::BFloat16 ? -3.38953139e38f : -3.40282347e38f;
  STD_TORCH_CHECK((mask->size(0) == 1 || mask->size(0) == p.batch) && (mask->size(1) == 1 || mask->size(1) == p.heads) &&
                      mask->size(2) == p.n && mask->size(3) == p.keys,
                  "mask: expected [B|1, 1|H, N, K]");
  p.mask = mask->const_data_ptr();
  for (int dim = 0; dim < 3; ++dim) p.mask_stride[dim] = shared_stride(*mask, dim);
  p.mask_step = step_of("mask", *mask, 3);
}

void decode_attention(Tensor q, Tensor k, Tensor v, OptionalTensor roles, OptionalTensor query_roles,
                      OptionalTensor bias, OptionalTensor factor, OptionalTensor magnitude, OptionalTensor gain,
                      OptionalTensor mask, OptionalTensor lengths, bool causal, double scale, int64_t window,
                      double softcap, int64_t splits, Tensor z, Tensor lse, OptionalTensor partial_z,
                      OptionalTensor partial_lse) {
  for (const Tensor& tensor : {q, k, v, z}) {
    check_dim("q, k, v, z", tensor, 4);
    check_rows("q, k, v, z", tensor, 3);
    check_dtype("q, k, v, z", tensor, q.scalar_type());
  }
  DecodeParams p{};
  p.batch = int32_t(q.size(0));
  p.heads = int32_t(q.size(1));
  p.n = int32_t(q.size(2));
  p.dim = int32_t(q.size(3));
  p.key_heads = int32_t(k.size(1));
  p.keys = int32_t(k.size(2));
  for (const Tensor& tensor : {k, v}) {
    STD_TORCH_CHECK(tensor.size(0) == p.batch && tensor.size(1) == p.key_heads && tensor.size(2) == p.keys &&
                        tensor.size(3) == p.dim,
                    "k, v: expected [B, Hkv, K, D]");
  }
  for (int dim = 0; dim < 4; ++dim) STD_TORCH_CHECK(z.size(dim) == q.size(dim), "z: expected the shape of q");
  STD_TORCH_CHECK(p.key_heads > 0 && p.heads % p.key_heads == 0, "q: expected a multiple of the key heads");
  STD_TORCH_CHECK(p.dim % 8 == 0 && p.dim <= 256, "q: expected a head dimension that is a multiple of 8 up to 256");
  STD_TORCH_CHECK(k.size(2) < (int64_t(1) << 30), "k: expected fewer keys");
  STD_TORCH_CHECK(splits >= 1 && splits <= kMaxSplits, "splits: expected 1 to ", kMaxSplits);
  STD_TORCH_CHECK(is_aligned(z), "z: expected rows aligned to 16 bytes");
  p.splits = int32_t(splits);
  p.dtype = dtype_of(q);
  p.aligned = is_aligned(k) && is_aligned(v);

  p.q = q.const_data_ptr();
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.z = z.mutable_data_ptr();
  for (int dim = 0; dim < 3; ++dim) {
    p.q_stride[dim] = q.stride(dim);
    p.z_stride[dim] = z.stride(dim);
  }
  for (int dim = 0; dim < 2; ++dim) {
    p.k_stride[dim] = k.stride(dim);
    p.v_stride[dim] = v.stride(dim);
  }
  p.k_step = step_of("k", k, 2);
  p.v_step = step_of("v", v, 2);

  const int64_t outputs = int64_t(p.batch) * p.heads * p.n;
  check_dtype("lse", lse, ScalarType::Float);
  STD_TORCH_CHECK(lse.is_contiguous() && lse.numel() == outputs, "lse: expected contiguous [B, H, N]");
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (splits > 1) {
    STD_TORCH_CHECK(partial_z.has_value() && partial_lse.has_value(), "partial_z, partial_lse: needed for splits");
    check_dtype("partial_z", *partial_z, ScalarType::Float);
    check_dtype("partial_lse", *partial_lse, ScalarType::Float);
    STD_TORCH_CHECK(partial_z->is_contiguous() && partial_z->numel() == splits * outputs * p.dim &&
                        partial_lse->is_contiguous() && partial_lse->numel() == splits * outputs && is_aligned(*partial_z),
                    "partial_z, partial_lse: expected contiguous [splits, B, H, N, D] and [splits, B, H, N]");
    p.partial_z = mutable_pointer<float>(partial_z);
    p.partial_lse = mutable_pointer<float>(partial_lse);
  }

  p.roles = role_bytes("roles", roles, p, p.keys, &p.roles_stride);
  p.query_roles = role_bytes("query_roles", query_roles, p, p.n, &p.query_roles_stride);
  p.bias = table("bias", bias, p, &p.bias_stride);
  p.factor = table("factor", factor, p, &p.factor_stride);
  p.magnitude = table("magnitude", magnitude, p, &p.magnitude_stride);
  p.gain = table("gain", gain, p, &p.gain_stride);
  STD_TORCH_CHECK(!p.routed() || (p.roles != nullptr && p.query_roles != nullptr), "roles: needed with tables");
  set_mask(mask, p);
  if (lengths.has_value()) {
    check_dim("lengths", *lengths, 1);
    check_dtype("lengths", *lengths, ScalarType::Int);
    STD_TORCH_CHECK(lengths->size(0) == 1 || lengths->size(0) == p.batch, "lengths: expected [B|1]");
    p.lengths = pointer<int32_t>(lengths);
    p.lengths_stride = int32_t(shared_stride(*lengths, 0));
  }
  p.causal = causal;
  p.window = int32_t(window < (int64_t(1) << 30) ? window : int64_t(1) << 30);
  p.scale = float(scale);
  p.softcap = float(softcap);

  const Launcher launch(q);
  run_decode(p, [&](auto kernel, int64_t blocks, int threads) { launch(kernel, p, blocks, 1, threads); });
}

}  // namespace
}  // namespace emokernels

STABLE_TORCH_LIBRARY_IMPL(EMO_NAMESPACE, EMO_DISPATCH_KEY, m) {
  m.impl("decode_attention", TORCH_BOX(&emokernels::decode_attention));
}
