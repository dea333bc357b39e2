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
  // A contiguous cache of q's type. `addresses`: q, k, v, out, then sinks, lse and seqlens or 0: none,
  // not given back, `keys` of every sequence. `options`: keys, window_left, window_right, num_splits,
  // dtype, threads. Returns false, with nothing done, where shapes or strides do not fit.
  m.def("decode_whole", [](bool heads_first, const Ints& addresses, const Four& q_shape,
                           const Four& q_stride, const Four& k_shape, const Four& k_stride,
                           const Four& v_shape, const Four& v_stride, const Ints& options,
                           float scale, float softcap) {
    const Heads h(heads_first, addresses, q_shape, q_stride, k_shape, k_stride, v_shape, v_stride);
    const int64_t keys = options.at(0);
    if (!h.fits || h.batch_k < h.batch) return false;
    gp::DecodeArgs a{};
    a.batch = h.batch, a.seqlen_q = h.seqlen_q, a.heads = h.heads;
    a.heads_k = h.heads_k, a.dim = h.dim, a.dim_v = h.dim_v;
    a.window_left = h.side(options.at(1)), a.window_right = h.side(options.at(2));
    a.num_splits = options.at(3), a.scale = scale, a.softcap = softcap;
    a.sinks = pointer_at<const float>(addresses, 4);
    a.dtype = a.cache.dtype = static_cast<gp::DType>(options.at(4));
    const bool few = h.batch * h.heads_k * keys * h.dim <= ONE_THREAD;
    a.threads = few ? 1 : static_cast<int>(options.at(5));
    a.q = h.q, a.cache.k = h.k, a.cache.v = h.v, a.cache.page_size = keys;
    a.out = h.out(addresses.at(3)), a.lse = pointer_at<float>(addresses, 5);
    a.cache.seqlens = pointer_at<const int32_t>(addresses, 6);
    std::vector<int32_t> seqlens;
    if (a.cache.seqlens == nullptr) {
      seqlens.assign(h.batch, static_cast<int32_t>(keys));
      a.cache.seqlens = seqlens.data();
    }
    std::vector<float> lse;
    if (a.lse == nullptr) {
      lse.resize(h.batch * h.heads * h.seqlen_q);
      a.lse = lse.data();
    }
    py::gil_scoped_release release;
    require_memory(GP_KERNEL(decode_attention)(a));
    return true;
  });
  // `sizes`: batch, seqlen_q, seqlen_new, heads, heads_k, dim, dim_v, dtype. `rotary`: cos, sin,
  // rotary_half, interleaved, q_in_sequence, positions; or nothing.
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
      a.cos = pointer_at<const float>(rotary, 0), a.sin = pointer_at<const float>(rotary, 1);
      a.rotary_half = rotary.at(2), a.interleaved = rotary.at(3), a.q_in_sequence = rotary.at(4);
      a.positions = pointer_at<const int32_t>(rotary, 5);
      a.q = tensor4(q), a.q_out = tensor4(q_out);
    }
    py::gil_scoped_release release;
    require_memory(GP_KERNEL(decode_append)(a));
  });
}
