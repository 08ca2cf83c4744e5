// What every CUDA registration needs: the tensor's device and torch's stream on it, a workspace, errors of a launch.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "checks.h"

// Lives in libtorch_cuda: weak, so that the same library loads where torch has no CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace scaphoid {

// While it lives, the tensor's device is the current one; stream() is torch's current stream there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {}

  void* stream() const {
    require(aoti_torch_get_current_cuda_stream != nullptr, "tensor on CUDA, but the torch in this process has no CUDA");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return stream;
  }

 private:
  torch::stable::accelerator::DeviceIndex index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

// Uninitialised bytes from torch's allocator. May go out of scope after the launch: the allocator follows the stream.
inline Tensor device_workspace(const Tensor& like, size_t bytes) {
  return torch::stable::new_empty(like, Sizes{static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

// `error` is what the C launch function returned.
inline void require_launched(const char* op, int error) {
  const auto code = static_cast<cudaError_t>(error);
  require(code == cudaSuccess, op, ": CUDA error ", cudaGetErrorName(code), ": ", cudaGetErrorString(code));
}

}  // namespace scaphoid
