// A small thread pool of our own. torch brings an OpenMP runtime; a second one beside it leaves
// threads spinning against each other, which on two cores costs more than it brings.
#pragma once

#include <cstdint>

namespace gp {

// Calls fn(ctx, item, thread) for every item in [0, items), on at most `threads` threads, the caller
// among them; `thread` is in [0, threads) and indexes scratch. Items are handed out in order, one at
// a time, so uneven items balance. A call from inside a call, or while another thread uses the pool,
// runs on the caller alone. The result must not depend on which thread runs an item.
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
