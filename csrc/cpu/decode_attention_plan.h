// How the keys of decode attention are cut, and the memory that the parts work in.
#pragma once

#include "cpu/attention_math.h"
#include "cpu/decode_attention_tile.h"

namespace gp {
namespace GP_ISA {

constexpr int64_t UNIT = VL == 16 ? 16 : 24;  // keys: whole tiles, whatever their rows
constexpr int64_t BLOCK = 48;      // keys between two updates of the running maximum: whole tiles
// Where the caller does not say how many parts: about 16, of so many keys at least and at most.
constexpr int64_t PARTS = 16, MIN_PART = 288, MAX_PART = 576;
constexpr int64_t MAX_ROWS = 64;   // rows (queries times heads of a group) of an item and key head
constexpr int64_t MAX_LANES = 64;  // rows of all key heads of an item
constexpr int64_t Q_BYTES = 16384;  // queries of an item of several heads: half of the L1 cache
constexpr int64_t AHEAD_BYTES = 32768;  // how far before its use a row is fetched
constexpr int64_t MAX_AHEAD = 64;       // the same in keys

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
    const int64_t splits = a.num_splits > 0 ? a.num_splits : PARTS;
    part = (end - begin + splits - 1) / splits;
    if (a.num_splits == 0)  // long queries: fewer results
      part = min64(max64(part, MIN_PART), MAX_PART) * ((a.seqlen_q + 15) / 16);
    part = max64(round_up(part, BLOCK), BLOCK);
  }
  int64_t parts() const { return (end - begin + part - 1) / part; }
};

struct Plan {
  const DecodeArgs& a;
  int64_t group, rows;  // rows: of one key head, query by query
  int64_t heads_chunk, head_chunks, row_chunks;
  int64_t lanes, ld;  // rows of an item, each a lane of the scores of a key; their stride
  int64_t ldq, ldv;
  bool k_fits, v_fits;      // rows are read as they lie, else by way of floats
  int64_t* parts_before;    // (batch + 1)
  float *sums, *max, *sum;  // of every part: (part, head_k, row), unnormalised

  Plan(const DecodeArgs& args, int64_t* counts) : a(args), parts_before(counts) {
    group = a.heads / a.heads_k;
    rows = group * a.seqlen_q;
    row_chunks = (rows + MAX_ROWS - 1) / MAX_ROWS;
    ldq = round_up(a.dim, STEP), ldv = round_up(a.dim_v, STEP);
    k_fits = a.dim == ldq, v_fits = a.dim_v == ldv;
    parts_before[0] = 0;
    for (int64_t b = 0; b < a.batch; ++b) parts_before[b + 1] = parts_before[b] + Span(a, b).parts();
    const int64_t most = min64(MAX_LANES, Q_BYTES / 4 / ldq);
    heads_chunk = min64(a.heads_k, max64(most / lanes_of_head(), 1));
    while (heads_chunk > 1 && parts() * row_chunks * chunks(heads_chunk) < 4 * a.threads)
      heads_chunk = (heads_chunk + 1) / 2;
    head_chunks = chunks(heads_chunk);
    lanes = heads_chunk * lanes_of_head();
    ld = round_up(lanes, VL);
  }
  // Three rows are handled as four.
  int64_t lanes_of_head() const {
    const int64_t n = min64(rows, MAX_ROWS);
    return n % 4 == 3 ? n + 1 : n;
  }
  int64_t chunks(int64_t heads) const { return (a.heads_k + heads - 1) / heads; }
  int64_t parts() const { return parts_before[a.batch]; }
  int64_t row_of(int64_t part, int64_t head_k) const { return (part * a.heads_k + head_k) * rows; }
};

// Where the rows of keys first .. first + n - 1 begin (head 0); after them the last is repeated.
static inline void locate(const DecodeCache& c, int64_t b, int64_t first, int64_t n, int64_t size,
                          int bytes, const char** keys, const char** values) {
  const int32_t* table = c.block_table ? c.block_table + b * c.table_stride : nullptr;
  int64_t page = c.batch_idx ? c.batch_idx[b] : b, slot = first;
  if (table) slot = first % c.page_size, table += first / c.page_size, page = *table;
  const int64_t k_step = c.k.seq * bytes, v_step = c.v.seq * bytes;
  for (int64_t j = 0; j < n; slot = 0, page = j < n ? *++table : 0) {
    const char* k = static_cast<const char*>(c.k.data) + (page * c.k.batch + slot * c.k.seq) * bytes;
    const char* v = static_cast<const char*>(c.v.data) + (page * c.v.batch + slot * c.v.seq) * bytes;
    const int64_t last = table ? min64(n, j + c.page_size - slot) : n;
    for (; j < last; ++j, k += k_step, v += v_step) keys[j] = k, values[j] = v;
  }
  for (int64_t j = n; j < size; ++j) keys[j] = keys[n - 1], values[j] = values[n - 1];
}

// What one thread works in. By lane: max, sum, and of the integer products scale (what a query's 1
// stands for) and unit (what a weight's 1 stands for). half: UNIT rows of a head of a float8 cache.
struct Bench {
  float *line, *q, *sums, *scores, *max, *sum, *scale, *unit, *keys, *values;
  uint16_t* half;
  Bench(const Plan& p, float* memory) {
    line = memory;
    q = line + p.ldq;
    sums = q + p.lanes * p.ldq;
    scores = sums + p.lanes * p.ldv;
    max = scores + BLOCK * p.ld;
    sum = max + p.ld;
    scale = sum + p.ld;
    unit = scale + p.ld;
    keys = unit + p.ld;
    values = keys + (p.k_fits ? 0 : BLOCK * p.heads_chunk * p.ldq);
    half = reinterpret_cast<uint16_t*>(values + (p.v_fits ? 0 : BLOCK * p.heads_chunk * p.ldv));
  }
  static int64_t size(const Plan& p) {
    return round_up(p.ldq + p.lanes * (p.ldq + p.ldv) + (BLOCK + 4) * p.ld +
                        (p.k_fits ? 0 : BLOCK * p.heads_chunk * p.ldq) +
                        (p.v_fits ? 0 : BLOCK * p.heads_chunk * p.ldv) +
                        UNIT / 2 * max64(p.ldq, p.ldv),
                    16);
  }
};

}  // namespace GP_ISA
}  // namespace gp
