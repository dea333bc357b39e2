#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

namespace py = pybind11;

// One function per op, each in csrc/bindings/bind_<op>.cpp, called from module.cpp.
void bind_quantize(py::module_& m);

template <class T>
inline T* as_pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_attention(py::module_& m);
void bind_decode_attention(py::module_& m);
void bind_quant_matmul(py::module_& m);
void bind_distill_loss(py::module_& m);
void bind_sparse_matmul(py::module_& m);
void bind_sparsegpt(py::module_& m);
void bind_optimizer_step(py::module_& m);
