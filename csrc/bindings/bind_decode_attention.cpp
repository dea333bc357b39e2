#include "bindings/attention_args.h"
#include "cpu/decode_attention.h"

namespace {

// Elements of the keys up to which a second thread takes longer to wake than it helps.
constexpr int64_t ONE_THREAD = 32768;

// k and v as Tensor4, then the other members of DecodeCache in its order.
gp::DecodeCache cache(const Ints& k, const Ints& v, const Ints& n) {
  gp::DecodeCache c{};
  c.k = tensor4(k), c.v = tensor4(v);
  c.dtype = static_cast<gp::DType>(n.at(0));
  c.k_scale = pointer_at<const float>(n, 1), c.v_scale = pointer_at<const float>(n, 2);
  c.scale_batch = n.at(3);
  c.seqlens = pointer_at<const int32_t>(n, 4), c.leftpad = pointer_at<const int32_t>(n, 5);
  c.batch_idx = pointer_at<const int32_t>(n, 6), c.block_table = pointer_at<const int32_t>(n, 7);
  c.table_stride = n.at(8), c.page_size = n.at(9);
  return c;
}

}  // namespace

void bind_decode_attention(py::module_& m) {
  // `sizes`: batch, seqlen_q, heads, heads_k, dim, dim_v, window_left, window_right, num_splits,
  // alibi_slopes, its batch stride, sinks, dtype, threads.
  m.def("decode_attention", [](const Ints& sizes, float scale, float softcap, const Ints& q,
                               const Ints& k, const Ints& v, const Ints& rest, const Ints& out,
                               std::uintptr_t lse) {
    gp::DecodeArgs a{};
    a.batch = sizes.at(0), a.seqlen_q = sizes.at(1), a.heads = sizes.at(2);
    a.heads_k = sizes.at(3), a.dim = sizes.at(4), a.dim_v = sizes.at(5);
    a.window_left = sizes.at(6), a.window_right = sizes.at(7), a.num_splits = sizes.at(8);
    a.scale = scale, a.softcap = softcap;
    a.alibi_slopes = pointer_at<const float>(sizes, 9), a.alibi_batch = sizes.at(10);
    a.sinks = pointer_at<const float>(sizes, 11);
    a.dtype = static_cast<gp::DType>(sizes.at(12)), a.threads = static_cast<int>(sizes.at(13));
    a.cache = cache(k, v, rest);
    a.q = tensor4(q), a.out = tensor4(out), a.lse = as_pointer<float>(lse);
    py::gil_scoped_release release;
    require_memory(GP_KERNEL(decode_attention)(a));
  });
  // A contiguous cache. `addresses`: q, k, v, out, then sinks, lse, seqlens, k_scale and v_scale or 0:
  // none, not given back, `keys` of every sequence, none. `options`: keys, window_left, window_right,
  // num_splits, dtype, that of the cache, batch stride of the scales, threads. `added` is empty or
  // seqlen_new, k and v to append, dense (batch, seqlen_new, heads_k, dim or dim_v), then cos and sin
  // or 0, their dtype, rotary_half, interleaved. Returns false, with nothing done, where shapes or
  // strides do not fit.
  m.def("decode_whole", [](bool heads_first, const Ints& addresses, const Four& q_shape,
                           const Four& q_stride, const Four& k_shape, const Four& k_stride,
                           const Four& v_shape, const Four& v_stride, const Ints& options,
                           float scale, float softcap, const Ints& added) {
    const Heads h(heads_first, addresses, q_shape, q_stride, k_shape, k_stride, v_shape, v_stride);
    if (!h.fits || h.batch_k < h.batch) return false;
    gp::DecodeArgs a{};
    a.batch = h.batch, a.seqlen_q = h.seqlen_q, a.heads = h.heads;
    a.heads_k = h.heads_k, a.dim = h.dim, a.dim_v = h.dim_v;
    a.window_left = h.side(options.at(1)), a.window_right = h.side(options.at(2));
    a.num_splits = options.at(3), a.scale = scale, a.softcap = softcap;
    a.sinks = pointer_at<const float>(addresses, 4);
    a.dtype = static_cast<gp::DType>(options.at(4));
    a.q = h.q, a.out = h.out(addresses.at(3)), a.lse = pointer_at<float>(addresses, 5);
    gp::DecodeCache& c = a.cache;
    c.k = h.k, c.v = h.v, c.page_size = h.seqlen_k;
    c.dtype = static_cast<gp::DType>(options.at(5)), c.scale_batch = options.at(6);
    c.k_scale = pointer_at<const float>(addresses, 7);
    c.v_scale = pointer_at<const float>(addresses, 8);
    std::vector<int32_t> seqlens(h.batch, static_cast<int32_t>(options.at(0)));
    if (const int32_t* given = pointer_at<const int32_t>(addresses, 6))
      seqlens.assign(given, given + h.batch);
    c.seqlens = seqlens.data();
    std::vector<float> lse;
    if (a.lse == nullptr) {
      lse.resize(h.batch * h.heads * h.seqlen_q);
      a.lse = lse.data();
    }
    py::gil_scoped_release release;
    std::vector<uint32_t> turned;  // room for the rotated queries
    if (!added.empty()) {
      const int64_t rows = added.at(0);
      gp::DecodeAppendArgs n{};
      n.batch = a.batch, n.seqlen_q = a.seqlen_q, n.seqlen_new = rows, n.heads = a.heads;
      n.heads_k = a.heads_k, n.dim = a.dim, n.dim_v = a.dim_v, n.dtype = a.dtype, n.cache = c;
      n.k = dense(added.at(1), rows, a.heads_k, a.dim);
      n.v = dense(added.at(2), rows, a.heads_k, a.dim_v);
      n.cos = pointer_at<const void>(added, 3), n.sin = pointer_at<const void>(added, 4);
      if (n.cos) {
        n.rotary_dtype = static_cast<gp::DType>(added.at(5));
        n.rotary_half = added.at(6), n.interleaved = added.at(7), n.positions = c.seqlens;
        n.q_in_sequence = options.at(1) >= 0 || options.at(2) >= 0;
        turned.resize(a.batch * a.seqlen_q * a.heads * a.dim);
        n.q = a.q;
        a.q = n.q_out = dense(reinterpret_cast<std::uintptr_t>(turned.data()), a.seqlen_q, a.heads,
                              a.dim);
      }
      require_memory(GP_KERNEL(decode_append)(n));
      for (int32_t& length : seqlens) length += static_cast<int32_t>(rows);
    }
    int64_t keys = 0;
    for (const int32_t length : seqlens) keys += length;
    const bool few = h.heads_k * keys * h.dim <= ONE_THREAD;
    a.threads = few ? 1 : static_cast<int>(options.at(7));
    require_memory(GP_KERNEL(decode_attention)(a));
    return true;
  });
  // `sizes`: batch, seqlen_q, seqlen_new, heads, heads_k, dim, dim_v, dtype. `rotary`: cos, sin, their
  // dtype, rotary_half, interleaved, q_in_sequence, positions; or nothing.
  m.def("decode_append", [](const Ints& sizes, const Ints& k_cache, const Ints& v_cache,
                            const Ints& rest, const Ints& k, const Ints& v, const Ints& rotary,
                            const Ints& q, const Ints& q_out) {
    gp::DecodeAppendArgs a{};
    a.batch = sizes.at(0), a.seqlen_q = sizes.at(1), a.seqlen_new = sizes.at(2);
    a.heads = sizes.at(3), a.heads_k = sizes.at(4), a.dim = sizes.at(5), a.dim_v = sizes.at(6);
    a.dtype = static_cast<gp::DType>(sizes.at(7));
    a.cache = cache(k_cache, v_cache, rest);
    a.k = tensor4(k), a.v = tensor4(v);
    if (!rotary.empty()) {
      a.cos = pointer_at<const void>(rotary, 0), a.sin = pointer_at<const void>(rotary, 1);
      a.rotary_dtype = static_cast<gp::DType>(rotary.at(2));
      a.rotary_half = rotary.at(3), a.interleaved = rotary.at(4), a.q_in_sequence = rotary.at(5);
      a.positions = pointer_at<const int32_t>(rotary, 6);
      a.q = tensor4(q), a.q_out = tensor4(q_out);
    }
    py::gil_scoped_release release;
    require_memory(GP_KERNEL(decode_append)(a));
  });
}
