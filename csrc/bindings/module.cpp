// The only place that knows Python: every function takes integers (addresses, sizes, strides, codes
// of common/dtype.h) and releases the interpreter lock while a kernel runs.
#include "bindings/bindings.h"

#include "common/memory.h"
#include "common/parallel.h"
#include "cpu/isa.h"
#include "cpu/read_memory.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "genai_perf native CPU kernels";
  m.def("isa", [] { return std::string(gp::isa_name(gp::active_isa())); });
  m.def("best_isa", [] { return std::string(gp::isa_name(gp::best_isa())); });
  m.def("force_isa", [](const std::string& name) {
    for (gp::Isa isa : {gp::Isa::scalar, gp::Isa::avx2, gp::Isa::avx512})
      if (name == gp::isa_name(isa)) {
        if (!gp::force_isa(isa))
          throw py::value_error("isa: this machine has no " + name + ", only " +
                                gp::isa_name(gp::best_isa()));
        return;
      }
    throw py::value_error("isa: expected scalar, avx2 or avx512, got " + name);
  });
  m.def("prefer_huge_pages", [](std::uintptr_t data, int64_t bytes) {
    gp::prefer_huge_pages(as_pointer<void>(data), bytes);
  });
  m.def("gather_huge_pages", [](std::uintptr_t data, int64_t bytes) {
    py::gil_scoped_release release;
    gp::gather_huge_pages(as_pointer<void>(data), bytes);
  });
  m.def("use_openmp_of", [](const std::string& name) { return gp::use_openmp_of(name.c_str()); });
  m.def("uses_openmp", &gp::uses_openmp);
  m.def("read_memory", [](std::uintptr_t data, int64_t bytes, int threads) {
    py::gil_scoped_release release;
    return GP_KERNEL(read_memory)(as_pointer<const void>(data), bytes, threads);
  });
  bind_attention(m);
  bind_decode_attention(m);
  bind_quantize(m);
  bind_quant_matmul(m);
  bind_distill_loss(m);
  bind_sparse_matmul(m);
  bind_sparsegpt(m);
  bind_optimizer_step(m);
}
