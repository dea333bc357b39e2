// The thread pool: every item once, scratch indices in range, runs from many threads and from inside.
#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>

#include "common/parallel.h"

namespace {

int failures = 0;

void expect(bool ok, const char* what) {
  if (!ok) {
    std::printf("FAILED: %s\n", what);
    ++failures;
  }
}

void many_runs(int runs, int threads) {
  for (int run = 0; run < runs; ++run) {
    const int items = run % 37;
    std::vector<std::atomic<int>> seen(items);
    std::atomic<bool> in_range{true};
    gp::parallel_for(items, threads, [&](int64_t item, int thread) {
      seen[item].fetch_add(1);
      if (thread < 0 || thread >= threads) in_range = false;
    });
    bool once = true;
    for (auto& count : seen) once = once && count.load() == 1;
    expect(once, "every item once, and all done on return");
    expect(in_range.load(), "thread index in range");
  }
}

}  // namespace

int main() {
  for (int threads : {1, 2, 5, 3}) many_runs(5000, threads);
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) callers.emplace_back(many_runs, 2000, 3);
  for (auto& caller : callers) caller.join();
  std::atomic<int> inner{0};
  gp::parallel_for(8, 4, [&](int64_t, int) {
    gp::parallel_for(5, 4, [&](int64_t, int) { inner.fetch_add(1); });
  });
  expect(inner.load() == 40, "a run from inside a run");
  std::printf("%s\n", failures ? "FAILED" : "ok");
  return failures != 0;
}
