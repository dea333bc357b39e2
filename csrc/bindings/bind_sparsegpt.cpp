#include "bindings/bindings.h"
#include "cpu/sparsegpt.h"

namespace {

using Address = std::uintptr_t;

void sparsegpt_block(int64_t columns, int64_t rows, Address weight, Address pruned, Address errors,
                     Address factor, int64_t factor_stride, int64_t zeros, int64_t group,
                     int64_t count, int threads) {
  const gp::SparseGptBlock block{columns,
                                 rows,
                                 as_pointer<float>(weight),
                                 as_pointer<uint8_t>(pruned),
                                 as_pointer<float>(errors),
                                 as_pointer<const float>(factor),
                                 factor_stride,
                                 zeros,
                                 group,
                                 count,
                                 threads};
  bool ok;
  {
    py::gil_scoped_release release;
    ok = GP_KERNEL(sparsegpt_block)(block);
  }
  if (!ok) throw std::bad_alloc();
}

}  // namespace

void bind_sparsegpt(py::module_& m) {
  m.def("sparsegpt_block", &sparsegpt_block, py::arg("columns"), py::arg("rows"),
        py::arg("weight"), py::arg("pruned"), py::arg("errors"), py::arg("factor"),
        py::arg("factor_stride"), py::arg("zeros"), py::arg("group"), py::arg("count"),
        py::arg("threads"));
}
