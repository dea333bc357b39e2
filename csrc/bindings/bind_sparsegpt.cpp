#include "bindings/bindings.h"
#include "cpu/sparsegpt.h"

namespace {

using Address = std::uintptr_t;

void sparsegpt_block(int64_t columns, int64_t rows, int64_t stride, Address weight, Address pruned,
                     Address factor, int64_t zeros, int64_t group, int64_t count, int threads,
                     Address scale, Address zero, Address groups, float low, float high) {
  const gp::SparseGptBlock block{columns,
                                 rows,
                                 stride,
                                 as_pointer<float>(weight),
                                 as_pointer<uint8_t>(pruned),
                                 as_pointer<const float>(factor),
                                 zeros,
                                 group,
                                 count,
                                 threads,
                                 as_pointer<const float>(scale),
                                 as_pointer<const float>(zero),
                                 as_pointer<const int64_t>(groups),
                                 low,
                                 high};
  bool ok;
  {
    py::gil_scoped_release release;
    ok = GP_KERNEL(sparsegpt_block)(block);
  }
  if (!ok) throw std::bad_alloc();
}

void grid_search(int64_t columns, int64_t rows, int64_t candidates, Address weight,
                 Address importance, Address scale, Address zero, float low, float high,
                 Address best, int threads) {
  const gp::GridSearch search{columns,
                              rows,
                              candidates,
                              as_pointer<const float>(weight),
                              as_pointer<const float>(importance),
                              as_pointer<const float>(scale),
                              as_pointer<const float>(zero),
                              low,
                              high,
                              as_pointer<int64_t>(best),
                              threads};
  py::gil_scoped_release release;
  GP_KERNEL(grid_search)(search);
}

}  // namespace

void bind_sparsegpt(py::module_& m) {
  m.def("sparsegpt_block", &sparsegpt_block, py::arg("columns"), py::arg("rows"),
        py::arg("stride"), py::arg("weight"), py::arg("pruned"), py::arg("factor"),
        py::arg("zeros"), py::arg("group"), py::arg("count"), py::arg("threads"),
        py::arg("scale") = 0, py::arg("zero") = 0, py::arg("groups") = 0,
        py::arg("low") = 0.0f, py::arg("high") = 0.0f);
  m.def("grid_search", &grid_search, py::arg("columns"), py::arg("rows"), py::arg("candidates"),
        py::arg("weight"), py::arg("importance"), py::arg("scale"), py::arg("zero"),
        py::arg("low"), py::arg("high"), py::arg("best"), py::arg("threads"));
}
