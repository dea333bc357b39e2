#include "common/parallel.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define GP_PAUSE() _mm_pause()
#else
#define GP_PAUSE() std::this_thread::yield()
#endif

namespace gp {
namespace {

struct Pool {
  std::mutex busy;  // held by the caller for the length of a run
  std::mutex mutex;
  std::condition_variable wake;
  std::vector<std::thread> workers;
  std::atomic<uint64_t> generation{0};
  std::atomic<int64_t> next{0};
  // A run waits for the workers that are at work on it, not for those that never woke: on a busy
  // machine these may be milliseconds away. A worker says that it is inside, then looks whether the
  // run is still open; the caller closes the run, then looks whether anybody is inside.
  std::atomic<bool> open{false};
  std::atomic<int> inside{0};
  int64_t items = 0;
  int threads = 1;
  void (*fn)(void*, int64_t, int) = nullptr;
  void* ctx = nullptr;

  void work(int thread) {
    for (;;) {
      const int64_t item = next.fetch_add(1, std::memory_order_relaxed);
      if (item >= items) return;
      fn(ctx, item, thread);
    }
  }

  void loop(int thread, uint64_t seen) {
    for (;;) {
      // A short spin catches back-to-back kernels; then sleep, so that torch's threads get the core.
      bool ready = false;
      for (int i = 0; i < 2000 && !ready; ++i) {
        ready = generation.load(std::memory_order_acquire) != seen;
        if (!ready) GP_PAUSE();
      }
      if (!ready) {
        std::unique_lock<std::mutex> lock(mutex);
        wake.wait(lock, [&] { return generation.load(std::memory_order_acquire) != seen; });
      }
      seen = generation.load(std::memory_order_acquire);
      inside.fetch_add(1);
      if (open.load() && thread < threads) work(thread);
      inside.fetch_sub(1);
    }
  }

  void run(int64_t n, int want, void (*f)(void*, int64_t, int), void* c) {
    items = n;
    threads = want;
    fn = f;
    ctx = c;
    next.store(0, std::memory_order_relaxed);
    const uint64_t seen = generation.load(std::memory_order_relaxed);
    while (static_cast<int>(workers.size()) < want - 1) {
      const int id = static_cast<int>(workers.size()) + 1;
      workers.emplace_back([this, id, seen] { loop(id, seen); });
    }
    open.store(true);
    {
      std::lock_guard<std::mutex> lock(mutex);
      generation.store(seen + 1, std::memory_order_release);
    }
    wake.notify_all();
    work(0);
    open.store(false);
    int spins = 0;
    while (inside.load() > 0) {
      if (++spins < 4000) GP_PAUSE(); else std::this_thread::yield();
    }
  }
};

std::atomic<Pool*> instance{nullptr};
std::once_flag fork_once;

Pool& pool() {
  // A forked child has none of its parent's threads: it drops the pool (leaked) and makes its own.
  std::call_once(fork_once, [] {
    pthread_atfork(nullptr, nullptr, [] { instance.store(nullptr, std::memory_order_release); });
  });
  Pool* p = instance.load(std::memory_order_acquire);
  if (p) return *p;
  Pool* fresh = new Pool();  // never destroyed: workers outlive static destructors
  if (instance.compare_exchange_strong(p, fresh)) return *fresh;
  delete fresh;
  return *p;
}

thread_local bool inside = false;

}  // namespace

void parallel_run(int64_t items, int threads, void (*fn)(void*, int64_t, int), void* ctx) {
  if (items <= 0) return;
  if (threads > items) threads = static_cast<int>(items);
  if (threads > 1 && !inside) {
    Pool& p = pool();
    std::unique_lock<std::mutex> lock(p.busy, std::try_to_lock);
    if (lock.owns_lock()) {
      inside = true;
      p.run(items, threads, fn, ctx);
      inside = false;
      return;
    }
  }
  for (int64_t item = 0; item < items; ++item) fn(ctx, item, 0);
}

Scratch::Scratch(int64_t bytes)
    : data_(std::aligned_alloc(64, static_cast<size_t>((bytes + 127) / 64 * 64))) {}
Scratch::~Scratch() { std::free(data_); }

}  // namespace gp
