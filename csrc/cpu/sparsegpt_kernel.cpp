// Rows are independent inside a block, so each tile of rows goes through all its columns while it is
// in the first-level cache, where torch would make a pass over all rows for each column.
#include <algorithm>
#include <atomic>

#include "common/parallel.h"
#include "common/simd.h"
#include "cpu/sparsegpt.h"

namespace gp {
namespace GP_ISA {
namespace {

constexpr int LANES = 16;  // rows of a tile: whole vectors of any instruction set
constexpr int STEP = 8;    // columns whose errors reach the rest of a tile in one pass over it

// What pruning costs, (w / d)^2, in an order of unsigned numbers; 0 for what is pruned already.
inline uint32_t key_of(float w, float d, uint8_t pruned) {
  const float ratio = w / d;
  return pruned ? 0 : float_to_bits(ratio * ratio) + 1;
}

// The `count` smallest scores of the block get pruned, equal ones by row and then by column. The
// upper halves of the keys say which of them can be at the limit; those few are then ordered.
bool prune_smallest(const SparseGptBlock& b) {
  constexpr int64_t BINS = 65536, PANEL = 64;
  const int64_t columns = b.columns, panels = (b.rows + PANEL - 1) / PANEL;
  if (b.count <= 0) return true;
  Scratch keys(columns * b.rows * 4), bins(b.threads * BINS * 4), diagonal(columns * 4);
  if (!keys.ok() || !bins.ok() || !diagonal.ok()) return false;
  uint32_t* key = keys.as<uint32_t>();
  uint32_t* bin = bins.as<uint32_t>();
  float* d = diagonal.as<float>();
  for (int64_t c = 0; c < columns; ++c) d[c] = b.factor[c * (columns + 1)];
  std::memset(bin, 0, size_t(b.threads) * BINS * 4);
  const auto rows_of = [&](int64_t panel) { return std::min(b.rows, (panel + 1) * PANEL); };
  parallel_for(panels, b.threads, [&](int64_t panel, int thread) {
    uint32_t* mine = bin + thread * BINS;
    const int64_t n = columns;
    for (int64_t r = panel * PANEL; r < rows_of(panel); ++r) {
      uint32_t* k = key + r * n;
      const float *w = b.weight + r * b.stride, *by = d;
      const uint8_t* pruned = b.pruned + r * b.stride;
      for (int64_t c = 0; c < n; ++c) k[c] = key_of(w[c], by[c], pruned[c]);
      for (int64_t c = 0; c < n; ++c) ++mine[k[c] >> 16];
    }
  });
  uint32_t limit = 0;
  int64_t below = 0, there = 0;
  for (;; ++limit, below += there) {
    there = 0;
    for (int t = 0; t < b.threads; ++t) there += bin[t * BINS + limit];
    if (below + there >= b.count) break;
  }
  Scratch places(there * 8);
  if (!places.ok()) return false;
  int64_t* place = places.as<int64_t>();
  std::atomic<int64_t> found{0};
  parallel_for(panels, b.threads, [&](int64_t panel, int) {
    const uint32_t n = uint32_t(columns), last = limit;
    for (int64_t r = panel * PANEL; r < rows_of(panel); ++r) {
      const uint32_t* k = key + r * columns;
      uint8_t* pruned = b.pruned + r * b.stride;
      uint32_t at_limit = 0;
      for (uint32_t c = 0; c < n; ++c) {
        pruned[c] |= uint8_t(k[c] >> 16 < last);
        at_limit |= uint32_t(k[c] >> 16 == last);
      }
      for (uint32_t c = 0; at_limit && c < n; ++c)
        if (k[c] >> 16 == last)
          place[found.fetch_add(1, std::memory_order_relaxed)] = r * columns + c;
    }
  });
  const int64_t wanted = b.count - below;
  const auto first = [&](int64_t i, int64_t j) {
    return key[i] != key[j] ? key[i] < key[j] : i < j;
  };
  if (wanted < there) std::nth_element(place, place + wanted, place + there, first);
  for (int64_t i = 0; i < wanted; ++i)
    b.pruned[place[i] / columns * b.stride + place[i] % columns] = 1;
  return true;
}

// n:m for LANES rows: of the `width` columns from w on, the `count` of least score go, equal ones by
// column.
void prune_group(const SparseGptBlock& b, int64_t c0, int64_t width, int64_t count, const float* w,
                 uint8_t* pruned, float* scores) {
  for (int64_t i = 0; i < width; ++i) {
    const float d = b.factor[(c0 + i) * (b.columns + 1)];
    for (int l = 0; l < LANES; ++l) {
      const float ratio = w[i * LANES + l] / d;
      scores[i * LANES + l] = pruned[i * LANES + l] ? -1.0f : ratio * ratio;
    }
  }
  for (int64_t i = 0; i < width; ++i) {
    int rank[LANES] = {};
    for (int64_t j = 0; j < i; ++j)
      for (int l = 0; l < LANES; ++l) rank[l] += scores[j * LANES + l] <= scores[i * LANES + l];
    for (int64_t j = i + 1; j < width; ++j)
      for (int l = 0; l < LANES; ++l) rank[l] += scores[j * LANES + l] < scores[i * LANES + l];
    for (int l = 0; l < LANES; ++l) pruned[i * LANES + l] |= rank[l] < count;
  }
}

inline vf nearest(vf w, vf scale, vf inverse, vf zero, vf low, vf high) {
  const vf code = v_add(v_round(v_mul(w, inverse)), zero);
  return v_mul(v_sub(v_min(v_max(code, low), high), zero), scale);
}

// The grid points of one column of LANES rows, of which the first `used` are there.
void round_to_grid(const SparseGptBlock& b, int64_t at, int64_t used, float* w) {
  float scale[LANES], zero[LANES];
  for (int64_t l = 0; l < LANES; ++l) {
    scale[l] = l < used ? b.scale[at + l] : 1.0f;
    zero[l] = l < used ? b.zero[at + l] : 0.0f;
  }
  const vf low = v_set(b.low), high = v_set(b.high);
  for (int v = 0; v < LANES; v += VL) {
    const vf s = v_load(scale + v), z = v_load(zero + v);
    const vf code = v_add(v_round(v_div(v_load(w + v), s)), z);
    v_store(w + v, v_mul(v_sub(v_min(v_max(code, low), high), z), s));
  }
}

// What N columns, whose errors are in `minus`, spread to columns i0..i1-1; factor is the first one's
// row of U.
template <int N>
inline void subtract(float* w, int64_t i0, int64_t i1, const float* factor, int64_t stride,
                     const vf (*minus)[LANES / VL]) {
  for (int64_t i = i0; i < i1; ++i)
    for (int v = 0; v < LANES / VL; ++v) {
      vf sum = v_load(w + i * LANES + v * VL);
      for (int n = 0; n < N; ++n) sum = v_fma(v_set(factor[n * stride + i]), minus[n][v], sum);
      v_store(w + i * LANES + v * VL, sum);
    }
}

}  // namespace

void grid_search(const GridSearch& g) {
  parallel_for((g.rows + LANES - 1) / LANES, g.threads, [&](int64_t item, int) {
    const int64_t r0 = item * LANES, used = g.rows - r0 < LANES ? g.rows - r0 : LANES;
    const vf low = v_set(g.low), high = v_set(g.high);
    for (int64_t v0 = 0; v0 < used; v0 += VL) {
      const int n = static_cast<int>(used - v0 < VL ? used - v0 : VL);
      const int64_t row = r0 + v0;
      float least[VL], cost[VL];
      for (int l = 0; l < n; ++l) least[l] = g.best[row + l] = 0;
      for (int64_t k = 0; k < g.candidates; ++k) {
        float one[VL];
        const vf scale = v_load_n(g.scale + k * g.rows + row, n);
        const vf zero = v_load_n(g.zero + k * g.rows + row, n);
        for (int l = 0; l < VL; ++l) one[l] = 1.0f;
        float inverse[VL];
        v_store(inverse, v_div(v_load(one), scale));
        for (int l = n; l < VL; ++l) inverse[l] = 0.0f;
        const vf by = v_load(inverse);
        vf sum = v_zero();
        for (int64_t c = 0; c < g.columns; ++c) {
          const vf w = v_load_n(g.weight + c * g.rows + row, n);
          const vf miss = v_sub(nearest(w, scale, by, zero, low, high), w);
          sum = v_fma(v_mul(miss, miss), v_set(g.importance[c]), sum);
        }
        v_store(cost, sum);
        for (int l = 0; l < n; ++l)
          if (k == 0 || cost[l] < least[l]) {
            least[l] = cost[l];
            g.best[row + l] = k;
          }
      }
    }
  });
}

bool sparsegpt_block(const SparseGptBlock& b) {
  if (!b.group && !prune_smallest(b)) return false;
  const int64_t columns = b.columns, tile = columns * LANES;
  Scratch weights(b.threads * tile * 4), masks(b.threads * tile), scores(b.threads * tile * 4);
  if (!weights.ok() || !masks.ok() || !scores.ok()) return false;
  // A group is chosen when all columns before it are done: it must not begin within a step.
  const int64_t step = b.group && STEP % b.group ? 1 : STEP;
  parallel_for((b.rows + LANES - 1) / LANES, b.threads, [&](int64_t item, int thread) {
    float* w = weights.as<float>() + thread * tile;
    uint8_t* pruned = masks.as<uint8_t>() + thread * tile;
    const int64_t r0 = item * LANES, used = b.rows - r0 < LANES ? b.rows - r0 : LANES;
    for (int64_t l = 0; l < LANES; ++l) {
      const int64_t at = (r0 + l) * b.stride;
      for (int64_t c = 0; c < columns; ++c) {
        w[c * LANES + l] = l < used ? b.weight[at + c] : 0.0f;
        pruned[c * LANES + l] = l < used ? b.pruned[at + c] : 1;
      }
    }
    vf minus[STEP][LANES / VL];
    for (int64_t c0 = 0, end; c0 < columns; c0 = end) {
      end = std::min(c0 + step, columns);
      for (int64_t c = c0; c < end; ++c) {
        if (b.group && c % b.group == 0) {
          const int64_t width = columns - c < b.group ? columns - c : b.group;
          prune_group(b, c, width, b.zeros * width / b.group, w + c * LANES, pruned + c * LANES,
                      scores.as<float>() + thread * tile);
        }
        const float* factor = b.factor + c * columns;
        float error[LANES], kept[LANES];
        for (int l = 0; l < LANES; ++l) kept[l] = w[c * LANES + l];
        if (b.scale) round_to_grid(b, b.groups[c] * b.rows + r0, used, kept);
        for (int l = 0; l < LANES; ++l) {
          const float wanted = pruned[c * LANES + l] ? 0.0f : kept[l];
          error[l] = (w[c * LANES + l] - wanted) / factor[c];
          w[c * LANES + l] = wanted;
        }
        for (int v = 0; v < LANES / VL; ++v)
          minus[c - c0][v] = v_sub(v_zero(), v_load(error + v * VL));
        subtract<1>(w, c + 1, end, factor, columns, minus + (c - c0));
      }
      if (end - c0 == STEP) subtract<STEP>(w, end, columns, b.factor + c0 * columns, columns, minus);
      else if (step == 1) subtract<1>(w, end, columns, b.factor + c0 * columns, columns, minus);
    }
    for (int64_t l = 0; l < used; ++l) {
      const int64_t at = (r0 + l) * b.stride;
      for (int64_t c = 0; c < columns; ++c) {
        b.weight[at + c] = w[c * LANES + l];
        b.pruned[at + c] = pruned[c * LANES + l];
      }
    }
  });
  return true;
}

}  // namespace GP_ISA
}  // namespace gp
