// What the bindings of the two attention ops have in common: lists of integers, addresses among them.
#pragma once

#include <pybind11/stl.h>

#include <new>
#include <vector>

#include "bindings/bindings.h"
#include "cpu/attention.h"

using Ints = std::vector<int64_t>;

template <class T>
inline T* pointer_at(const Ints& n, size_t i) {
  return as_pointer<T>(static_cast<std::uintptr_t>(n.at(i)));
}

// (address, batch stride, seqlen stride, head stride)
inline gp::Tensor4 tensor4(const Ints& n) {
  return {pointer_at<void>(n, 0), n.at(1), n.at(2), n.at(3)};
}

inline void require_memory(bool done) {
  if (!done) throw std::bad_alloc();
}
