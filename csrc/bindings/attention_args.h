// What the bindings of the two attention ops have in common: lists of integers, addresses among them.
#pragma once

#include <pybind11/stl.h>

#include <array>
#include <new>
#include <vector>

#include "bindings/bindings.h"
#include "cpu/attention.h"

using Ints = std::vector<int64_t>;
using Four = std::array<int64_t, 4>;

template <class T>
inline T* pointer_at(const Ints& n, size_t i) {
  return as_pointer<T>(static_cast<std::uintptr_t>(n.at(i)));
}

// (address, batch stride, seqlen stride, head stride)
inline gp::Tensor4 tensor4(const Ints& n) {
  return {pointer_at<void>(n, 0), n.at(1), n.at(2), n.at(3)};
}

// A contiguous (batch, rows, heads, dim).
inline gp::Tensor4 dense(std::uintptr_t address, int64_t rows, int64_t heads, int64_t dim) {
  return {as_pointer<void>(address), rows * heads * dim, heads * dim, dim};
}

// q, k and v by addresses, shapes and strides as torch gives them: (batch, rows, heads, dim), or
// (batch, heads, rows, dim) with heads_first. `fits` says whether they belong together.
struct Heads {
  bool fits = false;
  int64_t batch = 0, batch_k = 0, seqlen_q = 0, seqlen_k = 0, heads = 0, heads_k = 0, dim = 0, dim_v = 0;
  gp::Tensor4 q, k, v;

  Heads(bool heads_first, const Ints& addresses, const Four& q_shape, const Four& q_stride,
        const Four& k_shape, const Four& k_stride, const Four& v_shape, const Four& v_stride) {
    const int head = heads_first ? 1 : 2, row = heads_first ? 2 : 1;
    batch = q_shape[0], seqlen_q = q_shape[row], heads = q_shape[head], dim = q_shape[3];
    batch_k = k_shape[0], seqlen_k = k_shape[row], heads_k = k_shape[head], dim_v = v_shape[3];
    const auto place = [&](int i, const Four& stride) {
      return gp::Tensor4{pointer_at<void>(addresses, i), stride[0], stride[row], stride[head]};
    };
    q = place(0, q_stride), k = place(1, k_stride), v = place(2, v_stride);
    fits = k_shape[3] == dim && k_shape[0] == v_shape[0] && k_shape[1] == v_shape[1] &&
           k_shape[2] == v_shape[2] && dim > 0 && dim_v > 0 && heads_k > 0 && heads % heads_k == 0 &&
           q_stride[3] == 1 && k_stride[3] == 1 && v_stride[3] == 1;
  }

  // Of a window: one that reaches past everything is unbounded, as the kernels add it to positions.
  int64_t side(int64_t keys) const { return keys >= seqlen_q + seqlen_k ? -1 : keys; }
  gp::Tensor4 out(std::uintptr_t address) const { return dense(address, seqlen_q, heads, dim_v); }
};

inline void require_memory(bool done) {
  if (!done) throw std::bad_alloc();
}
