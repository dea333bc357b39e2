// One block of columns of SparseGPT: which weights go, and the steps that spread their errors.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace gp {

// All matrices hold one column of the weight after the other: element (column, row) of `weight`,
// `pruned` and `errors` is at column * rows + row.
struct SparseGptBlock {
  int64_t columns, rows;
  float* weight;        // as updated so far; afterwards final
  uint8_t* pruned;      // 1: is and stays zero; afterwards all that are pruned
  float* errors;        // out: (weight - kept) / diagonal, for the columns after the block
  const float* factor;  // row j of U at factor + j * factor_stride, from the block's diagonal on
  int64_t factor_stride;
  int64_t zeros, group;  // n:m; group 0: `count` of the block's smallest scores go before the sweep
  int64_t count;         // less those that are pruned already; -1: none beside those
  int threads;
};

// Returns false when scratch memory is not to be had. The result does not depend on `threads`.
GP_DECLARE_KERNEL(bool, sparsegpt_block, const SparseGptBlock&)

}  // namespace gp
