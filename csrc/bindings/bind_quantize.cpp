#include "bindings/bindings.h"
#include "cpu/quantize.h"

namespace {

using gp::Code8;
using gp::DType;
using Address = std::uintptr_t;
using Release = py::call_guard<py::gil_scoped_release>;

gp::ScaledArgs scaled(int64_t batch, int64_t rows, int64_t cols, int64_t row_block,
                      int64_t col_block, int code, int threads) {
  return {batch, rows, cols, row_block, col_block, Code8(code), threads};
}

}  // namespace

void bind_quantize(py::module_& m) {
  m.def(
      "quantize_scaled",
      [](int64_t batch, int64_t rows, int64_t cols, int64_t row_block, int64_t col_block, int code,
         int threads, Address x, int dtype, Address q, Address scale, bool allow_nonfinite) {
        return GP_KERNEL(quantize_scaled)(
            scaled(batch, rows, cols, row_block, col_block, code, threads), as_pointer<void>(x),
            DType(dtype), as_pointer<uint8_t>(q), as_pointer<float>(scale), allow_nonfinite);
      },
      Release());
  m.def(
      "dequantize_scaled",
      [](int64_t batch, int64_t rows, int64_t cols, int64_t row_block, int64_t col_block, int code,
         int threads, Address q, Address scale, Address out, int dtype) {
        GP_KERNEL(dequantize_scaled)(
            scaled(batch, rows, cols, row_block, col_block, code, threads),
            as_pointer<uint8_t>(q), as_pointer<float>(scale), as_pointer<void>(out), DType(dtype));
      },
      Release());
  m.def(
      "quantize_book",
      [](int book, Address x, int dtype, int64_t n, int64_t block, Address q, Address absmax, int threads) {
        return GP_KERNEL(quantize_book)(gp::Book(book), as_pointer<void>(x), DType(dtype), n, block,
                                        as_pointer<uint8_t>(q), as_pointer<float>(absmax), threads);
      },
      Release());
  m.def(
      "dequantize_book",
      [](int book, Address q, Address scale, Address nested, Address offset, Address map, int64_t n,
         int64_t block, Address out, int dtype, int threads) {
        const gp::BlockScales scales{as_pointer<void>(scale), as_pointer<float>(nested),
                                     as_pointer<float>(offset), as_pointer<float>(map)};
        GP_KERNEL(dequantize_book)(gp::Book(book), as_pointer<uint8_t>(q), scales, n, block,
                                   as_pointer<void>(out), DType(dtype), threads);
      },
      Release());
  m.def(
      "quantize_groups",
      [](int bits, int64_t rows, int64_t cols, int64_t group, int scale_dtype, int threads,
         Address x, int dtype, Address q, Address scale, Address zero_point) {
        return GP_KERNEL(quantize_groups)({bits, rows, cols, group, DType(scale_dtype), threads},
                                        as_pointer<void>(x), DType(dtype), as_pointer<uint8_t>(q),
                                        as_pointer<void>(scale), as_pointer<uint8_t>(zero_point));
      },
      Release());
  m.def(
      "dequantize_groups",
      [](int bits, int64_t rows, int64_t cols, int64_t group, int scale_dtype, int threads,
         Address q, Address scale, Address zero_point, Address out, int dtype) {
        GP_KERNEL(dequantize_groups)({bits, rows, cols, group, DType(scale_dtype), threads},
                                   as_pointer<uint8_t>(q), as_pointer<void>(scale),
                                   as_pointer<uint8_t>(zero_point), as_pointer<void>(out),
                                   DType(dtype));
      },
      Release());
  m.def(
      "quantize_dynamic",
      [](Address x, int dtype, Address offset, int64_t n, int64_t block, Address bound,
         Address start, Address q, Address absmax, int threads) {
        const gp::DynamicMap map{nullptr, as_pointer<float>(bound), as_pointer<uint8_t>(start)};
        return GP_KERNEL(quantize_dynamic)(as_pointer<void>(x), DType(dtype),
                                           as_pointer<float>(offset), n, block, map,
                                           as_pointer<uint8_t>(q), as_pointer<float>(absmax),
                                           threads);
      },
      Release());
  m.def(
      "dequantize_dynamic",
      [](Address q, Address absmax, int64_t n, int64_t block, Address value, Address out, int dtype,
         int threads) {
        GP_KERNEL(dequantize_dynamic)(as_pointer<uint8_t>(q), as_pointer<float>(absmax), n, block,
                                      as_pointer<float>(value), as_pointer<void>(out), DType(dtype),
                                      threads);
      },
      Release());
  m.attr("DYNAMIC_BINS") = gp::kDynamicBins;
}
