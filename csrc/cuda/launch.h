// Launching kernels: errors become exceptions, the current device is put back.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace mokd::cuda {

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_));
    check(cudaSetDevice(device));
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_;
};

template <typename P>
void launch(void (*kernel)(P), int64_t blocks, int threads, size_t shared, void* stream,
            const P& parameters) {
  if (blocks > 0x7fffffff) throw std::runtime_error("CUDA: a grid of " + std::to_string(blocks) + " blocks");
  kernel<<<unsigned(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(parameters);
  check(cudaGetLastError());
}

}  // namespace mokd::cuda
