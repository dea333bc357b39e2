// Threads for the kernels: those of the OpenMP runtime that torch has loaded, or a small pool of our
// own. Between two operations of torch its OpenMP threads spin for milliseconds, and threads beside
// them wait for a time slice where no core is idle. (The embedded model with quantized layers, a prompt
// of 256 tokens on two cores: 31 ms with threads of our own, 24 with torch's.)
#pragma once

#include <cstdint>

namespace gp {

// Calls fn(ctx, item, thread) for every item in [0, items), on at most `threads` threads, the caller
// among them; `thread` is in [0, threads) and indexes scratch. Items are handed out in order, one at
// a time, so uneven items balance. A call from inside a call, or while another thread uses the pool,
// runs on the caller alone. The result must not depend on which thread runs an item. If fn throws,
// items not yet begun are left out, and the first exception is thrown again when all threads are done.
void parallel_run(int64_t items, int threads, void (*fn)(void*, int64_t, int), void* ctx);

template <class F>
inline void parallel_for(int64_t items, int threads, F&& body) {
  auto* p = &body;
  using P = decltype(p);
  parallel_run(
      items, threads,
      [](void* ctx, int64_t item, int thread) { (*static_cast<P>(ctx))(item, thread); },
      const_cast<void*>(static_cast<const void*>(p)));
}

// From now on threads come from the OpenMP runtime that the loaded library `name` (its SONAME or
// path) uses; false, and nothing changes, where it is not loaded or uses none. A forked child goes
// back to a pool of our own: no OpenMP runtime promises to work there.
bool use_openmp_of(const char* name);
bool uses_openmp();

// 64-byte aligned scratch memory that frees itself; never throws: ok() says whether it is there.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  bool ok() const { return data_ != nullptr; }
  template <class T>
  T* as() const { return static_cast<T*>(data_); }

 private:
  void* data_;
};

}  // namespace gp
