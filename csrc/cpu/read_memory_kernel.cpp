#include "cpu/read_memory.h"

#include "common/parallel.h"

namespace gp {
namespace GP_ISA {

uint64_t read_memory(const void* data, int64_t bytes, int threads) {
  constexpr int64_t ITEM = 1 << 17;  // words: 1 MiB
  const uint64_t* words = static_cast<const uint64_t*>(data);
  const int64_t n = bytes / 8;
  uint64_t total = 0;
  parallel_for((n + ITEM - 1) / ITEM, threads, [&](int64_t item, int) {
    const int64_t last = (item + 1) * ITEM < n ? (item + 1) * ITEM : n;
    uint64_t x = 0;
    for (int64_t i = item * ITEM; i < last; ++i) x ^= words[i];
    __atomic_fetch_xor(&total, x, __ATOMIC_RELAXED);
  });
  return total;
}

}  // namespace GP_ISA
}  // namespace gp
