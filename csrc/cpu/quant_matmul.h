// y = x @ W^T + bias and dx = dy @ W, straight from the packed bytes of a quantized W (n, k).
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace gp {

enum class QuantFormat : int {
  int8 = 0, fp8 = 1, fp8_e5m2 = 2, nf4 = 3, int4 = 4, fp4 = 5, int3 = 6, int2 = 7, fp8_e3m4 = 8
};

// Formats whose codes, in a book, are one sequence in blocks that run across row ends.
constexpr bool has_book(QuantFormat f) { return f == QuantFormat::nf4 || f == QuantFormat::fp4; }

// The components of a QuantizedTensor; layouts as in genai_perf/formats.
struct QuantWeight {
  QuantFormat format;
  int64_t n, k;
  const uint8_t* qdata;
  const void* scale;  // of scale_dtype; uint8 codes of dynamic_map when nested_scale is there
  DType scale_dtype;
  const uint8_t* zero_point;  // intN: null means 2^(N-1)
  const float* nested_scale;  // books: one for 256 scales, null without double quantization
  const float* dynamic_map;   // books: 256 values
  const float* scale_offset;  // books: one value
  int64_t group_size;         // int4, books: elements of a scale (-1: a row); fp8: -1, 0, 128 (a
                              // 128 x 128 block) or -128 (128 of a row)
};

// Forward: x (m, k), y (m, n). Backward: x is dy (m, n), y is dx (m, k), bias is null.
struct QuantMatmulArgs {
  QuantWeight w;
  int64_t m;
  const void* x;
  void* y;
  DType dtype;       // of x and y
  const void* bias;  // (n) or null
  DType bias_dtype;
  int threads;
};

// At most this many rows of x go through the kernels that never write dequantized weights.
constexpr int64_t QUANT_MATMUL_FEW_ROWS = 8;

// So many products of an int8 (at least -128) and a code of x (127 at most) stay within 32 bits.
constexpr int64_t QUANT_MATMUL_INT8_COLUMNS = 131072;

// All return false when scratch memory is not to be had. Results do not depend on `threads`.
GP_DECLARE_KERNEL(bool, quant_matmul_forward, const QuantMatmulArgs&)
GP_DECLARE_KERNEL(bool, quant_matmul_backward, const QuantMatmulArgs&)
// Forward with x rounded to int8. w is int8, k at most QUANT_MATMUL_INT8_COLUMNS: a scale for each row
// of x, and exact sums. w is int4: the next.
GP_DECLARE_KERNEL(bool, quant_matmul_int8, const QuantMatmulArgs&)
// w is int4, its group_size -1 or a multiple of 32: a scale for each group of a row of x, and exact
// sums within runs of 128, 64 or 32.
GP_DECLARE_KERNEL(bool, quant_matmul_int4_int8, const QuantMatmulArgs&)
// What quant_matmul_forward chooses from.
GP_DECLARE_KERNEL(bool, quant_matmul_few_4bit, const QuantMatmulArgs&)
GP_DECLARE_KERNEL(bool, quant_matmul_few_8bit, const QuantMatmulArgs&)
GP_DECLARE_KERNEL(bool, quant_matmul_few_stream, const QuantMatmulArgs&)
GP_DECLARE_KERNEL(bool, quant_matmul_many, const QuantMatmulArgs&)

}  // namespace gp
