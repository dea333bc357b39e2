#include "common/parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
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

thread_local bool inside_run = false;

// What the threads of a run share.
struct Run {
  int64_t items;
  int threads;
  void (*fn)(void*, int64_t, int);
  void* ctx;
  std::exception_ptr error{};
  std::atomic<int64_t> next{0};
  std::atomic<int> joined{0};
  std::atomic<bool> failed{false};

  // Any number of threads may call it, the first `threads` of them work.
  void join() {
    const int thread = joined.fetch_add(1, std::memory_order_relaxed);
    if (thread >= threads) return;
    inside_run = true;
    try {
      for (;;) {
        const int64_t item = next.fetch_add(1, std::memory_order_relaxed);
        if (item >= items) break;
        fn(ctx, item, thread);
      }
    } catch (...) {
      next.store(items, std::memory_order_relaxed);
      if (!failed.exchange(true)) error = std::current_exception();
    }
    inside_run = false;
  }
};

// --- a pool of our own ---------------------------------------------------------------------------

struct Pool {
  std::mutex mutex;
  std::condition_variable wake;
  std::vector<std::thread> workers;
  std::atomic<uint64_t> generation{0};
  // A run waits for the workers that are at work on it, not for those that never woke: on a busy
  // machine these may be milliseconds away. A worker says that it is inside, then looks whether the
  // run is still open; the caller closes the run, then looks whether anybody is inside.
  std::atomic<Run*> open{nullptr};
  std::atomic<int> inside{0};

  void loop(uint64_t seen) {
    for (;;) {
      // A short spin catches back-to-back kernels; then sleep, so that others get the core.
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
      if (Run* run = open.load()) run->join();
      inside.fetch_sub(1);
    }
  }

  void run(Run& r) {
    const uint64_t seen = generation.load(std::memory_order_relaxed);
    while (static_cast<int>(workers.size()) < r.threads - 1)
      workers.emplace_back([this, seen] { loop(seen); });
    open.store(&r);
    {
      std::lock_guard<std::mutex> lock(mutex);
      generation.store(seen + 1, std::memory_order_release);
    }
    wake.notify_all();
    r.join();
    open.store(nullptr);
    int spins = 0;
    while (inside.load() > 0) {
      if (++spins < 4000) GP_PAUSE(); else std::this_thread::yield();
    }
  }
};

// --- OpenMP --------------------------------------------------------------------------------------

// The entry of GNU's runtime, which Intel's and LLVM's have too: runs fn(data) on a team.
using Parallel = void (*)(void (*fn)(void*), void* data, unsigned threads, unsigned flags);
using MaxThreads = int (*)();

struct OpenMp {
  Parallel parallel;
  MaxThreads max_threads;

  void run(Run& r) const {
    // A team of the size that torch's have, or the runtime would end threads and start them again.
    const int most = max_threads();
    parallel([](void* data) { static_cast<Run*>(data)->join(); }, &r,
             unsigned(most > r.threads ? most : r.threads), 0);
  }
};

// --- the choice ----------------------------------------------------------------------------------

std::atomic<Pool*> instance{nullptr};
std::atomic<const OpenMp*> openmp{nullptr};
std::atomic<std::mutex*> busy{nullptr};  // held by the caller for the length of a run
std::once_flag fork_once;

void watch_forks() {
  // A forked child has none of its parent's threads, and perhaps a run in progress that no one will
  // end: it drops all of it (leaked) and makes its own.
  std::call_once(fork_once, [] {
    pthread_atfork(nullptr, nullptr, [] {
      instance.store(nullptr);
      openmp.store(nullptr);
      busy.store(nullptr);
      inside_run = false;
    });
  });
}

// Never destroyed: workers outlive static destructors.
template <class T>
T& make_once(std::atomic<T*>& place) {
  T* p = place.load(std::memory_order_acquire);
  if (p) return *p;
  watch_forks();
  T* fresh = new T();
  if (place.compare_exchange_strong(p, fresh)) return *fresh;
  delete fresh;
  return *p;
}

}  // namespace

bool use_openmp_of(const char* name) {
  void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return false;
  // Looked up in the library and all that it was linked with; it stays open.
  const auto parallel = reinterpret_cast<Parallel>(dlsym(library, "GOMP_parallel"));
  const auto max_threads = reinterpret_cast<MaxThreads>(dlsym(library, "omp_get_max_threads"));
  if (!parallel || !max_threads) return false;
  watch_forks();
  openmp.store(new OpenMp{parallel, max_threads});
  return true;
}

bool uses_openmp() { return openmp.load() != nullptr; }

void parallel_run(int64_t items, int threads, void (*fn)(void*, int64_t, int), void* ctx) {
  if (items <= 0) return;
  if (threads > items) threads = static_cast<int>(items);
  if (threads > 1 && !inside_run) {
    std::unique_lock<std::mutex> lock(make_once(busy), std::try_to_lock);
    if (lock.owns_lock()) {
      Run run{items, threads, fn, ctx};
      if (const OpenMp* team = openmp.load(std::memory_order_acquire)) team->run(run);
      else make_once(instance).run(run);
      if (run.error) std::rethrow_exception(run.error);
      return;
    }
  }
  for (int64_t item = 0; item < items; ++item) fn(ctx, item, 0);
}

Scratch::Scratch(int64_t bytes)
    : data_(std::aligned_alloc(64, static_cast<size_t>((bytes + 127) / 64 * 64))) {}
Scratch::~Scratch() { std::free(data_); }

}  // namespace gp
