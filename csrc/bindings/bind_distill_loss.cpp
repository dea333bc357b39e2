#include "bindings/bindings.h"
#include "cpu/distill_loss.h"

namespace {

using Address = std::uintptr_t;

gp::Logits logits(Address data, int64_t stride, int dtype, float scale, float softcap) {
  return {as_pointer<const void>(data), stride, static_cast<gp::DType>(dtype), scale, softcap};
}

// Returns (error, row): 0, or a code of gp::RowError and the first row that has it.
py::tuple distill_loss(int64_t rows, int64_t vocab, Address student, int64_t stride, int dtype,
                       float scale, float softcap, Address teacher, int64_t teacher_stride,
                       int teacher_dtype, float teacher_scale, float teacher_softcap, Address ids,
                       Address logprobs, int64_t k, bool tail, float logprob_scale, Address labels,
                       Address weights, float soft_weight, float hard_weight, int kind, float beta,
                       float temperature, Address grad, int64_t grad_stride, Address loss,
                       int threads) {
  gp::DistillLossArgs a{};
  a.rows = rows, a.vocab = vocab;
  a.student = logits(student, stride, dtype, scale, softcap);
  a.teacher = logits(teacher, teacher_stride, teacher_dtype, teacher_scale, teacher_softcap);
  a.ids = as_pointer<const int64_t>(ids);
  a.logprobs = as_pointer<const float>(logprobs);
  a.k = k, a.tail = tail, a.logprob_scale = logprob_scale;
  a.labels = as_pointer<const int64_t>(labels);
  a.weights = as_pointer<const float>(weights);
  a.soft_weight = soft_weight, a.hard_weight = hard_weight;
  a.kind = static_cast<gp::Divergence>(kind), a.beta = beta, a.temperature = temperature;
  a.grad = as_pointer<void>(grad), a.grad_stride = grad_stride;
  a.loss = as_pointer<float>(loss);
  a.threads = threads;
  gp::RowStatus status;
  {
    py::gil_scoped_release release;
    status = GP_KERNEL(distill_loss)(a);
  }
  if (status.error == gp::RowError::memory) throw std::bad_alloc();
  return py::make_tuple(static_cast<int>(status.error), status.row);
}

}  // namespace

void bind_distill_loss(py::module_& m) {
  m.def("distill_loss", &distill_loss, py::arg("rows"), py::arg("vocab"), py::arg("student"),
        py::arg("stride"), py::arg("dtype"), py::arg("scale"), py::arg("softcap"),
        py::arg("teacher"), py::arg("teacher_stride"), py::arg("teacher_dtype"),
        py::arg("teacher_scale"), py::arg("teacher_softcap"), py::arg("ids"), py::arg("logprobs"),
        py::arg("k"), py::arg("tail"), py::arg("logprob_scale"), py::arg("labels"),
        py::arg("weights"), py::arg("soft_weight"), py::arg("hard_weight"), py::arg("kind"),
        py::arg("beta"), py::arg("temperature"), py::arg("grad"), py::arg("grad_stride"),
        py::arg("loss"), py::arg("threads"));
}
