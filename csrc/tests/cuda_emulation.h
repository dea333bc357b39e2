// Runs a CUDA kernel on the CPU: every thread of a block is a thread, blocks run one after another,
// shared memory is static. It checks a kernel's arithmetic and indices, not its speed, nor races that
// the host's memory order hides.
#pragma once

#include <pthread.h>

#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

#include "common/simd.h"

#define __global__
#define __device__ inline
#define __constant__ static const
#define __shared__ static
#define __launch_bounds__(threads)

struct Index {
  unsigned x;
};
static thread_local Index threadIdx, blockIdx, gridDim;
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

class Barrier {
 public:
  explicit Barrier(unsigned count) { pthread_barrier_init(&barrier_, nullptr, count); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};
static Barrier* block_barrier;
static std::vector<Barrier*> warp_barriers;
inline void __syncthreads() { block_barrier->wait(); }
inline void __syncwarp() { warp_barriers[threadIdx.x / 32]->wait(); }

template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline void __stcs(T* p, T v) { *p = v; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {gp::GP_ISA::float_to_bf16(x)}; }
inline __half __float2half_rn(float x) { return {gp::GP_ISA::float_to_f16(x)}; }

// kernel() with `blocks` blocks of `threads` threads, a multiple of 32.
template <class F>
void emulate(unsigned blocks, unsigned threads, const F& kernel) {
  Barrier all(threads);
  block_barrier = &all;
  for (unsigned w = 0; w < threads / 32; ++w) warp_barriers.push_back(new Barrier(32));
  for (unsigned b = 0; b < blocks; ++b) {
    std::vector<std::thread> block;
    for (unsigned t = 0; t < threads; ++t)
      block.emplace_back([&, t] {
        threadIdx = {t};
        blockIdx = {b};
        gridDim = {blocks};
        kernel();
      });
    for (std::thread& thread : block) thread.join();
  }
  for (Barrier* barrier : warp_barriers) delete barrier;
  warp_barriers.clear();
}
