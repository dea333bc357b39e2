#include "bindings/bindings.h"
#include "cpu/sparse_matmul.h"

namespace {

using Address = std::uintptr_t;

gp::SparseWeight weight(int64_t n, int64_t k, int kind, Address values, int64_t value_bytes,
                        Address index, Address row_start, Address scale, int scale_dtype,
                        int64_t group_size) {
  return {n,
          k,
          static_cast<gp::SparseValue>(kind),
          as_pointer<const uint8_t>(values),
          value_bytes,
          as_pointer<const uint8_t>(index),
          as_pointer<const int64_t>(row_start),
          as_pointer<const void>(scale),
          static_cast<gp::DType>(scale_dtype),
          group_size};
}

void sparse_matmul(int64_t n, int64_t k, int kind, Address values, int64_t value_bytes,
                   Address index, Address row_start, Address scale, int scale_dtype,
                   int64_t group_size, int64_t m, Address x, Address y, int dtype, Address bias,
                   int bias_dtype, int threads) {
  const gp::SparseMatmulArgs args{
      weight(n, k, kind, values, value_bytes, index, row_start, scale, scale_dtype, group_size),
      m,
      as_pointer<const void>(x),
      as_pointer<void>(y),
      static_cast<gp::DType>(dtype),
      as_pointer<const void>(bias),
      static_cast<gp::DType>(bias_dtype),
      threads};
  bool ok;
  {
    py::gil_scoped_release release;
    ok = GP_KERNEL(sparse_matmul_few)(args);
  }
  if (!ok) throw std::bad_alloc();
}

void sparse_decode(int64_t n, int64_t k, int kind, Address values, int64_t value_bytes,
                   Address index, Address row_start, Address scale, int scale_dtype,
                   int64_t group_size, int64_t r0, int64_t r1, Address out, int threads) {
  const gp::SparseDecodeArgs args{
      weight(n, k, kind, values, value_bytes, index, row_start, scale, scale_dtype, group_size), r0,
      r1, as_pointer<float>(out), threads};
  bool ok;
  {
    py::gil_scoped_release release;
    ok = GP_KERNEL(sparse_decode)(args);
  }
  if (!ok) throw std::bad_alloc();
}

}  // namespace

void bind_sparse_matmul(py::module_& m) {
  m.def("sparse_matmul", &sparse_matmul, py::arg("n"), py::arg("k"), py::arg("kind"),
        py::arg("values"), py::arg("value_bytes"), py::arg("index"), py::arg("row_start"),
        py::arg("scale"), py::arg("scale_dtype"), py::arg("group_size"), py::arg("m"), py::arg("x"),
        py::arg("y"), py::arg("dtype"), py::arg("bias"), py::arg("bias_dtype"), py::arg("threads"));
  m.def("sparse_decode", &sparse_decode, py::arg("n"), py::arg("k"), py::arg("kind"),
        py::arg("values"), py::arg("value_bytes"), py::arg("index"), py::arg("row_start"),
        py::arg("scale"), py::arg("scale_dtype"), py::arg("group_size"), py::arg("r0"),
        py::arg("r1"), py::arg("out"), py::arg("threads"));
}
