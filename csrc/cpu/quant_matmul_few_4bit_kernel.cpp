// nf4, fp4 and int4 weights against a few rows of x. What bounds it is how fast codes become numbers in
// registers: floats where x is float32, else integers where the row of x allows it
// (quant_matmul_fixed.h). x is laid out once, in the order in which they come. Whatever the number of
// rows, a row of x meets a row of W in the same order of operations.
#include "common/parallel.h"
#include "cpu/quant_matmul_chunk.h"
#include "cpu/quant_matmul_fixed.h"

namespace gp {
namespace GP_ISA {
namespace {

constexpr int64_t MAX_LAYOUT = int64_t(1) << 21;  // floats of one row of x in all its layouts
constexpr int MAX_ROWS = 4;  // rows of x that share one decoding in registers

// Scales of groups first..end-1 as floats, and zeros up to `count` of them.
void read_scales(const QuantWeight& w, int64_t first, int64_t end, int64_t count, float* out) {
  const int64_t there = end - first < count ? end - first : count;
  if (!w.nested_scale) {
    load_row(out, offset(w.scale, first, w.scale_dtype), there, w.scale_dtype);
  } else {
    const uint8_t* codes = static_cast<const uint8_t*>(w.scale) + first;
    const float* map = w.dynamic_map;
    const float shift = *w.scale_offset;
    for (int64_t i = 0; i < there;) {  // 256 scales share a nested one
      const float nested = w.nested_scale[(first + i) / 256];
      const int64_t stop = ((first + i) / 256 + 1) * 256 - first, last = stop < there ? stop : there;
      for (; i + 4 <= last; i += 4) {
        const float a = map[codes[i]], b = map[codes[i + 1]];
        const float c = map[codes[i + 2]], d = map[codes[i + 3]];
        out[i] = a * nested + shift;
        out[i + 1] = b * nested + shift;
        out[i + 2] = c * nested + shift;
        out[i + 3] = d * nested + shift;
      }
      for (; i < last; ++i) out[i] = map[codes[i]] * nested + shift;
    }
  }
  for (int64_t i = there; i < count; ++i) out[i] = 0.0f;
}

// --- one row of W --------------------------------------------------------------------------------

struct Row {
  const uint8_t* p;    // chunk 0
  const float* scale;
  Zeros zeros;
  int64_t phase;       // among the layouts of x
  int64_t chunks;
  int64_t into;        // weights of the first group that stand before chunk 0
  int64_t ahead;       // bytes from a weight to the one to prefetch
};

// Codes become floats. Two sums for each row of x, each four products long before it meets the scale:
// one of eight would keep too few chunks in flight, and more would cost more to add up.
struct FloatChunk {
  float x[CHUNK];
};
template <class Codec>
struct Floats {
  using X = FloatChunk;
  static constexpr int SUMS = 2;
  static constexpr float unit = 1.0f;
  struct Weights {
    vf w[8];
  };
  static int element(int i) { return Codec::element(i / VL, i % VL); }
  GP_INLINE void decode(const uint8_t* p, const Zeros& zeros, const Lanes& lanes, int64_t e,
                        Weights& w) const {
    codec.decode(p, zeros, lanes, e, w.w);
  }
  GP_INLINE static void multiply(const Weights& w, const X& x, vf scale, vf* acc) {
    vf even, odd;
    multiply_chunk(w.w, x.x, even, odd);
    acc[0] = v_fma(even, scale, acc[0]);
    acc[1] = v_fma(odd, scale, acc[1]);
  }
  Codec codec;
};

// sums[m] (Codec::SUMS vectors each) += chunks c0..c1-1 of the row times x, which begins with chunk c0.
template <int M, bool OneGroup, class Codec>
__attribute__((noinline)) void dot_piece(const Codec& codec, const Lanes& lanes, const Row& row,
                                         int64_t c0, int64_t c1, const typename Codec::X* x,
                                         int64_t x_stride, float* sums) {
  constexpr int SUMS = Codec::SUMS;
  vf acc[M][SUMS];
  for (int m = 0; m < M; ++m)
    for (int h = 0; h < SUMS; ++h) acc[m][h] = v_load(sums + (SUMS * m + h) * VL);
  const uint8_t* p = row.p + c0 * CHUNK_BYTES;
  for (int64_t c = c0; c < c1; ++c, p += CHUNK_BYTES, ++x) {
    prefetch(p + row.ahead);
    const int64_t e = c * CHUNK + row.into;
    typename Codec::Weights w;
    codec.decode(p, row.zeros, lanes, e, w);
    const vf scale = lanes.at<OneGroup>(row.scale, e);
    for (int m = 0; m < M; ++m) codec.multiply(w, x[m * x_stride], scale, acc[m]);
  }
  for (int m = 0; m < M; ++m)
    for (int h = 0; h < SUMS; ++h) v_store(sums + (SUMS * m + h) * VL, acc[m][h]);
}

template <bool OneGroup, class Codec>
void dot_piece(int64_t m, const Codec& codec, const Lanes& lanes, const Row& row, int64_t c0,
               int64_t c1, const typename Codec::X* x, int64_t x_stride, float* sums) {
  auto* f = m == 1 ? &dot_piece<1, OneGroup, Codec>
          : m == 2 ? &dot_piece<2, OneGroup, Codec>
          : m == 3 ? &dot_piece<3, OneGroup, Codec>
                   : &dot_piece<4, OneGroup, Codec>;
  f(codec, lanes, row, c0, c1, x, x_stride, sums);
}

int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x < high ? x : high; }
int64_t gcd(int64_t a, int64_t b) { return b == 0 ? a : gcd(b, a % b); }

// --- the whole product ---------------------------------------------------------------------------

// How rows of W and of x stand on the grid of chunks.
struct Grid {
  // Rows of int4 begin with a chunk. A book's chunks stand on the grid of the flat array, where row r
  // begins r*k % CHUNK weights into a chunk: x is laid out once for each such phase, with zeros
  // where a chunk reaches into other rows.
  explicit Grid(const QuantWeight& w)
      : flat(has_book(w.format)),
        k(w.k),
        step(flat ? gcd(w.k, CHUNK) : CHUNK),
        phases(CHUNK / step),
        chunks((w.k + CHUNK - step + CHUNK - 1) / CHUNK),
        g(w.group_size > 0 ? w.group_size : int64_t(1) << 48),
        row_groups((w.k + g - 1) / g),
        row_bytes((w.k + 1) / 2),
        bytes(flat ? (w.n * w.k + 1) / 2 : w.n * row_bytes),
        groups(flat ? (w.n * w.k + g - 1) / g : w.n * row_groups) {}
  int64_t first(int64_t r) const { return flat ? r * k / CHUNK * CHUNK : 0; }
  int64_t phase(int64_t r) const { return flat ? r * k % CHUNK : 0; }

  bool flat;
  int64_t k, step, phases, chunks, g, row_groups, row_bytes, bytes, groups;
};

// Rows of x as a codec takes them, at most `room`, chunk by chunk for each phase. A row of x may be the
// sum of several of them, which follow each other.
template <class Codec>
struct PackedX {
  using X = typename Codec::X;
  PackedX(const Grid& grid, int64_t room)
      : room(room), stride(grid.chunks), chunks(grid.phases * room * grid.chunks * int64_t(sizeof(X))) {
    for (int i = 0; i < CHUNK; ++i) order[i] = Codec::element(i);
  }
  X* at(int64_t phase, int64_t row) const { return chunks.as<X>() + (phase * room + row) * stride; }
  void add(int64_t row_of_x) { of[rows++] = row_of_x; }

  int64_t room, stride, rows = 0;
  int64_t of[2 * QUANT_MATMUL_FEW_ROWS];  // the row of x of each
  int order[CHUNK];
  Scratch chunks;
};

// f(phase, c, x): the columns of each chunk of a row of x, with zeros where it reaches into other rows.
template <class F>
void each_chunk(const Grid& grid, const float* row, F&& f) {
  for (int64_t phase = 0; phase < grid.phases; ++phase)
    for (int64_t c = 0; c < grid.chunks; ++c) {
      const int64_t first = c * CHUNK - phase * grid.step;
      if (first >= 0 && first + CHUNK <= grid.k) {
        f(phase, c, row + first);
        continue;
      }
      float part[CHUNK];
      for (int e = 0; e < CHUNK; ++e) {
        const int64_t at = first + e;
        part[e] = at >= 0 && at < grid.k ? row[at] : 0.0f;
      }
      f(phase, c, part);
    }
}

template <class Codec>
void pack_floats(const Grid& grid, const float* row, int64_t row_of_x, PackedX<Codec>& out) {
  each_chunk(grid, row, [&](int64_t phase, int64_t c, const float* x) {
    float* to = out.at(phase, out.rows)[c].x;
    for (int e = 0; e < CHUNK; ++e) to[e] = x[out.order[e]];
  });
  out.add(row_of_x);
}

#if defined(__AVX2__)
// Whether the row may go as integers, which are then in `out`.
template <class Codec>
bool pack_fixed(const Grid& grid, const float* row, DType dtype, int64_t row_of_x,
                PackedX<Codec>& out) {
  for (int terms = 1; terms <= MAX_TERMS; ++terms) {
    Loss loss;
    bool finite = true;
    each_chunk(grid, row, [&](int64_t phase, int64_t c, const float* x) {
      finite = finite && fix_chunk(x, out.order, terms, tolerance(dtype), out.at(phase, out.rows) + c,
                                   out.stride, loss);
    });
    if (!finite) return false;
    if (!loss.bearable()) continue;
    for (int t = 0; t < terms; ++t) out.add(row_of_x);
    return true;
  }
  return false;
}
#endif

// The rows of y that belong to those of x.
template <bool HasZero, bool OneGroup, class Codec>
bool run(const QuantMatmulArgs& a, const Grid& grid, const Lanes& lanes, const PackedX<Codec>& x) {
  if (x.rows == 0) return true;
  constexpr int SUMS = Codec::SUMS;
  const QuantWeight& w = a.w;
  const int64_t n = w.n, m = x.rows;
  // One thread decodes so many in 15 us; waking another takes as long.
  const int threads = n * grid.k < (1 << 18) ? 1 : a.threads;
  // Rows of W in one item: some 256 KiB. What is asked for ahead of an item goes to the wrong thread.
  const int64_t rows = clamp((1 << 18) / grid.row_bytes, 1, clamp(n / (2 * threads), 1, 256));
  // Pieces of columns, so that the x of all rows takes half of a first-level cache.
  const int64_t piece = 16384 / int64_t(sizeof(typename Codec::X)) / m;
  const int64_t pieces = (grid.chunks + piece - 1) / piece;
  const int64_t ahead = pieces == 1 ? 8192 : grid.row_bytes * 2 * m;
  // Scales and zero points of a row, with room for the last load of lanes.
  const int64_t buffer = (grid.chunks * CHUNK / grid.g + 2 + VL + 15) / 16 * 16;
  const bool plain_scales = OneGroup && !w.nested_scale && w.scale_dtype == DType::f32;
  const int64_t row_floats = SUMS * m * VL + (plain_scales ? 0 : buffer) + (OneGroup ? 0 : buffer);

  Scratch floats(threads * rows * row_floats * 4), heads(threads * rows * int64_t(sizeof(Row)));
  Scratch tail((grid.chunks + 1) * CHUNK_BYTES);
  if (!floats.ok() || !heads.ok() || !tail.ok()) return false;
  // The bytes may end before the last chunk does: the last rows are read from a copy.
  const int64_t copied = clamp(grid.chunks * CHUNK_BYTES, 0, grid.bytes);
  std::memset(tail.as<uint8_t>() + copied, 0, size_t((grid.chunks + 1) * CHUNK_BYTES - copied));
  std::memcpy(tail.as<uint8_t>(), w.qdata + grid.bytes - copied, size_t(copied));

  const Codec codec;
  parallel_for((n + rows - 1) / rows, threads, [&](int64_t item, int thread) {
    const KeepSubnormals keep;
    Row* row = heads.as<Row>() + thread * rows;
    float* sums = floats.as<float>() + thread * rows * row_floats;
    float* scales = sums + rows * SUMS * m * VL;
    float* zeros = scales + (plain_scales ? 0 : rows * buffer);
    const int64_t r0 = item * rows, count = clamp(n - r0, 0, rows);
    std::memset(sums, 0, size_t(count * SUMS * m * VL) * 4);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t first = grid.first(r0 + r), phase = grid.phase(r0 + r);
      const int64_t group = grid.flat ? first / grid.g : (r0 + r) * grid.row_groups;
      const int64_t end = grid.flat ? grid.groups : group + grid.row_groups;
      const int64_t at = grid.flat ? first / 2 : (r0 + r) * grid.row_bytes;
      const int64_t chunks = (phase + grid.k + CHUNK - 1) / CHUNK;
      Row& head = row[r];
      head.p = at + chunks * CHUNK_BYTES <= grid.bytes
          ? w.qdata + at : tail.as<uint8_t>() + at - (grid.bytes - copied);
      head.scale = plain_scales ? static_cast<const float*>(w.scale) + group : scales + r * buffer;
      head.zeros = {HasZero ? w.zero_point + group : nullptr, zeros + r * buffer};
      head.chunks = chunks;
      head.phase = phase / grid.step;
      head.into = first % grid.g;
      head.ahead = ahead;
      if (!plain_scales) read_scales(w, group, end, buffer, scales + r * buffer);
      for (int64_t i = 0; HasZero && !OneGroup && i < buffer; ++i)
        zeros[r * buffer + i] = group + i < end ? float(w.zero_point[group + i]) : 0.0f;
    }
    for (int64_t c0 = 0; c0 < grid.chunks; c0 += piece)
      for (int64_t r = 0; r < count; ++r) {
        const int64_t c1 = clamp(c0 + piece, 0, row[r].chunks);
        for (int64_t m0 = 0; m0 < m && c0 < c1; m0 += MAX_ROWS)
          dot_piece<OneGroup>(m - m0, codec, lanes, row[r], c0, c1,
                              x.at(row[r].phase, m0) + c0, x.stride,
                              sums + (r * m + m0) * SUMS * VL);
      }
    for (int64_t r = 0; r < count; ++r) {
      const float bias = a.bias ? load_one(a.bias, r0 + r, a.bias_dtype) : 0.0f;
      for (int64_t i = 0; i < m;) {
        const float* sum = sums + (r * m + i) * SUMS * VL;
        const int64_t of = x.of[i];
        vf total = v_load(sum);
        for (int64_t h = 1; h < SUMS; ++h) total = v_add(total, v_load(sum + h * VL));
        for (++i; i < m && x.of[i] == of; ++i)
          total = v_add(total, v_load(sums + (r * m + i) * SUMS * VL));
        store_one(a.y, of * n + r0 + r, v_sum(total) * Codec::unit + bias, a.dtype);
      }
    }
  });
  return true;
}

template <bool HasZero, bool OneGroup, class Float, class Fixed>
bool multiply(const QuantMatmulArgs& a, const Grid& grid, const Lanes& lanes) {
  PackedX<Floats<Float>> floats(grid, a.m);
  Scratch row(grid.k * 4);
#if defined(__AVX2__)
  const bool rounds = a.dtype != DType::f32;
  PackedX<Fixed> fixed(grid, rounds ? MAX_TERMS * a.m : 0);
  if (!fixed.chunks.ok()) return false;
#endif
  if (!floats.chunks.ok() || !row.ok()) return false;
  {
    const KeepSubnormals keep;
    for (int64_t m = 0; m < a.m; ++m) {
      load_row(row.as<float>(), offset(a.x, m * grid.k, a.dtype), grid.k, a.dtype);
#if defined(__AVX2__)
      if (rounds && pack_fixed(grid, row.as<float>(), a.dtype, m, fixed)) continue;
#endif
      pack_floats(grid, row.as<float>(), m, floats);
    }
  }
#if defined(__AVX2__)
  if (!run<HasZero, OneGroup>(a, grid, lanes, fixed)) return false;
#endif
  return run<HasZero, OneGroup>(a, grid, lanes, floats);
}

template <bool HasZero, bool OneGroup>
bool multiply(const QuantMatmulArgs& a, const Grid& grid, const Lanes& lanes) {
  using Int4 = Int4Codec<HasZero, OneGroup>;
  if (HasZero || !grid.flat)
    return multiply<HasZero, OneGroup, Int4, FixedInt4<HasZero, OneGroup>>(a, grid, lanes);
  if (a.w.format == QuantFormat::fp4)
    return multiply<HasZero, OneGroup, BookCodec<true>, FixedBook<true>>(a, grid, lanes);
  return multiply<HasZero, OneGroup, BookCodec<false>, FixedBook<false>>(a, grid, lanes);
}

}  // namespace

bool quant_matmul_few_4bit(const QuantMatmulArgs& a) {
  const Grid grid(a.w);
  // A long odd k needs x laid out in as many ways as a chunk has weights; not for any number of rows,
  // so that the order of summation never depends on it.
  if (grid.phases * grid.chunks * CHUNK > MAX_LAYOUT) return quant_matmul_many(a);
  const Lanes lanes(grid.g);
  if (lanes.one_group())
    return a.w.zero_point ? multiply<true, true>(a, grid, lanes) : multiply<false, true>(a, grid, lanes);
  return a.w.zero_point ? multiply<true, false>(a, grid, lanes) : multiply<false, false>(a, grid, lanes);
}

}  // namespace GP_ISA
}  // namespace gp
