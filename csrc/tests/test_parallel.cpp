// Threads, our own and OpenMP's: every item once, scratch indices in range, runs from many threads and
// from inside, exceptions, a forked child.
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <stdexcept>
#include <string>
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

void exceptions() {
  for (int thrower : {0, 1, 7, 63}) {
    std::atomic<int> done{0};
    std::string caught;
    try {
      gp::parallel_for(64, 3, [&](int64_t item, int) {
        if (item == thrower) throw std::runtime_error("item " + std::to_string(item));
        done.fetch_add(1);
      });
    } catch (const std::runtime_error& error) {
      caught = error.what();
    }
    expect(caught == "item " + std::to_string(thrower), "the exception reaches the caller");
    expect(done.load() >= thrower && done.load() < 64, "what was begun before it is done");
    many_runs(50, 3);
  }
}

// How many threads work on one run; the items take long enough for all to come.
int workers(int threads) {
  std::atomic<int> mask{0};
  gp::parallel_for(64, threads, [&](int64_t, int thread) {
    mask.fetch_or(1 << thread);
    usleep(300);
  });
  return __builtin_popcount(unsigned(mask.load()));
}

bool forked_child_works() {
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);  // a hang is a failure
    many_runs(200, 3);
    _exit(failures != 0 || gp::uses_openmp());
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

void everything() {
  for (int threads : {1, 2, 5, 3}) many_runs(5000, threads);
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) callers.emplace_back(many_runs, 2000, 3);
  for (auto& caller : callers) caller.join();
  std::atomic<int> inner{0};
  gp::parallel_for(8, 4, [&](int64_t, int) {
    gp::parallel_for(5, 4, [&](int64_t, int) { inner.fetch_add(1); });
  });
  expect(inner.load() == 40, "a run from inside a run");
  exceptions();
  expect(workers(3) == 3 && workers(2) == 2 && workers(1) == 1, "as many threads as asked for");
  expect(forked_child_works(), "a forked child has threads of its own");
}

}  // namespace

int main() {
  everything();
  expect(!gp::use_openmp_of("libno_such_library.so"), "a library that is not loaded");
  expect(!gp::use_openmp_of("libc.so.6") && !gp::uses_openmp(), "a library without OpenMP");
  if (dlopen("libgomp.so.1", RTLD_NOW)) {
    expect(gp::use_openmp_of("libgomp.so.1") && gp::uses_openmp(), "a library with OpenMP");
    everything();
    expect(gp::uses_openmp(), "a fork changes nothing in the parent");
  } else {
    std::printf("no libgomp.so.1: OpenMP's threads are not tested here\n");
  }
  std::printf("%s\n", failures ? "FAILED" : "ok");
  return failures != 0;
}
