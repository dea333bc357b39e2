#include "common/memory.h"

#if defined(__linux__)
#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#endif

namespace gp {

namespace {

#if defined(MADV_HUGEPAGE)
// The kernel collapses pages even where huge ones are switched off for everybody.
bool allowed() {
  char modes[64] = {};
  std::FILE* file = std::fopen("/sys/kernel/mm/transparent_hugepage/enabled", "r");
  if (!file) return false;
  const size_t read = std::fread(modes, 1, sizeof(modes) - 1, file);
  std::fclose(file);
  return read > 0 && !std::strstr(modes, "[never]");
}
#endif

}  // namespace

void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / page * page;
  // A kernel without huge pages refuses; the memory is as good without.
  if (last > first) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

void gather_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr int collapse = 25;  // MADV_COLLAPSE, Linux 6.1, which older headers do not name
  constexpr uintptr_t page = uintptr_t(2) << 20;
  static const bool may = allowed();
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / page * page;
  // An older kernel, or one short of free huge pages, refuses; the memory is as good without.
  if (may && last > first) (void)madvise(reinterpret_cast<void*>(first), last - first, collapse);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace gp
