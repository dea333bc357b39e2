// Huge pages under memory that is there already: its numbers stay, wherever it begins and ends.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "common/memory.h"

int main() {
  const int64_t page = int64_t(2) << 20, whole = 5 * page;
  auto* data = static_cast<unsigned char*>(std::aligned_alloc(size_t(page), size_t(whole)));
  if (!data) return 1;
  int failures = 0;
  const int64_t pieces[][2] = {{0, 0}, {0, 1}, {1, page}, {0, whole}, {64, whole - 128}, {page, page}};
  for (const auto& piece : pieces) {
    for (int64_t i = 0; i < whole; ++i) data[i] = static_cast<unsigned char>(i * 2654435761u >> 24);
    gp::prefer_huge_pages(data + piece[0], piece[1]);
    gp::gather_huge_pages(data + piece[0], piece[1]);
    for (int64_t i = 0; i < whole; ++i)
      if (data[i] != static_cast<unsigned char>(i * 2654435761u >> 24)) {
        std::printf("FAILED: byte %ld after %ld bytes from %ld\n", long(i), long(piece[1]),
                    long(piece[0]));
        ++failures;
        break;
      }
  }
  gp::gather_huge_pages(nullptr, 0);
  std::free(data);
  std::printf("%s\n", failures ? "FAILED" : "ok");
  return failures != 0;
}
