// Scratch memory that outlives the call.
#pragma once

#include <cstdint>

namespace gp {

// 64-byte aligned memory for the length of a call; never throws: ok() says whether it is there. One
// block of up to KEPT bytes goes from call to call: fresh pages cost a fault each, and where other
// code frees as much between two calls (torch's bfloat16 attention does) the C library hands out fresh
// ones every time, a quarter of the time of attention over 512 tokens on a 2-core VM.
class Workspace {
 public:
  static constexpr int64_t KEPT = int64_t{32} << 20;

  explicit Workspace(int64_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  bool ok() const { return block_ != nullptr; }
  template <class T>
  T* as() const { return static_cast<T*>(data()); }

 private:
  struct Block;
  void* data() const;
  Block* block_;
};

}  // namespace gp
