#include "bindings/bindings.h"
#include "cpu/quant_matmul.h"

namespace {

using Address = std::uintptr_t;

// A weight by its addresses; whoever makes one keeps the memory alive.
gp::QuantWeight make_weight(int format, int64_t n, int64_t k, Address qdata, Address scale,
                            int scale_dtype, Address zero_point, Address nested_scale,
                            Address dynamic_map, Address scale_offset, int64_t group_size) {
  return {static_cast<gp::QuantFormat>(format),
          n,
          k,
          as_pointer<const uint8_t>(qdata),
          as_pointer<const void>(scale),
          static_cast<gp::DType>(scale_dtype),
          as_pointer<const uint8_t>(zero_point),
          as_pointer<const float>(nested_scale),
          as_pointer<const float>(dynamic_map),
          as_pointer<const float>(scale_offset),
          group_size};
}

gp::QuantMatmulArgs make_args(const gp::QuantWeight& w, int64_t m, Address x, Address y, int dtype,
                              int threads) {
  gp::QuantMatmulArgs args{};
  args.w = w;
  args.m = m;
  args.x = as_pointer<const void>(x);
  args.y = as_pointer<void>(y);
  args.dtype = static_cast<gp::DType>(dtype);
  args.threads = threads;
  return args;
}

void run(bool (*kernel)(const gp::QuantMatmulArgs&), const gp::QuantMatmulArgs& args) {
  bool ok;
  {
    py::gil_scoped_release release;
    ok = kernel(args);
  }
  if (!ok) throw std::bad_alloc();
}

void forward(const gp::QuantWeight& w, int64_t m, Address x, Address y, int dtype, Address bias,
             int bias_dtype, int threads) {
  gp::QuantMatmulArgs args = make_args(w, m, x, y, dtype, threads);
  args.bias = as_pointer<const void>(bias);
  args.bias_dtype = static_cast<gp::DType>(bias_dtype);
  run(GP_KERNEL(quant_matmul_forward), args);
}

void forward_int8(const gp::QuantWeight& w, int64_t m, Address x, Address y, int dtype, Address bias,
                  int bias_dtype, int threads) {
  gp::QuantMatmulArgs args = make_args(w, m, x, y, dtype, threads);
  args.bias = as_pointer<const void>(bias);
  args.bias_dtype = static_cast<gp::DType>(bias_dtype);
  run(GP_KERNEL(quant_matmul_int8), args);
}

void backward(const gp::QuantWeight& w, int64_t m, Address dy, Address dx, int dtype, int threads) {
  run(GP_KERNEL(quant_matmul_backward), make_args(w, m, dy, dx, dtype, threads));
}

}  // namespace

void bind_quant_matmul(py::module_& m) {
  py::class_<gp::QuantWeight>(m, "QuantWeight")
      .def(py::init(&make_weight), py::arg("format"), py::arg("n"), py::arg("k"), py::arg("qdata"),
           py::arg("scale"), py::arg("scale_dtype"), py::arg("zero_point"), py::arg("nested_scale"),
           py::arg("dynamic_map"), py::arg("scale_offset"), py::arg("group_size"))
      .def("forward", &forward, py::arg("m"), py::arg("x"), py::arg("y"), py::arg("dtype"),
           py::arg("bias"), py::arg("bias_dtype"), py::arg("threads"))
      .def("forward_int8", &forward_int8, py::arg("m"), py::arg("x"), py::arg("y"), py::arg("dtype"),
           py::arg("bias"), py::arg("bias_dtype"), py::arg("threads"))
      .def("backward", &backward, py::arg("m"), py::arg("dy"), py::arg("dx"), py::arg("dtype"),
           py::arg("threads"));
}
