// How the quantize kernels cut their work, and tell what they found. Included by them only.
#pragma once

#include "common/parallel.h"
#include "cpu/quantize.h"

namespace gp {
namespace GP_ISA {

// Elements of one work item: 64 KB of fp32, fits a core's L2.
constexpr int64_t kChunk = 16384;

constexpr float kTiny = 1.17549435e-38f;  // the smallest normal number: no scale is below it

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Calls fn(block, first element, count) for each block of `block` consecutive ones of n elements.
template <class F>
static inline void for_blocks(int64_t n, int64_t block, int threads, const F& fn) {
  const int64_t blocks = ceil_div(n, block), per_item = most(1, kChunk / block);
  parallel_for(ceil_div(blocks, per_item), threads, [&](int64_t item, int) {
    for (int64_t b = item * per_item; b < least(blocks, (item + 1) * per_item); ++b)
      fn(b, b * block, least(block, n - b * block));
  });
}

// The first thing found, from any thread.
class Found {
 public:
  void set(QuantizeStatus status) { __atomic_store_n(&value_, int(status), __ATOMIC_RELAXED); }
  int get() const { return __atomic_load_n(&value_, __ATOMIC_RELAXED); }

 private:
  int value_ = 0;
};

}  // namespace GP_ISA
}  // namespace gp
