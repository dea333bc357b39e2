// What the entry points of the CUDA library share.
#pragma once

#define GP_EXPORT extern "C" __attribute__((visibility("default")))
// csrc/tests/cuda_emulation.h runs the same call on the CPU.
#if defined(__CUDACC__)
#define GP_LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)
#endif

namespace {

// The calling thread's device is `device` while this lives, unless `error` says why not.
class OnDevice {
 public:
  explicit OnDevice(int device) : device_(device) {
    error = cudaGetDevice(&before_);
    if (error == cudaSuccess && before_ != device_) error = cudaSetDevice(device_);
  }
  OnDevice(const OnDevice&) = delete;
  ~OnDevice() {
    if (error == cudaSuccess && before_ != device_) cudaSetDevice(before_);
  }
  cudaError_t error;

 private:
  int device_, before_ = 0;
};

}  // namespace
