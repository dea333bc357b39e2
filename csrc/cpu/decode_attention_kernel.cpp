// Decode attention: few queries, a long cache, split into parts of keys whose results are merged.
//
// An item is a part of one sequence's keys for some of its key heads and all the queries of these
// heads, so that the cache is read once. It goes through its keys block by block with an online
// softmax and leaves unnormalised sums; the second pass merges the parts of each row in their order.
//
// Within a block the heads of a few keys follow each other, as they lie in memory, and rows are
// fetched AHEAD_BYTES before their use. A row read once from the second-level cache costs nothing
// beside the arithmetic; rows of one head, a power of two apart, would share a few cache sets.
#include "common/parallel.h"
#include "cpu/decode_attention_float8.h"
#include "cpu/decode_attention_int8.h"
#include "cpu/decode_attention_softmax.h"

namespace gp {
namespace GP_ISA {
namespace {

template <int N>
struct Constant {
  static constexpr int value = N;
};

// INTEGER: queries and weights are int16 (decode_attention_int8.h).
template <DType T, bool K_FITS, bool V_FITS, bool INTEGER>
struct Item {
  // The types that the tiles read: float8 by way of fp16, and what the vectors do not divide as floats.
  static constexpr bool FLOAT8 = T == DType::f8e4m3fn;
  static constexpr DType AS = FLOAT8 ? DType::f16 : T;
  static constexpr DType K = K_FITS ? AS : DType::f32, V = V_FITS ? AS : DType::f32;
  static constexpr float K_UNIT = FLOAT8 && K_FITS ? FLOAT8_UNIT : 1.0f;
  static constexpr float V_UNIT = FLOAT8 && V_FITS ? FLOAT8_UNIT : 1.0f;
  static constexpr int bytes = FLOAT8 ? 1 : Element<AS>::bytes;
  const Plan& p;
  const DecodeArgs& a;
  const Bench& w;
  int64_t b, head0, heads, row0, rows, lanes_of_head, ahead;
  Span span;
  Lane lane[MAX_LANES];
  // This block of keys and those that are fetched meanwhile.
  const char *keys[BLOCK + MAX_AHEAD], *values[BLOCK + MAX_AHEAD];

  Item(const Plan& plan, const Bench& bench, int64_t batch, int64_t first_head, int64_t first_row)
      : p(plan), a(plan.a), w(bench), b(batch), head0(first_head),
        heads(min64(plan.heads_chunk, plan.a.heads_k - first_head)), row0(first_row),
        rows(min64(MAX_ROWS, plan.rows - first_row)), lanes_of_head(plan.lanes_of_head()),
        span(plan.a, batch) {
    const int64_t of_key = heads * max64(a.dim, a.dim_v) * bytes;
    ahead = min64(max64(AHEAD_BYTES / of_key, VALUE_KEYS), MAX_AHEAD);
    for (int64_t l = 0; l < heads * lanes_of_head; ++l) {
      const int64_t row = row0 + min64(l % lanes_of_head, rows - 1);
      const int64_t head = (head0 + l / lanes_of_head) * p.group + row % p.group;
      lane[l] = {row / p.group, a.alibi_slopes ? a.alibi_slopes[b * a.alibi_batch + head] : 0.0f};
    }
  }

  float scale_of(const float* scales, int64_t head_k) const {
    return scales ? scales[b * a.cache.scale_batch + head_k] : 1.0f;
  }

  // Queries times their scales, in the order of lanes of the keys; zeros as padding.
  void load_queries(int64_t h) const {
    const float factor = a.scale * scale_of(a.cache.k_scale, head0 + h) * K_UNIT;
    float* line = w.line;
    for (int64_t r = 0; r < lanes_of_head; ++r) {
      const int64_t l = h * lanes_of_head + r;
      float* q = w.q + l * p.ldq;
      for (int64_t d = 0; d < p.ldq; ++d) q[d] = 0.0f;
      w.scale[l] = 0.0f;
      if (r >= rows) continue;
      const int64_t i = (row0 + r) / p.group, g = (row0 + r) % p.group;
      const int64_t from = b * a.q.batch + i * a.q.seq + ((head0 + h) * p.group + g) * a.q.head;
      load_row(line, offset(static_cast<const void*>(a.q.data), from, a.dtype), a.dim, a.dtype);
      for (int64_t d = 0; d < a.dim; ++d) line[d] *= factor;
      for (int64_t d = a.dim; d < p.ldq; ++d) line[d] = 0.0f;
#if defined(__AVX2__)
      if (INTEGER) {
        w.scale[l] = quantize_query(line, a.dim, reinterpret_cast<int16_t*>(q));
        continue;
      }
#endif
      to_lanes<K>(q, line, p.ldq);
    }
  }

  // f(rows of a tile, its keys, how far ahead to fetch, offset of the head, lane, key) for all tiles:
  // the heads of a few keys follow each other. `of` says how many keys a tile has; dim: of keys that
  // are read as they lie, else 0.
  template <class Of, class F>
  void each_tile(int64_t n, const char* const* from, int64_t at, int64_t head_stride, int64_t dim,
                 Of of, F f) const {
    const int64_t step = lanes_of_head % 4 == 0 ? of(Constant<4>())
                         : lanes_of_head == 2   ? of(Constant<2>())
                         : lanes_of_head == 1   ? of(Constant<1>())
                                                : UNIT;
    const int64_t fetch = dim > 0 ? ahead : 0;
    const char* halves[UNIT];
    for (int64_t k = 0; k < n; k += step)
      for (int64_t h = 0; h < heads; ++h) {
        const char* const* rows = from + k;
        int64_t here = at + h * head_stride, fetch_here = fetch;
        if (FLOAT8 && dim > 0) {
          for (int64_t j = 0; j < step; ++j) {
            for (int64_t d = 0; d < dim; d += 64) GP_PREFETCH(rows[fetch + j] + here + d);
            uint16_t* half = w.half + j * dim;
            float8_to_half(rows[j] + here, half, dim);
            halves[j] = reinterpret_cast<const char*>(half);
          }
          rows = halves, here = 0, fetch_here = 0;
        }
        const auto tiles = [&](auto rt, int64_t lane) {
          for (int64_t j = 0; j < step; j += of(rt))
            f(rt, rows + j, fetch_here, here, lane, k + j);
        };
        int64_t l = h * lanes_of_head;
        const int64_t end = l + lanes_of_head;
        for (; end - l >= 4; l += 4) tiles(Constant<4>(), l);
        if (end - l >= 2) tiles(Constant<2>(), l), l += 2;
        if (end > l) tiles(Constant<1>(), l);
      }
  }

  template <int RT>
  void scores(const char* const* k, int64_t fetch, int64_t at, int64_t l, float* out) const {
#if defined(__AVX2__)
    if constexpr (INTEGER) {
      const int16_t* q = reinterpret_cast<const int16_t*>(w.q + l * p.ldq);
      return score_tile_int8<RT>(k, fetch, at, q, 2 * p.ldq, p.ldq, w.scale + l, out + l, p.ld);
    }
#endif
    score_tile<K, RT>(k, fetch, at, w.q + l * p.ldq, p.ldq, p.ldq, out + l, p.ld);
  }

  template <int RT>
  void add_values(const char* const* v, int64_t fetch, int64_t at, int64_t l,
                  const float* weights) const {
    float* sums = w.sums + l * p.ldv;
#if defined(__AVX2__)
    if constexpr (INTEGER)
      return value_tile_int8<RT>(v, fetch, at, weights + l, p.ld, w.unit + l, sums, p.ldv, p.ldv);
#endif
    value_tile<V, RT>(v, fetch, at, weights + l, p.ld, sums, p.ldv, p.ldv);
  }

  // `heads` rows of every key to floats; the pointers of `from` then lead to these.
  int64_t unpack(float* memory, int64_t ld, int64_t dim, int64_t head_stride, const char** from,
                 int64_t n) const {
    for (int64_t j = 0; j < BLOCK; ++j) {
      float* row = memory + min64(j, n - 1) * heads * ld;
      for (int64_t h = 0; j < n && h < heads; ++h) {
        unpack_row<T>(row + h * ld, from[j] + (head0 + h) * head_stride * bytes, dim);
        for (int64_t d = dim; d < ld; ++d) row[h * ld + d] = 0.0f;
      }
      from[j] = reinterpret_cast<const char*>(row);
    }
    return ld * 4;
  }

  void run_block(int64_t k0, int64_t n) {
    const int64_t padded = round_up(n, UNIT);
    int64_t k_head = a.cache.k.head * bytes, v_head = a.cache.v.head * bytes;
    int64_t k_at = head0 * k_head, v_at = head0 * v_head;
    if (!K_FITS) k_head = unpack(w.keys, p.ldq, a.dim, a.cache.k.head, keys, n), k_at = 0;
    if (!V_FITS) v_head = unpack(w.values, p.ldv, a.dim_v, a.cache.v.head, values, n), v_at = 0;
    each_tile(
        n, keys, k_at, k_head, K_FITS ? a.dim : 0,
        [](auto rt) { return INTEGER ? TILE / rt.value : KEYS<K, rt.value>; },
        [&](auto rt, const char* const* rows, int64_t fetch, int64_t at, int64_t l, int64_t k) {
          scores<rt.value>(rows, fetch, at, l, w.scores + k * p.ld);
        });
    apply_rules(a, span, lane, heads * lanes_of_head, p.ld, k0, n, padded, w.scores);
    softmax_step(padded, heads * lanes_of_head, p.ld, w.scores, w.max, w.sum, w.unit, w.sums, p.ldv);
#if defined(__AVX2__)
    if (INTEGER) quantize_weights(w.scores, padded, p.ld, w.unit, w.unit);
#endif
    each_tile(
        n, values, v_at, v_head, V_FITS ? a.dim_v : 0,
        [](auto) { return INTEGER ? 2 * PAIRS : VALUE_KEYS; },
        [&](auto rt, const char* const* rows, int64_t fetch, int64_t at, int64_t l, int64_t k) {
          add_values<rt.value>(rows, fetch, at, l, w.scores + k * p.ld);
        });
  }

  void run(int64_t part) {
    const int64_t begin = span.begin + part * span.part, end = min64(span.end, begin + span.part);
    for (int64_t h = 0; h < heads; ++h) load_queries(h);
    for (int64_t l = 0; l < p.ld; ++l) w.max[l] = -INFINITY, w.sum[l] = 0.0f;
    for (int64_t i = 0; i < p.lanes * p.ldv; ++i) w.sums[i] = 0.0f;
    for (int64_t i = 0; i < BLOCK * p.ld; ++i) w.scores[i] = 0.0f;
    for (int64_t k0 = begin; k0 < end; k0 += BLOCK) {
      locate(a.cache, b, span.first_row + k0, min64(BLOCK + ahead, end - k0), BLOCK + ahead, bytes,
             keys, values);
      run_block(k0, min64(BLOCK, end - k0));
    }
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t from = h * lanes_of_head + r;
        const int64_t to = p.row_of(p.parts_before[b] + part, head0 + h) + row0 + r;
        p.max[to] = w.max[from], p.sum[to] = w.sum[from];
        std::memcpy(p.sums + to * p.ldv, w.sums + from * p.ldv, size_t(p.ldv) * 4);
      }
  }

  // out and lse of one row from its parts; `line` holds 2 ldv floats.
  static void merge(const Plan& p, int64_t b, int64_t head_k, int64_t row, float* line) {
    const DecodeArgs& a = p.a;
    const int64_t i = row / p.group, h = head_k * p.group + row % p.group;
    const int64_t first = p.parts_before[b], last = p.parts_before[b + 1];
    const float sink = a.sinks ? a.sinks[h] : -INFINITY;
    float max = sink;
    for (int64_t part = first; part < last; ++part) {
      const float m = p.max[p.row_of(part, head_k) + row];
      max = m > max ? m : max;
    }
    const float base = max == -INFINITY ? 0.0f : max;
    float sum = a.sinks ? __builtin_expf(sink - base) : 0.0f;
    for (int64_t c = 0; c < p.ldv; ++c) line[c] = 0.0f;
    for (int64_t part = first; part < last; ++part) {
      const int64_t at = p.row_of(part, head_k) + row;
      // The next row of every part: half of them lie in another core's cache.
      for (int64_t c = 0; c < p.ldv; c += 16) GP_PREFETCH(p.sums + (at + 1) * p.ldv + c);
      const float weight = __builtin_expf(p.max[at] - base);
      sum += p.sum[at] * weight;
      const vf factor = v_set(weight);
      for (int64_t c = 0; c < p.ldv; c += VL)
        v_store(line + c, v_fma(factor, v_load(p.sums + at * p.ldv + c), v_load(line + c)));
    }
    const float v_scale =
        a.cache.v_scale ? a.cache.v_scale[b * a.cache.scale_batch + head_k] : 1.0f;
    const float factor = sum == 0.0f ? 0.0f : v_scale * V_UNIT / sum;
    for (int64_t c = 0; c < p.ldv; ++c) line[c] *= factor;
    float* natural = line + p.ldv;
    from_lanes<V>(natural, line, p.ldv);
    store_row(offset(a.out.data, b * a.out.batch + i * a.out.seq + h * a.out.head, a.dtype), natural,
              a.dim_v, a.dtype);
    a.lse[(b * a.heads + h) * a.seqlen_q + i] =
        sum == 0.0f ? -INFINITY : float(double(max) + __builtin_log(double(sum)));
  }
};

int64_t find_sequence(const Plan& p, int64_t part) {
  int64_t b = 0, end = p.a.batch;  // parts_before[b] <= part < parts_before[end]
  while (end - b > 1) {
    const int64_t middle = (b + end) / 2;
    if (p.parts_before[middle] <= part) b = middle;
    else end = middle;
  }
  return b;
}

template <DType T, bool K_FITS, bool V_FITS, bool INTEGER>
bool run(Plan& p) {
  const DecodeArgs& a = p.a;
  const int64_t all_rows = p.parts() * a.heads_k * p.rows;
  const int64_t thread_size = max64(Bench::size(p), 2 * p.ldv);
  Scratch partial(all_rows * (p.ldv + 2) * 4), memory(a.threads * thread_size * 4);
  if (!partial.ok() || !memory.ok()) return false;
  p.sums = partial.as<float>();
  p.max = p.sums + all_rows * p.ldv;
  p.sum = p.max + all_rows;
  using Part = Item<T, K_FITS, V_FITS, INTEGER>;
  // The key heads of a part follow each other: what the caches fetched beyond one serves the next.
  parallel_for(p.parts() * p.row_chunks * p.head_chunks, a.threads, [&](int64_t item, int thread) {
    const Bench bench(p, memory.as<float>() + thread * thread_size);
    const int64_t chunk = item % p.head_chunks, rest = item / p.head_chunks;
    const int64_t part = rest / p.row_chunks, b = find_sequence(p, part);
    Part(p, bench, b, chunk * p.heads_chunk, rest % p.row_chunks * MAX_ROWS)
        .run(part - p.parts_before[b]);
  });
  parallel_for(a.batch * a.heads_k, a.threads, [&](int64_t item, int thread) {
    for (int64_t row = 0; row < p.rows; ++row)
      Part::merge(p, item / a.heads_k, item % a.heads_k, row, memory.as<float>() + thread * thread_size);
  });
  return true;
}

template <DType T>
bool run_type(Plan& p) {
  if (T == DType::i8 && VL > 1 && p.a.dtype == DType::bf16 && p.k_fits && p.v_fits &&
      p.a.dim <= MAX_INT8_DIM)
    return run<T, true, true, T == DType::i8>(p);
  if (p.k_fits) return p.v_fits ? run<T, true, true, false>(p) : run<T, true, false, false>(p);
  return p.v_fits ? run<T, false, true, false>(p) : run<T, false, false, false>(p);
}

}  // namespace

bool decode_attention(const DecodeArgs& a) {
  Scratch counts((a.batch + 1) * 8);
  if (!counts.ok()) return false;
  Plan plan(a, counts.as<int64_t>());
  if (plan.rows == 0 || a.batch == 0) return true;
  switch (a.cache.dtype) {
    case DType::bf16: return run_type<DType::bf16>(plan);
    case DType::f16: return run_type<DType::f16>(plan);
    case DType::i8: return run_type<DType::i8>(plan);
    case DType::f8e4m3fn: return run_type<DType::f8e4m3fn>(plan);
    default: return run_type<DType::f32>(plan);
  }
}

}  // namespace GP_ISA
}  // namespace gp
