// What is said of the whole library.
#include "cuda/common.cuh"
#include "cuda/launch.h"

GP_EXPORT const char* gp_cuda_error(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
