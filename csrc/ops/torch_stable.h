// torch's stable ABI, and the few helpers that every binding needs. No header of a kernel is included from here.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>

// A test compiles the bindings for the CPU, under another name, with the kernels run by an emulator.
#if !defined(EMO_NAMESPACE)
#define EMO_NAMESPACE emokernels_native
#define EMO_DISPATCH_KEY CUDA
#endif

namespace emokernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void check_dim(const char* name, const Tensor& tensor, int64_t dim) {
  STD_TORCH_CHECK(tensor.dim() == dim, name, ": expected ", dim, " dimensions, got ", tensor.dim());
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": expected another dtype; emokernels.native converts it");
}

inline void check_rows(const char* name, const Tensor& tensor, int dim) {
  STD_TORCH_CHECK(tensor.size(dim) <= 1 || tensor.stride(dim) == 1, name, ": expected a contiguous last dimension");
}

// Pointer to the elements, or null for an absent tensor.
template <typename T> const T* pointer(const OptionalTensor& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}
template <typename T> T* mutable_pointer(const OptionalTensor& tensor) {
  return tensor.has_value() ? static_cast<T*>(tensor->mutable_data_ptr()) : nullptr;
}

// Stride of a dimension that may be shared: 0 where the size is 1.
inline int64_t shared_stride(const Tensor& tensor, int dim) { return tensor.size(dim) == 1 ? 0 : tensor.stride(dim); }

// Whether the tensor can be read 16 bytes at a time along its contiguous last dimension.
inline bool is_aligned(const Tensor& tensor) {
  const int64_t unit = int64_t(tensor.element_size()), last = tensor.dim() - 1;
  bool aligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0 && tensor.size(last) * unit % 16 == 0;
  for (int64_t dim = 0; dim < last; ++dim) aligned = aligned && shared_stride(tensor, dim) * unit % 16 == 0;
  return aligned;
}

}  // namespace emokernels
