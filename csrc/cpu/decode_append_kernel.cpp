// New keys and values into the cache, in place: rotated, converted to the type of the cache.
//
// The arithmetic is fp32, each operation rounded by itself, so that the bytes written are those of the
// reference in torch.
#include "common/parallel.h"
#include "cpu/decode_attention_tile.h"

namespace gp {
namespace GP_ISA {
namespace {

uint8_t float_to_e4m3(float x) {  // saturating, half to even; NaN stays
  const uint32_t u = float_to_bits(x), sign = (u >> 24) & 0x80u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint8_t(sign | 0x7fu);
  if (magnitude >= 0x43e00000u) return uint8_t(sign | 0x7eu);  // 448 and beyond
  if (magnitude < 0x3c800000u)  // below 2^-6: steps of 2^-9, rounded by an addition
    return uint8_t(sign | (float_to_bits(bits_to_float(magnitude) + 0x1p14f) & 0xfu));
  return uint8_t(sign | ((magnitude - 0x3c000000u + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20));
}

// x (dim floats) to the first element of a cache row.
void store_cache(void* data, int64_t at, float* x, int64_t dim, DType type, float scale) {
  if (type != DType::i8 && type != DType::f8e4m3fn)
    return store_row(offset(data, at, type), x, dim, type);
  uint8_t* out = static_cast<uint8_t*>(data) + at;
  for (int64_t d = 0; d < dim; ++d) {
    const float y = x[d] / scale;
    if (type == DType::f8e4m3fn) {
      out[d] = float_to_e4m3(y);
    } else {
      const float n = __builtin_nearbyintf(y < -127.0f ? -127.0f : y > 127.0f ? 127.0f : y);
      out[d] = uint8_t(int8_t(n == n ? n : 0.0f));
    }
  }
}

// The rotation of one position.
struct Rotation {
  const DecodeAppendArgs& a;
  float *cos, *sin;

  Rotation(const DecodeAppendArgs& args, float* memory)
      : a(args), cos(memory), sin(memory + args.rotary_half) {}
  void at(int64_t position) const {
    const int64_t from = position * a.rotary_half;
    load_row(cos, offset(a.cos, from, a.rotary_dtype), a.rotary_half, a.rotary_dtype);
    load_row(sin, offset(a.sin, from, a.rotary_dtype), a.rotary_half, a.rotary_dtype);
  }
  void turn(float* x) const {
    for (int64_t d = 0; d < a.rotary_half; ++d) {
      float* first = a.interleaved ? x + 2 * d : x + d;
      float* second = a.interleaved ? first + 1 : first + a.rotary_half;
      const float u = *first, v = *second;
      *first = u * cos[d] - v * sin[d];
      *second = u * sin[d] + v * cos[d];
    }
  }
};

const void* row_of(const Tensor4& t, int64_t b, int64_t i, int64_t h, DType type) {
  return offset(static_cast<const void*>(t.data), b * t.batch + i * t.seq + h * t.head, type);
}

}  // namespace

bool decode_append(const DecodeAppendArgs& a) {
  const int64_t dim = a.dim > a.dim_v ? a.dim : a.dim_v;
  Scratch memory((dim + 2 * a.rotary_half) * 4);
  if (!memory.ok()) return false;
  float* x = memory.as<float>();
  const Rotation rotation(a, x + dim);
  const DecodeCache& c = a.cache;
  for (int64_t b = 0; b < a.batch; ++b)
    for (int64_t i = 0; i < a.seqlen_new; ++i) {
      const int64_t position = c.seqlens[b] + i;
      int64_t page = c.batch_idx ? c.batch_idx[b] : b, slot = position;
      if (c.block_table) {
        page = c.block_table[b * c.table_stride + position / c.page_size];
        slot = position % c.page_size;
      }
      if (a.cos) rotation.at(a.positions[b] + i);
      for (int64_t h = 0; h < a.heads_k; ++h) {
        const int64_t scale = b * c.scale_batch + h;
        load_row(x, row_of(a.k, b, i, h, a.dtype), a.dim, a.dtype);
        if (a.cos) rotation.turn(x);
        store_cache(c.k.data, page * c.k.batch + slot * c.k.seq + h * c.k.head, x, a.dim, c.dtype,
                    c.k_scale ? c.k_scale[scale] : 1.0f);
        load_row(x, row_of(a.v, b, i, h, a.dtype), a.dim_v, a.dtype);
        store_cache(c.v.data, page * c.v.batch + slot * c.v.seq + h * c.v.head, x, a.dim_v, c.dtype,
                    c.v_scale ? c.v_scale[scale] : 1.0f);
      }
    }
  if (!a.cos) return true;
  for (int64_t b = 0; b < a.batch; ++b)
    for (int64_t i = 0; i < a.seqlen_q; ++i) {
      rotation.at(a.positions[b] + (a.q_in_sequence ? i : 0));
      for (int64_t h = 0; h < a.heads; ++h) {
        load_row(x, row_of(a.q, b, i, h, a.dtype), a.dim, a.dtype);
        rotation.turn(x);
        store_row(const_cast<void*>(row_of(a.q_out, b, i, h, a.dtype)), x, a.dim, a.dtype);
      }
    }
  return true;
}

}  // namespace GP_ISA
}  // namespace gp
