// Quantize and dequantize kernels. genai_perf/formats/ states the layouts; every kernel gives the
// bits of the reference codec there. All tensors are contiguous.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace gp {

// What a quantizer found in its input; the caller words the error.
enum class QuantizeStatus : int { ok = 0, nonfinite = 1, scale_overflow = 2 };

// How one element is held in a byte.
enum class Code8 : int { s8 = 0, e4m3fn = 1, e5m2 = 2, e4m3_240 = 3, e3m4 = 4 };

// int8 and fp8: a scale for each row_block x col_block tile of each of `batch` matrices, or one for
// everything where row_block is 0. int8 takes whole rows only.
struct ScaledArgs {
  int64_t batch, rows, cols, row_block, col_block;
  Code8 code;
  int threads;
};
GP_DECLARE_KERNEL(int, quantize_scaled, const ScaledArgs&, const void* x, DType dtype, uint8_t* q,
                  float* scale, bool allow_nonfinite)
GP_DECLARE_KERNEL(void, dequantize_scaled, const ScaledArgs&, const uint8_t* q, const float* scale,
                  void* out, DType dtype)

// The book that 4-bit codes are looked up in.
enum class Book : int { nf4 = 0, fp4 = 1 };

// Code books: blocks of `block` consecutive elements (a multiple of 32), even element in the high
// nibble.
GP_DECLARE_KERNEL(int, quantize_book, Book book, const void* x, DType dtype, int64_t n,
                  int64_t block, uint8_t* q, float* absmax, int threads)

// The scale of each block: fp32, or (nested != nullptr) a code of the dynamic map for each block,
// map[code] * nested[block / 256] + *offset.
struct BlockScales {
  const void* scale;
  const float* nested;
  const float* offset;
  const float* map;
};
GP_DECLARE_KERNEL(void, dequantize_book, Book book, const uint8_t* q, const BlockScales& scales,
                  int64_t n, int64_t block, void* out, DType dtype, int threads)

// int4, int3, int2: each row a little-endian stream of codes of `bits` bits, in whole bytes; `group`
// elements of a row (a multiple of 8, or the whole row) share a scale. zero_point is null for
// symmetric codes.
struct GroupArgs {
  int bits;
  int64_t rows, cols, group;
  DType scale_dtype;
  int threads;
};
GP_DECLARE_KERNEL(int, quantize_groups, const GroupArgs&, const void* x, DType dtype, uint8_t* q,
                  void* scale, uint8_t* zero_point)
GP_DECLARE_KERNEL(void, dequantize_groups, const GroupArgs&, const uint8_t* q, const void* scale,
                  const uint8_t* zero_point, void* out, DType dtype)

// A rising map of 256 values, signed or not, and how its nearest codes are found. bound: the midpoints
// between neighbours, the last one +inf; start: for each bin the code of its smallest element, with
// three bytes to spare behind the last. A bin is sign, exponent from -23 up and six bits of mantissa
// (seven of an unsigned map); none holds more than one bound. formats/dynamic_map.py makes all three.
struct DynamicMap {
  const float* value;
  const float* bound;
  const uint8_t* start;
};
constexpr int kDynamicBins = 2 * 24 * 64;
constexpr int64_t kDynamicBlock = 4096;  // the largest

// 8-bit codes of the signed map, in blocks of `block` consecutive elements of x - *offset (offset may
// be null), each divided by the largest magnitude in its block.
GP_DECLARE_KERNEL(int, quantize_dynamic, const void* x, DType dtype, const float* offset, int64_t n,
                  int64_t block, const DynamicMap& map, uint8_t* q, float* absmax, int threads)
GP_DECLARE_KERNEL(void, dequantize_dynamic, const uint8_t* q, const float* absmax, int64_t n,
                  int64_t block, const float* value, void* out, DType dtype, int threads)

}  // namespace gp
