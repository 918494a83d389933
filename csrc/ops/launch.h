// Runs kernels on the current stream of a tensor's device.
#pragma once

#include "platform.cuh"
#include "torch_stable.h"

#if defined(__CUDACC__)

// Builds of torch without CUDA lack this function. Weak, so that the library can be loaded there and say what is wrong.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace emokernels {

class Launcher {
 public:
  explicit Launcher(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "emokernels: this build of torch has no CUDA, so there is no stream to run on");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <typename Kernel, typename Params>
  void operator()(Kernel kernel, const Params& params, int64_t blocks_x, int64_t blocks_y, int threads) const {
    STD_TORCH_CHECK(blocks_x < (int64_t(1) << 31) && blocks_y < (1 << 16), "emokernels: the problem is too large");
    kernel<<<dim3(unsigned(blocks_x), unsigned(blocks_y)), threads, 0, stream_>>>(params);
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, "emokernels: a kernel could not be launched: ", cudaGetErrorString(error));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace emokernels

#else

namespace emokernels {

class Launcher {
 public:
  explicit Launcher(const Tensor&) {}

  template <typename Kernel, typename Params>
  void operator()(Kernel kernel, const Params& params, int64_t blocks_x, int64_t blocks_y, int threads) const {
    emulator::launch(blocks_x, blocks_y, threads, [kernel, &params] { kernel(params); });
  }
};

}  // namespace emokernels

#endif
