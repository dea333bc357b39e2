// y = x @ W^T + bias for few rows of x, and rows of W as floats, from a SparseTensor (n, k).
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace gp {

enum class SparseValue : int { f32 = 0, bf16 = 1, f16 = 2, i8 = 3, i4 = 4 };

// The components of a SparseTensor; layouts as in genai_perf/formats/sparse*.py.
struct SparseWeight {
  int64_t n, k;
  SparseValue kind;
  const uint8_t* values;
  int64_t value_bytes;
  const uint8_t* index;      // a byte for 8 columns
  const int64_t* row_start;  // bitmask: (n + 1), in values; null in layout 2:4
  const void* scale;         // of scale_dtype, null where values are floats
  DType scale_dtype;
  int64_t group_size;        // columns of a scale, a multiple of 8, or -1
};

struct SparseMatmulArgs {
  SparseWeight w;
  int64_t m;         // at most SPARSE_FEW_ROWS are fast
  const void* x;     // (m, k)
  void* y;           // (m, n)
  DType dtype;       // of x and y
  const void* bias;  // (n) or null
  DType bias_dtype;
  int threads;
};

// out[r - r0][0..k) = row r of W for r in [r0, r1), fp32.
struct SparseDecodeArgs {
  SparseWeight w;
  int64_t r0, r1;
  float* out;
  int threads;
};

// Both return false when scratch memory is not to be had. Results do not depend on `threads`.
GP_DECLARE_KERNEL(bool, sparse_matmul_few, const SparseMatmulArgs&)
GP_DECLARE_KERNEL(bool, sparse_decode, const SparseDecodeArgs&)

}  // namespace gp
