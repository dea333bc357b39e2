#include <pybind11/stl.h>

#include <stdexcept>
#include <vector>

#include "bindings/bindings.h"
#include "cpu/attention.h"

namespace {

using Ints = std::vector<int64_t>;

// (address, batch stride, seqlen stride, head stride)
gp::Tensor4 tensor4(const Ints& t) {
  return {as_pointer<void>(static_cast<std::uintptr_t>(t.at(0))), t.at(1), t.at(2), t.at(3)};
}

// (batch, seqlen_q, seqlen_k, heads, heads_k, dim, dim_v, window_left, window_right, dtype, threads)
gp::AttentionShape shape(const Ints& n, float scale) {
  gp::AttentionShape s;
  s.batch = n.at(0), s.seqlen_q = n.at(1), s.seqlen_k = n.at(2);
  s.heads = n.at(3), s.heads_k = n.at(4), s.dim = n.at(5), s.dim_v = n.at(6);
  s.window_left = n.at(7), s.window_right = n.at(8);
  s.dtype = static_cast<gp::DType>(n.at(9));
  s.threads = static_cast<int>(n.at(10));
  s.scale = scale;
  return s;
}

void require_memory(bool done) {
  if (!done) throw std::bad_alloc();
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention_fwd", [](const Ints& sizes, float scale, const Ints& q, const Ints& k,
                            const Ints& v, const Ints& out, std::uintptr_t lse) {
    const gp::AttentionFwdArgs args{shape(sizes, scale), tensor4(q),   tensor4(k),
                                    tensor4(v),          tensor4(out), as_pointer<float>(lse)};
    py::gil_scoped_release release;
    require_memory(GP_KERNEL(attention_fwd)(args));
  });
  m.def("attention_bwd",
        [](const Ints& sizes, float scale, const Ints& q, const Ints& k, const Ints& v,
           const Ints& out, const Ints& dout, const Ints& dq, const Ints& dk, const Ints& dv,
           std::uintptr_t lse, std::uintptr_t dlse) {
          const gp::AttentionBwdArgs args{
              shape(sizes, scale), tensor4(q),  tensor4(k),  tensor4(v),  tensor4(out),
              tensor4(dout),       tensor4(dq), tensor4(dk), tensor4(dv), as_pointer<const float>(lse),
              as_pointer<const float>(dlse)};
          py::gil_scoped_release release;
          require_memory(GP_KERNEL(attention_bwd)(args));
        });
}
