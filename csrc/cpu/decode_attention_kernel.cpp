// Decode attention: few queries, a long cache, split into parts of keys whose results are merged.
//
// An item is a part of one sequence's keys for some of its key heads and all the queries of these
// heads, so that the cache is read once. It goes through its keys block by block with an online
// softmax and leaves unnormalised sums; the second pass merges the parts of each row in their order.
#include "common/parallel.h"
#include "cpu/attention_math.h"
#include "cpu/decode_attention_tile.h"

#ifndef GP_PREFETCH
#define GP_PREFETCH(p) __builtin_prefetch((p), 0, 2)
#endif

namespace gp {
namespace GP_ISA {
namespace {

constexpr int64_t BLOCK = 64;      // keys between two updates of the running maximum
constexpr int64_t PART = 512;      // keys of a part where the caller does not say how many parts
constexpr int64_t VALUE_KEYS = 8;  // rows of values that stay in the L1 cache, whatever their stride
constexpr int64_t MAX_ROWS = 64;   // rows (queries times heads of a group) of an item
constexpr int RT_MAX = 4;
constexpr int W = VL > RT_MAX ? VL : RT_MAX;  // scores that are handled together, keys of RT rows
constexpr int NW = W / VL;

// The visible keys of a sequence, numbered from leftpad, and how they are cut.
struct Span {
  int64_t first_row, len_k, begin, end, part;  // part: keys in each part
  Span(const DecodeArgs& a, int64_t b) {
    const int64_t pad = a.cache.leftpad ? a.cache.leftpad[b] : 0;
    first_row = pad;
    len_k = max64(a.cache.seqlens[b] - pad, 0);
    const int64_t offset = len_k - a.seqlen_q;
    begin = a.window_left < 0 ? 0 : min64(max64(offset - a.window_left, 0), len_k);
    end = a.window_right < 0 ? len_k
                             : min64(max64(a.seqlen_q + offset + a.window_right, 0), len_k);
    end = max64(begin, end);
    part = a.num_splits > 0 ? (end - begin + a.num_splits - 1) / a.num_splits
                            : PART * ((a.seqlen_q + 15) / 16);  // long queries: fewer results
    part = max64(round_up(part, BLOCK), BLOCK);
  }
  int64_t parts() const { return (end - begin + part - 1) / part; }
};

struct Plan {
  const DecodeArgs& a;
  int64_t group, rows, rows_padded;  // rows: of one key head, query by query
  int64_t heads_chunk, head_chunks, row_chunks;
  int64_t ldq, ldv;
  bool k_fits, v_fits;     // rows are read as they lie, else by way of floats
  int64_t* parts_before;   // (batch + 1)
  float *sums, *max, *sum;  // of every part: (part, head_k, row), unnormalised

  Plan(const DecodeArgs& args, int64_t* counts) : a(args), parts_before(counts) {
    group = a.heads / a.heads_k;
    rows = group * a.seqlen_q;
    rows_padded = round_up(min64(rows, MAX_ROWS), RT_MAX);
    row_chunks = (rows + MAX_ROWS - 1) / MAX_ROWS;
    ldq = round_up(a.dim, STEP), ldv = round_up(a.dim_v, STEP);
    k_fits = a.dim == ldq, v_fits = a.dim_v == ldv;
    parts_before[0] = 0;
    for (int64_t b = 0; b < a.batch; ++b) parts_before[b + 1] = parts_before[b] + Span(a, b).parts();
    heads_chunk = a.heads_k;
    while (heads_chunk > 1 && parts() * row_chunks * chunks(heads_chunk) < 4 * a.threads)
      heads_chunk = (heads_chunk + 1) / 2;
    head_chunks = chunks(heads_chunk);
  }
  int64_t chunks(int64_t heads) const { return (a.heads_k + heads - 1) / heads; }
  int64_t parts() const { return parts_before[a.batch]; }
  int64_t row_of(int64_t part, int64_t head_k) const { return (part * a.heads_k + head_k) * rows; }
};

// Where the rows of keys first .. first + n - 1 begin (head 0); TILE more repeat the last.
void locate(const DecodeCache& c, int64_t b, int64_t first, int64_t n, int bytes,
            const char** keys, const char** values) {
  const int32_t* table = c.block_table ? c.block_table + b * c.table_stride : nullptr;
  int64_t page = c.batch_idx ? c.batch_idx[b] : b, slot = first;
  if (table) slot = first % c.page_size, table += first / c.page_size, page = *table;
  for (int64_t j = 0; j < n; ++j, ++slot) {
    if (table && slot == c.page_size) slot = 0, page = *++table;
    keys[j] = static_cast<const char*>(c.k.data) + (page * c.k.batch + slot * c.k.seq) * bytes;
    values[j] = static_cast<const char*>(c.v.data) + (page * c.v.batch + slot * c.v.seq) * bytes;
  }
  for (int64_t j = n; j < n + TILE; ++j) keys[j] = keys[n - 1], values[j] = values[n - 1];
}

// What one thread works in.
struct Bench {
  float *q, *sums, *max, *sum, *scores, *keys, *values;
  static constexpr int64_t SCORES = (BLOCK + TILE) * RT_MAX + W;
  Bench(const Plan& p, float* memory) {
    const int64_t n = p.heads_chunk * p.rows_padded;
    q = memory;
    sums = q + n * p.ldq;
    keys = sums + n * p.ldv;
    values = keys + (p.k_fits ? 0 : BLOCK * p.ldq);
    scores = values + (p.v_fits ? 0 : BLOCK * p.ldv);
    max = scores + round_up(SCORES, 16);
    sum = max + n;
  }
  static int64_t size(const Plan& p) {
    const int64_t n = p.heads_chunk * p.rows_padded;
    return n * (p.ldq + p.ldv + 2) + (p.k_fits ? 0 : BLOCK * p.ldq) +
           (p.v_fits ? 0 : BLOCK * p.ldv) + round_up(SCORES, 16) + 32;
  }
};

// Vectors whose lanes repeat the RT values of a tile's rows.
struct Pattern {
  vf v[NW];
  template <int RT>
  static Pattern of(const float* row) {
    alignas(64) float lanes[W];
    for (int i = 0; i < W; ++i) lanes[i] = row[i % RT];
    Pattern p;
    for (int i = 0; i < NW; ++i) p.v[i] = v_load(lanes + i * VL);
    return p;
  }
};

// RT rows of one key head: which query each is, and what it sees of a block.
struct Rows {
  int64_t query[RT_MAX];
  float slope[RT_MAX];
};

// What happens to the scores of n keys from k0 on, [key][row], before the softmax: softcap, ALiBi,
// -inf where the query does not see the key and for the keys that pad the last tile.
template <int RT>
void apply_rules(const DecodeArgs& a, const Span& span, const Rows& rows, int64_t k0, int64_t n,
                 int64_t padded, float* scores) {
  const int64_t offset = span.len_k - a.seqlen_q;
  if (a.softcap != 0.0f) {
    const vf inverse = v_set(1.0f / a.softcap), cap = v_set(a.softcap);
    for (int64_t j = 0; j < padded * RT; j += VL)
      v_store(scores + j, v_mul(v_tanh(v_mul(v_load(scores + j), inverse)), cap));
  }
  if (a.alibi_slopes) {
    float at[RT], unused[RT];
    for (int r = 0; r < RT; ++r) at[r] = float(rows.query[r] + offset - k0), unused[r] = -rows.slope[r];
    const Pattern position = Pattern::of<RT>(at), slope = Pattern::of<RT>(unused);
    alignas(64) float key[W];
    for (int i = 0; i < W; ++i) key[i] = float(i / RT);
    for (int64_t j = 0; j < padded * RT; j += W)
      for (int i = 0; i < NW; ++i) {
        const vf index = v_add(v_load(key + i * VL), v_set(float(j / RT)));
        float* x = scores + j + i * VL;
        v_store(x, v_fma(slope.v[i], v_abs(v_sub(position.v[i], index)), v_load(x)));
      }
  }
  for (int r = 0; r < RT; ++r) {
    const int64_t at = rows.query[r] + offset - k0;
    const int64_t lo = a.window_left < 0 ? 0 : at - a.window_left;
    const int64_t hi = a.window_right < 0 ? n : min64(n, at + a.window_right + 1);
    for (int64_t k = 0; k < min64(lo, padded); ++k) scores[k * RT + r] = -INFINITY;
    for (int64_t k = max64(hi, 0); k < padded; ++k) scores[k * RT + r] = -INFINITY;
  }
}

// Scores [key][row] become probabilities against the new maximum of each row; what was gathered
// before is rescaled.
template <int RT>
void softmax_step(int64_t padded, float* scores, float* max, float* sum, float* sums, int64_t ldv) {
  const int64_t n = padded * RT;
  vf top[NW], total[NW];
  for (int i = 0; i < NW; ++i) top[i] = v_set(-INFINITY), total[i] = v_zero();
  for (int64_t j = 0; j < n; j += W)
    for (int i = 0; i < NW; ++i) top[i] = v_max(top[i], v_load(scores + j + i * VL));
  alignas(64) float lanes[W];
  float base[RT];
  for (int i = 0; i < NW; ++i) v_store(lanes + i * VL, top[i]);
  for (int r = 0; r < RT; ++r) {
    float m = max[r];
    for (int i = r; i < W; i += RT) m = lanes[i] > m ? lanes[i] : m;
    base[r] = m == -INFINITY ? 0.0f : m;
    if (m == max[r]) continue;
    const float rescale = __builtin_expf(max[r] - base[r]);
    max[r] = m;
    sum[r] *= rescale;
    const vf factor = v_set(rescale);
    float* x = sums + r * ldv;
    for (int64_t c = 0; c < ldv; c += VL) v_store(x + c, v_mul(v_load(x + c), factor));
  }
  const Pattern shift = Pattern::of<RT>(base);
  const vf log2e = v_set(LOG2E);
  for (int64_t j = 0; j < n; j += W)
    for (int i = 0; i < NW; ++i) {
      float* x = scores + j + i * VL;
      const vf p = v_exp2(v_mul(v_sub(v_load(x), shift.v[i]), log2e));
      v_store(x, p);
      total[i] = v_add(total[i], p);
    }
  for (int i = 0; i < NW; ++i) v_store(lanes + i * VL, total[i]);
  for (int r = 0; r < RT; ++r) {
    float s = 0.0f;
    for (int i = r; i < W; i += RT) s += lanes[i];
    sum[r] += s;
  }
}

// The rows of a block of keys or values of one head: `rows` + `at`, n of them, of so many bytes.
struct Block {
  const char* const* rows;
  int64_t at, n, bytes;
  void prefetch(int64_t first, int64_t count) const {
    const int64_t last = min64(first + count, n);
    for (int64_t k = first; k < last; ++k)
      for (int64_t i = 0; i < bytes; i += 64) GP_PREFETCH(rows[k] + at + i);
  }
};

// One block of keys for RT rows of one key head. K and V are the element types that are read.
template <DType K, DType V, int RT>
void tile(const DecodeArgs& a, const Plan& p, const Span& span, const Rows& rows, int64_t k0,
          int64_t n, const char* const* keys, int64_t key_at, const char* const* values,
          int64_t value_at, const Block& next_keys, const Block& next_values, const float* q,
          float* max, float* sum, float* sums, float* scores) {
  constexpr int KT = TILE / RT;
  for (int64_t k = 0; k < n; k += KT) {
    next_keys.prefetch(k, KT);
    score_tile<K, RT>(keys + k, key_at, q, p.ldq, p.ldq, scores + k * RT);
  }
  const int64_t padded = round_up(n, W / RT > KT ? W / RT : KT);
  apply_rules<RT>(a, span, rows, k0, n, padded, scores);
  softmax_step<RT>(padded, scores, max, sum, sums, p.ldv);
  for (int64_t k = 0; k < n; k += VALUE_KEYS) {
    next_values.prefetch(k, VALUE_KEYS);
    value_tile<V, RT>(values + k, value_at, min64(VALUE_KEYS, n - k), scores + k * RT, sums, p.ldv,
                      p.ldv);
  }
}

template <DType T, bool K_FITS, bool V_FITS>
struct Item {
  static constexpr DType K = K_FITS ? T : DType::f32, V = V_FITS ? T : DType::f32;
  static constexpr int bytes = Element<T>::bytes;
  const Plan& p;
  const DecodeArgs& a;
  const Bench& w;
  int64_t b, head0, heads, row0, rows;
  Span span;
  // This block of keys and the next.
  const char *keys[2][BLOCK + TILE], *values[2][BLOCK + TILE];

  Item(const Plan& plan, const Bench& bench, int64_t batch, int64_t first_head, int64_t first_row)
      : p(plan), a(plan.a), w(bench), b(batch), head0(first_head),
        heads(min64(plan.heads_chunk, plan.a.heads_k - first_head)), row0(first_row),
        rows(min64(MAX_ROWS, plan.rows - first_row)), span(plan.a, batch) {}

  float scale_of(const float* scales, int64_t head_k) const {
    return scales ? scales[b * a.cache.scale_batch + head_k] : 1.0f;
  }

  // Queries times their scales, in the order of lanes of the keys; zeros as padding.
  void load_queries(int64_t h) const {
    const float factor = a.scale * scale_of(a.cache.k_scale, head0 + h);
    float line[1];
    (void)line;
    for (int64_t r = 0; r < p.rows_padded; ++r) {
      float* q = w.q + (h * p.rows_padded + r) * p.ldq;
      for (int64_t d = 0; d < p.ldq; ++d) q[d] = 0.0f;
      if (r >= rows) continue;
      const int64_t i = (row0 + r) / p.group, g = (row0 + r) % p.group;
      const int64_t from = b * a.q.batch + i * a.q.seq + ((head0 + h) * p.group + g) * a.q.head;
      for (int64_t d = 0; d < a.dim; ++d)
        q[Element<K>::lane(d)] = load_one(a.q.data, from + d, a.dtype) * factor;
    }
  }

  template <int RT>
  void run_tile(int64_t h, int64_t r, int64_t k0, int64_t n, const char* const* k, int64_t key_at,
                const char* const* v, int64_t value_at, const Block& next_k,
                const Block& next_v) const {
    Rows which;
    for (int i = 0; i < RT; ++i) {
      const int64_t row = min64(row0 + r + i, p.rows - 1);
      which.query[i] = row / p.group;
      const int64_t head = (head0 + h) * p.group + row % p.group;
      which.slope[i] = a.alibi_slopes ? a.alibi_slopes[b * a.alibi_batch + head] : 0.0f;
    }
    const int64_t at = h * p.rows_padded + r;
    tile<K, V, RT>(a, p, span, which, k0, n, k, key_at, v, value_at, next_k, next_v,
                   w.q + at * p.ldq, w.max + at, w.sum + at, w.sums + at * p.ldv, w.scores);
  }

  // `flip` says which half of keys and values holds this block; next_n keys are in the other half.
  void run_head(int64_t h, int64_t k0, int64_t n, int flip, int64_t next_n) const {
    const char *unpacked_k[BLOCK + TILE], *unpacked_v[BLOCK + TILE];
    const char *const *k = keys[flip], *const *v = values[flip];
    // Fetched meanwhile: the block of the next head, or the next block of the first.
    const bool same = h + 1 < heads;
    const int64_t next_head = same ? head0 + h + 1 : head0;
    const int from = same ? flip : 1 - flip;
    const int64_t count = same ? n : next_n;
    const Block next_k{keys[from], next_head * a.cache.k.head * bytes, count, a.dim * bytes};
    const Block next_v{values[from], next_head * a.cache.v.head * bytes, count, a.dim_v * bytes};
    const Block none{nullptr, 0, 0, 0};
    int64_t key_at = (head0 + h) * a.cache.k.head * bytes;
    int64_t value_at = (head0 + h) * a.cache.v.head * bytes;
    if (!K_FITS) k = unpack(unpacked_k, w.keys, p.ldq, a.dim, k, n, key_at), key_at = 0;
    if (!V_FITS) v = unpack(unpacked_v, w.values, p.ldv, a.dim_v, v, n, value_at), value_at = 0;
    for (int64_t r = 0; r < rows;) {
      const int64_t left = rows - r;
      const Block &nk = r == 0 ? next_k : none, &nv = r == 0 ? next_v : none;
      if (left >= 3) run_tile<4>(h, r, k0, n, k, key_at, v, value_at, nk, nv), r += 4;
      else if (left == 2) run_tile<2>(h, r, k0, n, k, key_at, v, value_at, nk, nv), r += 2;
      else run_tile<1>(h, r, k0, n, k, key_at, v, value_at, nk, nv), r += 1;
    }
  }

  const char* const* unpack(const char** to, float* memory, int64_t ld, int64_t dim,
                            const char* const* from, int64_t n, int64_t at) const {
    for (int64_t j = 0; j < n + TILE; ++j) {
      float* row = memory + min64(j, n - 1) * ld;
      to[j] = reinterpret_cast<const char*>(row);
      if (j >= n) continue;
      unpack_row<T>(row, from[j] + at, dim);
      for (int64_t d = dim; d < ld; ++d) row[d] = 0.0f;
    }
    return to;
  }

  void run(int64_t part) {
    const int64_t begin = span.begin + part * span.part, end = min64(span.end, begin + span.part);
    for (int64_t h = 0; h < heads; ++h) load_queries(h);
    const int64_t n = heads * p.rows_padded;
    for (int64_t i = 0; i < n; ++i) w.max[i] = -INFINITY, w.sum[i] = 0.0f;
    for (int64_t i = 0; i < n * p.ldv; ++i) w.sums[i] = 0.0f;
    int flip = 0;
    int64_t here = min64(BLOCK, end - begin), next = 0;
    locate(a.cache, b, span.first_row + begin, here, bytes, keys[0], values[0]);
    for (int64_t k0 = begin; k0 < end; k0 += BLOCK, here = next, flip = 1 - flip) {
      next = max64(min64(BLOCK, end - k0 - BLOCK), 0);
      if (next > 0)
        locate(a.cache, b, span.first_row + k0 + BLOCK, next, bytes, keys[1 - flip],
               values[1 - flip]);
      for (int64_t h = 0; h < heads; ++h) run_head(h, k0, here, flip, next);
    }
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t from = h * p.rows_padded + r;
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
      const float weight = __builtin_expf(p.max[at] - base);
      sum += p.sum[at] * weight;
      const vf factor = v_set(weight);
      for (int64_t c = 0; c < p.ldv; c += VL)
        v_store(line + c, v_fma(factor, v_load(p.sums + at * p.ldv + c), v_load(line + c)));
    }
    const float v_scale =
        a.cache.v_scale ? a.cache.v_scale[b * a.cache.scale_batch + head_k] : 1.0f;
    const float factor = sum == 0.0f ? 0.0f : v_scale / sum;
    float* natural = line + p.ldv;
    for (int64_t c = 0; c < a.dim_v; ++c) natural[c] = line[Element<V>::lane(c)] * factor;
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

template <DType T, bool K_FITS, bool V_FITS>
bool run(Plan& p) {
  const DecodeArgs& a = p.a;
  const int64_t all_rows = p.parts() * a.heads_k * p.rows;
  const int64_t thread_size = max64(Bench::size(p), 2 * p.ldv);
  Scratch partial(all_rows * (p.ldv + 2) * 4), memory(a.threads * thread_size * 4);
  if (!partial.ok() || !memory.ok()) return false;
  p.sums = partial.as<float>();
  p.max = p.sums + all_rows * p.ldv;
  p.sum = p.max + all_rows;
  using Part = Item<T, K_FITS, V_FITS>;
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
  if (p.k_fits) return p.v_fits ? run<T, true, true>(p) : run<T, true, false>(p);
  return p.v_fits ? run<T, false, true>(p) : run<T, false, false>(p);
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
