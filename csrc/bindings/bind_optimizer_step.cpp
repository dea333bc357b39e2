#include "bindings/bindings.h"
#include "cpu/optimizer_step.h"

namespace {

using gp::DType;
using Address = std::uintptr_t;
using Release = py::call_guard<py::gil_scoped_release>;

}  // namespace

void bind_optimizer_step(py::module_& m) {
  py::class_<gp::Moment>(m, "Moment")
      .def(py::init([](Address data, Address absmax, Address value, Address bound, Address start) {
        return gp::Moment{as_pointer<void>(data), as_pointer<float>(absmax),
                          {as_pointer<float>(value), as_pointer<float>(bound),
                           as_pointer<uint8_t>(start)}};
      }));
  py::class_<gp::StepArgs>(m, "StepArgs")
      .def(py::init([](Address p, Address grad, int p_dtype, int grad_dtype, int64_t n,
                       int64_t block, int threads) {
        return gp::StepArgs{as_pointer<void>(p), as_pointer<void>(grad), DType(p_dtype),
                            DType(grad_dtype), n, block, threads};
      }));
  py::class_<gp::Coefficients>(m, "Coefficients")
      .def(py::init([](float keep1, float take1, float keep2, float take2, float decay, float rate,
                       float unbias, float eps) {
        return gp::Coefficients{keep1, take1, keep2, take2, decay, rate, unbias, eps};
      }));
  m.def(
      "adamw_step",
      [](const gp::StepArgs& a, const gp::Moment& first, const gp::Moment& second,
         const gp::Coefficients& c) { return GP_KERNEL(adamw_step)(a, first, second, c); },
      Release());
  m.def(
      "lion_step",
      [](const gp::StepArgs& a, const gp::Moment& first, const gp::Coefficients& c) {
        return GP_KERNEL(lion_step)(a, first, c);
      },
      Release());
}
