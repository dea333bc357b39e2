#include "bindings/bindings.h"
#include "cpu/quant_matmul.h"

namespace {

using Address = std::uintptr_t;

void quant_matmul(bool backward, int format, int64_t n, int64_t k, Address qdata, Address scale,
                  int scale_dtype, Address zero_point, Address nested_scale, Address dynamic_map,
                  Address scale_offset, int64_t group_size, int64_t m, Address x, Address y,
                  int dtype, Address bias, int bias_dtype, int threads) {
  gp::QuantMatmulArgs args{};
  args.w = {static_cast<gp::QuantFormat>(format),
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
  args.m = m;
  args.x = as_pointer<const void>(x);
  args.y = as_pointer<void>(y);
  args.dtype = static_cast<gp::DType>(dtype);
  args.bias = as_pointer<const void>(bias);
  args.bias_dtype = static_cast<gp::DType>(bias_dtype);
  args.threads = threads;
  bool ok;
  {
    py::gil_scoped_release release;
    ok = backward ? GP_KERNEL(quant_matmul_backward)(args) : GP_KERNEL(quant_matmul_forward)(args);
  }
  if (!ok) throw std::bad_alloc();
}

}  // namespace

void bind_quant_matmul(py::module_& m) {
  m.def("quant_matmul", &quant_matmul, py::arg("backward"), py::arg("format"), py::arg("n"),
        py::arg("k"), py::arg("qdata"), py::arg("scale"), py::arg("scale_dtype"),
        py::arg("zero_point"), py::arg("nested_scale"), py::arg("dynamic_map"),
        py::arg("scale_offset"), py::arg("group_size"), py::arg("m"), py::arg("x"), py::arg("y"),
        py::arg("dtype"), py::arg("bias"), py::arg("bias_dtype"), py::arg("threads"));
}
