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

// What pruning costs, (w / d)^2, in an order of unsigned numbers; 0 for what is pruned already.
inline uint32_t key_of(float w, float d, uint8_t pruned) {
  const float ratio = w / d;
  return pruned ? 0 : float_to_bits(ratio * ratio) + 1;
}

// The `count` smallest scores of the block get pruned, equal ones by row and then by column. The
// upper halves of the keys say which of them can be at the limit; those few are then ordered.
bool prune_smallest(const SparseGptBlock& b) {
  constexpr int64_t BINS = 65536;
  const int64_t total = b.columns * b.rows;
  if (b.count <= 0) return true;
  Scratch keys(total * 4), bins(b.threads * BINS * 4);
  if (!keys.ok() || !bins.ok()) return false;
  uint32_t* key = keys.as<uint32_t>();
  uint32_t* bin = bins.as<uint32_t>();
  std::memset(bin, 0, size_t(b.threads) * BINS * 4);
  parallel_for(b.columns, b.threads, [&](int64_t c, int thread) {
    const float d = b.factor[c * b.factor_stride + c];
    uint32_t* mine = bin + thread * BINS;
    for (int64_t i = c * b.rows; i < (c + 1) * b.rows; ++i)
      key[i] = key_of(b.weight[i], d, b.pruned[i]);
    for (int64_t i = c * b.rows; i < (c + 1) * b.rows; ++i) ++mine[key[i] >> 16];
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
  parallel_for(b.columns, b.threads, [&](int64_t c, int) {
    uint32_t at_limit = 0;
    for (int64_t i = c * b.rows; i < (c + 1) * b.rows; ++i) {
      b.pruned[i] |= uint8_t(key[i] >> 16 < limit);
      at_limit |= uint32_t(key[i] >> 16 == limit);
    }
    for (int64_t i = c * b.rows; at_limit && i < (c + 1) * b.rows; ++i)
      if (key[i] >> 16 == limit) place[found.fetch_add(1, std::memory_order_relaxed)] = i;
  });
  const int64_t wanted = b.count - below;
  const auto first = [&](int64_t i, int64_t j) {
    if (key[i] != key[j]) return key[i] < key[j];
    return i % b.rows != j % b.rows ? i % b.rows < j % b.rows : i < j;
  };
  if (wanted < there) std::nth_element(place, place + wanted, place + there, first);
  for (int64_t i = 0; i < wanted; ++i) b.pruned[place[i]] = 1;
  return true;
}

// n:m for LANES rows: of the `width` columns from w on, the `count` of least score go, equal ones by
// column.
void prune_group(const SparseGptBlock& b, int64_t c0, int64_t width, int64_t count, const float* w,
                 uint8_t* pruned, float* scores) {
  for (int64_t i = 0; i < width; ++i) {
    const float d = b.factor[(c0 + i) * b.factor_stride + c0 + i];
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
  parallel_for((b.rows + LANES - 1) / LANES, b.threads, [&](int64_t item, int thread) {
    float* w = weights.as<float>() + thread * tile;
    uint8_t* pruned = masks.as<uint8_t>() + thread * tile;
    const int64_t r0 = item * LANES, used = b.rows - r0 < LANES ? b.rows - r0 : LANES;
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t l = 0; l < LANES; ++l) {
        w[c * LANES + l] = l < used ? b.weight[c * b.rows + r0 + l] : 0.0f;
        pruned[c * LANES + l] = l < used ? b.pruned[c * b.rows + r0 + l] : 1;
      }
    for (int64_t c = 0; c < columns; ++c) {
      if (b.group && c % b.group == 0) {
        const int64_t width = columns - c < b.group ? columns - c : b.group;
        prune_group(b, c, width, b.zeros * width / b.group, w + c * LANES, pruned + c * LANES,
                    scores.as<float>() + thread * tile);
      }
      const float* factor = b.factor + c * b.factor_stride;
      float error[LANES], kept[LANES];
      for (int l = 0; l < LANES; ++l) kept[l] = w[c * LANES + l];
      if (b.scale) round_to_grid(b, b.groups[c] * b.rows + r0, used, kept);
      for (int l = 0; l < LANES; ++l) {
        const float wanted = pruned[c * LANES + l] ? 0.0f : kept[l];
        error[l] = (w[c * LANES + l] - wanted) / factor[c];
        w[c * LANES + l] = wanted;
      }
      for (int64_t l = 0; l < used; ++l) b.errors[c * b.rows + r0 + l] = error[l];
      vf minus[LANES / VL];
      for (int v = 0; v < LANES / VL; ++v) minus[v] = v_sub(v_zero(), v_load(error + v * VL));
      for (int64_t i = c + 1; i < columns; ++i) {
        const vf u = v_set(factor[i]);
        for (int v = 0; v < LANES / VL; ++v) {
          float* p = w + i * LANES + v * VL;
          v_store(p, v_fma(u, minus[v], v_load(p)));
        }
      }
    }
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t l = 0; l < used; ++l) {
        b.weight[c * b.rows + r0 + l] = w[c * LANES + l];
        b.pruned[c * b.rows + r0 + l] = pruned[c * LANES + l];
      }
  });
  return true;
}

}  // namespace GP_ISA
}  // namespace gp
