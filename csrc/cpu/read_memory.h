// Reads memory and does next to nothing with it: what the machine's read bandwidth is.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace gp {

// The exclusive or of all 8-byte words of `data`; bytes beyond a multiple of 8 are left out.
GP_DECLARE_KERNEL(uint64_t, read_memory, const void* data, int64_t bytes, int threads)

}  // namespace gp
