// The whole CUDA library on the CPU: tests/ops call it through the Python backend, with tensors in
// host memory.
#include "cuda_emulation.h"

#include "cuda/dequantize.cu"
#include "cuda/library.cu"
#include "cuda/quant_matmul.cu"
#include "cuda/quantize.cu"
