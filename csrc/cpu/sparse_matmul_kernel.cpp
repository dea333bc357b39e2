// A sparse weight against a few rows of x, bound by memory; and sparse rows decoded to fp32, for
// products with many rows and for gradients. Whatever the number of rows of x or W taken together, a
// product of two rows is one vector sum over each scale's columns (512 where there is one scale),
// these sums times their scale added up in order.
#include "common/parallel.h"
#include "cpu/sparse_int4_rows.h"

namespace gp {
namespace GP_ISA {
namespace {

constexpr int MAX_ROWS = 4;         // rows of x that share one expansion
constexpr int64_t SPAN = 512 / UNIT;
constexpr int64_t LINE = 8;         // units between two prefetches
constexpr int64_t SLACK = 64;       // bytes that may be read after the last value

int64_t at_most(int64_t x, int64_t high) { return x < high ? x : high; }

// sums[r][m] (a unit each) += units 0..count-1 of R rows of W times M rows of x; moves the cursors.
template <SparseValue Kind, bool TwoFour, int R, int M>
void dot(Cursor* rows, int64_t count, int64_t span, const float* x, int64_t x_stride, float* sums,
         int64_t sums_stride) {
  constexpr int W = value_width(Kind);
  const uint8_t* v[R];
  const uint8_t* index[R];
  for (int r = 0; r < R; ++r) {
    v[r] = rows[r].v;
    index[r] = rows[r].index;
  }
  for (int64_t u0 = 0, group = 0; u0 < count; u0 += span, ++group) {
    const int64_t end = u0 + span < count ? u0 + span : count;
    Unit acc[R][M];
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) acc[r][m] = unit_zero();
    const auto step = [&](int64_t u) GP_INLINE {
      for (int r = 0; r < R; ++r) {
        const uint8_t byte = index[r][u];
        const Unit w = expand<Kind, TwoFour>(v[r], byte);
        v[r] += W * count_of(TwoFour, byte);
        for (int m = 0; m < M; ++m)
          acc[r][m] = unit_fma(w, unit_load(x + m * x_stride + u * UNIT), acc[r][m]);
      }
    };
    int64_t u = u0;
    for (; u + LINE <= end; u += LINE) {
      for (int r = 0; r < R; ++r) {
        prefetch(v[r] + rows[r].v_ahead);
        prefetch(index[r] + u + rows[r].index_ahead);
      }
      for (int64_t i = 0; i < LINE; ++i) step(u + i);
    }
    for (; u < end; ++u) step(u);
    add_sums<R, M>(rows, acc, group, sums, sums_stride);
  }
  for (int r = 0; r < R; ++r) {
    rows[r].v = v[r];
    rows[r].index += count;
  }
}

using Dot = void (*)(Cursor*, int64_t, int64_t, const float*, int64_t, float*, int64_t);

template <SparseValue Kind, bool TwoFour>
Dot choose(int64_t rows, int64_t m) {
  if (m == 1)
    return rows == 4 ? &dot<Kind, TwoFour, 4, 1>
         : rows == 2 ? &dot<Kind, TwoFour, 2, 1> : &dot<Kind, TwoFour, 1, 1>;
  if (m == 2) return rows == 2 ? &dot<Kind, TwoFour, 2, 2> : &dot<Kind, TwoFour, 1, 2>;
  if (m == 3) return rows == 2 ? &dot<Kind, TwoFour, 2, 3> : &dot<Kind, TwoFour, 1, 3>;
  return rows == 2 ? &dot<Kind, TwoFour, 2, 4> : &dot<Kind, TwoFour, 1, 4>;
}

// Where row r's values begin: bytes, or 4-bit codes.
int64_t start_of(const SparseWeight& w, int64_t r, int64_t units) {
  const int64_t first = w.row_start ? w.row_start[r] : r * units * 4;
  return w.kind == SparseValue::i4 ? first
      : first * (w.kind == SparseValue::f32 ? 4 : w.kind == SparseValue::i8 ? 1 : 2);
}

// A copy of the end of the values with SLACK behind it, for the rows that a vector would overread.
class Tail {
 public:
  Tail(const SparseWeight& w, int64_t longest)
      : w_(w), held_(at_most(w.value_bytes, longest)), copy_(held_ + SLACK) {
    if (!copy_.ok()) return;
    std::memcpy(copy_.as<uint8_t>(), w.values + w.value_bytes - held_, size_t(held_));
    std::memset(copy_.as<uint8_t>() + held_, 0, SLACK);
  }
  bool ok() const { return copy_.ok(); }
  // The byte at `at`, of a row that ends at byte `end`.
  const uint8_t* at(int64_t at, int64_t end) const {
    return end + SLACK <= w_.value_bytes ? w_.values + at
                                         : copy_.as<uint8_t>() + at - (w_.value_bytes - held_);
  }

 private:
  const SparseWeight& w_;
  int64_t held_;
  Scratch copy_;
};

template <SparseValue Kind, bool TwoFour>
bool run(const SparseMatmulArgs& a) {
  const SparseWeight& w = a.w;
  const int64_t n = w.n, k = w.k, m = a.m, units = (k + UNIT - 1) / UNIT;
  const bool nibbles = w.kind == SparseValue::i4;
  const bool grouped = w.scale && w.group_size > 0 && w.group_size < k;
  const int64_t stride = (units + units % 2) * UNIT;  // of the rows of x
  const int64_t groups = grouped ? (k + w.group_size - 1) / w.group_size : 1;
  const int64_t span = grouped ? w.group_size / UNIT : SPAN;
  const bool pairs = HAS_INT4_PAIRS && TwoFour && nibbles && span % 2 == 0;
  const int threads = n * k < 65536 ? 1 : a.threads;
  int64_t rows = 4;
  while (rows < 128 && rows * k < 131072 && rows * 4 * threads < n) rows *= 2;
  // Pieces of columns, so that the x of all rows takes half of a first-level cache; groups whole.
  int64_t piece = 4096 / UNIT / m;
  if (grouped) piece = piece > span ? piece / span * span : span;
  else piece = (piece + SPAN - 1) / SPAN * SPAN;
  const int64_t buffer = nibbles && !pairs ? (at_most(piece, units) * UNIT + 2 + SLACK + 63) / 64 * 64 : 0;
  const int64_t sums_stride = m * UNIT;

  Scratch packed(m * stride * 4 + 64), totals(threads * rows * sums_stride * 4 + 64);
  Scratch scales(threads * 4 * groups * 4 + 64), codes(threads * 4 * buffer + 64);
  Scratch cursors(threads * rows * 8 + 64);
  const Tail tail(w, units * UNIT * 4 + SLACK);
  if (!packed.ok() || !totals.ok() || !scales.ok() || !codes.ok() || !cursors.ok() || !tail.ok())
    return false;
  float* x = packed.as<float>();
  for (int64_t r = 0; r < m; ++r) {
    load_row(x + r * stride, offset(a.x, r * k, a.dtype), k, a.dtype);
    for (int64_t i = k; i < stride; ++i) x[r * stride + i] = 0.0f;
  }

  parallel_for((n + rows - 1) / rows, threads, [&](int64_t item, int thread) {
    const KeepSubnormals keep;
    float* sums = totals.as<float>() + thread * rows * sums_stride;
    float* scale = scales.as<float>() + thread * 4 * groups;
    uint8_t* code = codes.as<uint8_t>() + thread * 4 * buffer;
    int64_t* position = cursors.as<int64_t>() + thread * rows;
    const int64_t r0 = item * rows, count = at_most(n - r0, rows);
    std::memset(sums, 0, size_t(count * sums_stride) * 4);
    for (int64_t r = 0; r < count; ++r) position[r] = start_of(w, r0 + r, units);
    const int64_t whole = m == 1 ? 4 : 2;
    for (int64_t u0 = 0; u0 < units; u0 += piece) {
      const int64_t used = at_most(piece, units - u0);
      for (int64_t r = 0, step; r < count; r += step) {
        step = r + whole <= count ? whole : 1;
        Cursor cursor[4];
        for (int64_t i = 0; i < step; ++i) {
          const int64_t row = r0 + r + i;
          Cursor& c = cursor[i];
          c.index = w.index + row * units + u0;
          c.index_ahead = step * units;
          c.scale = nullptr;
          if (grouped) {
            const int64_t first = u0 / span, there = (used + span - 1) / span;
            load_row(scale + i * groups, offset(w.scale, row * groups + first, w.scale_dtype), there,
                     w.scale_dtype);
            c.scale = scale + i * groups;
          }
          const int64_t end = start_of(w, row + 1, units);
          if (pairs) {
            c.v = tail.at(position[r + i] / 2, end / 2);
            c.v_ahead = step * units * 2;
          } else if (nibbles) {
            int64_t values = used * 4;
            if (!TwoFour) {
              values = 0;
              for (int64_t u = 0; u < used; ++u) values += __builtin_popcount(c.index[u]);
            }
            const int64_t first = position[r + i] / 2, odd = position[r + i] % 2;
            unpack_nibbles(tail.at(first, end / 2), (values + odd + 1) / 2, code + i * buffer);
            prefetch(w.values + first + (end - position[r + i]) * step / 2);
            c.v = code + i * buffer + odd;
            c.v_ahead = 0;
          } else {
            c.v = tail.at(position[r + i], end);
            c.v_ahead = (end - start_of(w, row, units)) * step;
          }
        }
        for (int64_t m0 = 0; m0 < m; m0 += MAX_ROWS) {
          Cursor moved[4];
          for (int64_t i = 0; i < step; ++i) moved[i] = cursor[i];
          const float* first = x + m0 * stride + u0 * UNIT;
          float* sum = sums + r * sums_stride + m0 * UNIT;
          if (pairs) {
            choose_int4(step, m - m0)(cursor, used, span, first, stride, sum, sums_stride);
            for (int64_t i = 0; i < step; ++i) moved[i].v += used * 4;  // codes
          } else {
            choose<Kind, TwoFour>(step, m - m0)(moved, used, span, first, stride, sum, sums_stride);
          }
          if (m0 + MAX_ROWS >= m)
            for (int64_t i = 0; i < step; ++i) position[r + i] += moved[i].v - cursor[i].v;
        }
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      const float factor = w.scale && !grouped ? load_one(w.scale, r0 + r, w.scale_dtype) : 1.0f;
      const float bias = a.bias ? load_one(a.bias, r0 + r, a.bias_dtype) : 0.0f;
      for (int64_t i = 0; i < m; ++i) {
        float lane[UNIT];
        unit_store(lane, unit_load(sums + r * sums_stride + i * UNIT));
        for (int width = UNIT / 2; width; width /= 2)
          for (int j = 0; j < width; ++j) lane[j] += lane[j + width];
        store_one(a.y, i * n + r0 + r, lane[0] * factor + bias, a.dtype);
      }
    }
  });
  return true;
}

template <SparseValue Kind, bool TwoFour>
bool decode(const SparseDecodeArgs& a) {
  const SparseWeight& w = a.w;
  const int64_t k = w.k, units = (k + UNIT - 1) / UNIT;
  const bool nibbles = w.kind == SparseValue::i4;
  const int64_t group = w.group_size > 0 ? w.group_size : (k > 0 ? units * UNIT : UNIT);
  const int64_t groups = (k + group - 1) / group, buffer = units * UNIT + 2 + SLACK;
  Scratch codes(nibbles ? a.threads * buffer : 64);
  const Tail tail(w, units * UNIT * 4 + SLACK);
  if (!codes.ok() || !tail.ok()) return false;
  constexpr int W = value_width(Kind);
  parallel_for(a.r1 - a.r0, a.threads, [&](int64_t item, int thread) {
    const KeepSubnormals keep;
    const int64_t row = a.r0 + item, first = start_of(w, row, units);
    const int64_t end = start_of(w, row + 1, units);
    const uint8_t* v;
    if (nibbles) {
      uint8_t* code = codes.as<uint8_t>() + thread * buffer;
      unpack_nibbles(tail.at(first / 2, end / 2), (end - first) / 2, code);
      v = code;
    } else {
      v = tail.at(first, end);
    }
    float* out = a.out + item * k;
    for (int64_t u = 0; u < units; ++u) {
      const uint8_t byte = w.index[row * units + u];
      Unit value = expand<Kind, TwoFour>(v, byte);
      v += W * count_of(TwoFour, byte);
      if (w.scale)
        value = unit_mul(value, unit_set(load_one(w.scale, row * groups + u * UNIT / group,
                                                  w.scale_dtype)));
      if (u * UNIT + UNIT <= k) {
        unit_store(out + u * UNIT, value);
      } else {
        float lane[UNIT];
        unit_store(lane, value);
        std::memcpy(out + u * UNIT, lane, size_t(k - u * UNIT) * 4);
      }
    }
  });
  return true;
}

template <class Args, bool (*F32)(const Args&), bool (*BF16)(const Args&), bool (*F16)(const Args&),
          bool (*I8)(const Args&)>
bool by_kind(const Args& a) {
  switch (a.w.kind) {
    case SparseValue::f32: return F32(a);
    case SparseValue::bf16: return BF16(a);
    case SparseValue::f16: return F16(a);
    default: return I8(a);
  }
}

}  // namespace

bool sparse_matmul_few(const SparseMatmulArgs& a) {
  using V = SparseValue;
  if (comes_in_eights(a.w)) return run_eights(a);
  return a.w.row_start
      ? by_kind<SparseMatmulArgs, run<V::f32, false>, run<V::bf16, false>, run<V::f16, false>,
                run<V::i8, false>>(a)
      : by_kind<SparseMatmulArgs, run<V::f32, true>, run<V::bf16, true>, run<V::f16, true>,
                run<V::i8, true>>(a);
}

bool sparse_decode(const SparseDecodeArgs& a) {
  using V = SparseValue;
  return a.w.row_start
      ? by_kind<SparseDecodeArgs, decode<V::f32, false>, decode<V::bf16, false>,
                decode<V::f16, false>, decode<V::i8, false>>(a)
      : by_kind<SparseDecodeArgs, decode<V::f32, true>, decode<V::bf16, true>, decode<V::f16, true>,
                decode<V::i8, true>>(a);
}

}  // namespace GP_ISA
}  // namespace gp
