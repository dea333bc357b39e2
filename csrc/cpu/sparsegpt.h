// One block of columns of SparseGPT or GPTQ: which weights go, what the rest is rounded to, and the
// steps that spread the errors; and the search for the scales of a group.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace gp {

struct SparseGptBlock {
  int64_t columns, rows, stride;  // of `weight` and `pruned`: from a row to the next
  float* weight;        // as updated so far; afterwards final
  uint8_t* pruned;      // 1: is and stays zero; afterwards all that are pruned
  const float* factor;  // (columns, columns), the block's part of U
  int64_t zeros, group;  // n:m; group 0: `count` of the block's smallest scores go before the sweep
  int64_t count;         // less those that are pruned already; -1: none beside those
  int threads;
  // What is kept is rounded to (clamp(round(w / scale) + zero, low, high) - zero) * scale, with the
  // scale and zero at groups[column] * rows + row; no rounding where `scale` is null.
  const float *scale, *zero;
  const int64_t* groups;
  float low, high;
};

// Candidate scales for the rows of one group of columns, and which costs the least.
struct GridSearch {
  int64_t columns, rows, candidates;
  const float* weight;         // element (column, row) at column * rows + row
  const float* importance;     // of a squared error, one a column
  const float *scale, *zero;   // element (candidate, row) at candidate * rows + row
  float low, high;
  int64_t* best;               // out: the cheapest candidate of each row, the first of equal ones
  int threads;
};

// Returns false when scratch memory is not to be had. The result does not depend on `threads`.
GP_DECLARE_KERNEL(bool, sparsegpt_block, const SparseGptBlock&)
GP_DECLARE_KERNEL(void, grid_search, const GridSearch&)

}  // namespace gp
