#include "common/workspace.h"

#include <atomic>
#include <cstdlib>

#include "common/memory.h"

namespace gp {

struct alignas(64) Workspace::Block {
  int64_t bytes;  // behind this header
};

namespace {
std::atomic<void*> kept{nullptr};  // of all threads; who needs memory meanwhile has its own
}  // namespace

Workspace::Workspace(int64_t bytes) : block_(static_cast<Block*>(kept.exchange(nullptr))) {
  if (block_ && block_->bytes >= bytes) return;
  std::free(block_);
  // Huge pages need no more than their size: what a small block leaves of its last one is not touched.
  const int64_t page = int64_t{2} << 20, whole = bytes + int64_t{sizeof(Block)};
  const int64_t align = whole >= page / 2 ? page : 64, size = (whole + align - 1) / align * align;
  block_ = static_cast<Block*>(std::aligned_alloc(size_t(align), size_t(size)));
  if (!block_) return;
  if (align == page) prefer_huge_pages(block_, size);
  block_->bytes = size - int64_t{sizeof(Block)};
}

Workspace::~Workspace() {
  if (block_ && block_->bytes <= KEPT) block_ = static_cast<Block*>(kept.exchange(block_));
  std::free(block_);
}

void* Workspace::data() const { return block_ + 1; }

}  // namespace gp
