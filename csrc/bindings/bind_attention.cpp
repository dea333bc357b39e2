#include "bindings/attention_args.h"

namespace {

// The integers of AttentionShape in its order, addresses among them, then dtype and threads. `bias`:
// kind, dtype, address, batch, head, row and column strides. `blocks`: address, strides as well, rows
// and columns of a block. `dropout`: below, seed, offset. Each of the three is empty where there is none.
gp::AttentionShape shape(const Ints& n, const Ints& bias, const Ints& blocks, const Ints& dropout,
                         const std::vector<float>& factors) {
  gp::AttentionShape s;
  s.batch = n.at(0), s.seqlen_q = n.at(1), s.seqlen_k = n.at(2);
  s.heads = n.at(3), s.heads_k = n.at(4), s.dim = n.at(5), s.dim_v = n.at(6);
  s.lse_batch = n.at(7), s.lse_head = n.at(8);
  s.window_left = n.at(9), s.window_right = n.at(10);
  s.scale = factors.at(0), s.softcap = factors.at(1);
  s.cu_seqlens_q = pointer_at<const int32_t>(n, 11);
  s.cu_seqlens_k = pointer_at<const int32_t>(n, 12);
  s.alibi_slopes = pointer_at<const float>(n, 13);
  s.alibi_batch = n.at(14);
  s.sinks = pointer_at<const float>(n, 15);
  s.dtype = static_cast<gp::DType>(n.at(16));
  s.threads = static_cast<int>(n.at(17));
  if (!bias.empty())
    s.bias = {static_cast<gp::AttentionBias::Kind>(bias.at(0)), static_cast<gp::DType>(bias.at(1)),
              pointer_at<const void>(bias, 2), bias.at(3), bias.at(4), bias.at(5), bias.at(6)};
  if (!blocks.empty())
    s.blocks = {pointer_at<const uint8_t>(blocks, 0), blocks.at(1), blocks.at(2), blocks.at(3),
                blocks.at(4), blocks.at(5), blocks.at(6)};
  if (!dropout.empty())
    s.dropout = {static_cast<uint32_t>(dropout.at(0)), factors.at(2),
                 static_cast<uint64_t>(dropout.at(1)), static_cast<uint64_t>(dropout.at(2))};
  return s;
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention_fwd", [](const Ints& sizes, const Ints& bias, const Ints& blocks,
                            const Ints& dropout, const std::vector<float>& factors,
                            const Ints& q, const Ints& k, const Ints& v, const Ints& out,
                            std::uintptr_t lse) {
    const gp::AttentionFwdArgs args{shape(sizes, bias, blocks, dropout, factors),
                                    tensor4(q), tensor4(k), tensor4(v), tensor4(out),
                                    as_pointer<float>(lse)};
    py::gil_scoped_release release;
    require_memory(GP_KERNEL(attention_fwd)(args));
  });
  // Without packed sequences, masks, bias and dropout. `addresses`: q, k, v, out, lse. `options`:
  // window_left, window_right, dtype, threads. Returns false, with nothing done, where shapes or
  // strides do not fit.
  m.def("attention_plain", [](const Ints& addresses, const Four& q_shape, const Four& q_stride,
                              const Four& k_shape, const Four& k_stride, const Four& v_shape,
                              const Four& v_stride, const Ints& options, float scale,
                              float softcap) {
    const Heads h(false, addresses, q_shape, q_stride, k_shape, k_stride, v_shape, v_stride);
    if (!h.fits || h.batch_k != h.batch) return false;
    gp::AttentionShape s{};
    s.batch = h.batch, s.seqlen_q = h.seqlen_q, s.seqlen_k = h.seqlen_k;
    s.heads = h.heads, s.heads_k = h.heads_k, s.dim = h.dim, s.dim_v = h.dim_v;
    s.lse_batch = h.heads * h.seqlen_q, s.lse_head = h.seqlen_q;
    s.window_left = h.side(options.at(0)), s.window_right = h.side(options.at(1));
    s.scale = scale, s.softcap = softcap;
    s.dtype = static_cast<gp::DType>(options.at(2)), s.threads = static_cast<int>(options.at(3));
    const gp::AttentionFwdArgs args{s, h.q, h.k, h.v, h.out(addresses.at(3)),
                                    pointer_at<float>(addresses, 4)};
    py::gil_scoped_release release;
    require_memory(GP_KERNEL(attention_fwd)(args));
    return true;
  });
  // `dbias`: (address, batch, head and row strides) or nothing.
  m.def("attention_bwd", [](const Ints& sizes, const Ints& bias, const Ints& blocks,
                            const Ints& dropout, const std::vector<float>& factors,
                            const Ints& q, const Ints& k, const Ints& v, const Ints& out,
                            const Ints& dout, const Ints& dq, const Ints& dk, const Ints& dv,
                            std::uintptr_t lse, std::uintptr_t dlse, const Ints& dbias,
                            std::uintptr_t dsinks) {
    gp::AttentionBwdArgs args{};
    args.shape = shape(sizes, bias, blocks, dropout, factors);
    args.q = tensor4(q), args.k = tensor4(k), args.v = tensor4(v);
    args.out = tensor4(out), args.dout = tensor4(dout);
    args.dq = tensor4(dq), args.dk = tensor4(dk), args.dv = tensor4(dv);
    args.lse = as_pointer<const float>(lse), args.dlse = as_pointer<const float>(dlse);
    args.dsinks = as_pointer<float>(dsinks);
    if (!dbias.empty()) {
      args.dbias = pointer_at<float>(dbias, 0);
      args.dbias_batch = dbias[1], args.dbias_head = dbias.at(2), args.dbias_row = dbias.at(3);
    }
    py::gil_scoped_release release;
    require_memory(GP_KERNEL(attention_bwd)(args));
  });
}
