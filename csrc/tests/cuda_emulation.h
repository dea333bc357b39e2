// Runs CUDA kernels on the CPU: every thread of a block is a fiber, which runs until it waits at a
// barrier or in a shuffle; blocks run one after another; shared memory is static. It checks a
// kernel's arithmetic and indices, not its speed, nor races that the fibers' order hides.
//
// Include it before a .cu file, and the file's entry points are those of the library, on host
// memory.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <initializer_list>
#include <vector>

#include "common/simd.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#define __global__
#define __device__ inline
#define __constant__ static const
#define __shared__ static
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
static Index threadIdx, blockIdx, gridDim;
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

// --- threads -------------------------------------------------------------------------------------

namespace emulation {

constexpr size_t kStack = 128 * 1024;

struct Block {
  const std::function<void()>* kernel;
  ucontext_t host;
  std::vector<ucontext_t> fibers;
  std::vector<bool> done;
  unsigned current;
};
static Block* block;

// On to the next fiber that is not done; back to the host after the last.
inline void next(ucontext_t* from) {
  const unsigned count = unsigned(block->fibers.size());
  for (unsigned i = 1; i <= count; ++i) {
    const unsigned to = (block->current + i) % count;
    if (block->done[to]) continue;
    block->current = to;
    threadIdx = {to};
    if (&block->fibers[to] != from) swapcontext(from, &block->fibers[to]);
    return;
  }
  swapcontext(from, &block->host);
}

inline void enter() {
  (*block->kernel)();
  block->done[block->current] = true;
  next(&block->fibers[block->current]);
}

class Barrier {
 public:
  explicit Barrier(unsigned count) : count_(count) {}
  void wait() {
    const unsigned turn = turn_;
    if (++here_ == count_) {
      here_ = 0;
      ++turn_;
    }
    while (turn == turn_) next(&block->fibers[block->current]);
  }

 private:
  unsigned count_, here_ = 0, turn_ = 0;
};
static std::vector<Barrier> barriers;  // of the block, then of its warps

struct Exchange {  // what the lanes of a warp bring; two, so that one barrier is enough
  uint32_t words[2][32][6];
  unsigned turn[32];
};
static std::vector<Exchange> exchanges;

// kernel() with `blocks` blocks of `threads` threads, a multiple of 32.
inline void run(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  static std::vector<char> stacks;  // kept: fresh memory costs more than most kernels
  if (stacks.size() < threads * kStack) stacks = std::vector<char>(threads * kStack);
#if defined(__SANITIZE_ADDRESS__)
  // The last frame of a fiber is never left: its guards would stay.
  __asan_unpoison_memory_region(stacks.data(), stacks.size());
#endif
  gridDim = {blocks};
  for (unsigned b = 0; b < blocks; ++b) {
    blockIdx = {b};
    barriers.assign(1, Barrier(threads));
    barriers.resize(1 + threads / 32, Barrier(32));
    exchanges.assign(threads / 32, Exchange{});
    Block state{&kernel, {}, std::vector<ucontext_t>(threads), std::vector<bool>(threads), 0};
    block = &state;
    for (unsigned t = 0; t < threads; ++t) {
      ucontext_t& fiber = state.fibers[t];
      getcontext(&fiber);
      fiber.uc_stack.ss_sp = stacks.data() + t * kStack;
      fiber.uc_stack.ss_size = kStack;
      fiber.uc_link = nullptr;
      makecontext(&fiber, enter, 0);
    }
    threadIdx = {0};
    swapcontext(&state.host, &state.fibers[0]);
  }
}

}  // namespace emulation

template <class F>
void emulate(unsigned blocks, unsigned threads, const F& kernel) {
  emulation::run(blocks, threads, kernel);
}
inline void __syncthreads() { emulation::barriers[0].wait(); }
inline void __syncwarp() { emulation::barriers[1 + threadIdx.x / 32].wait(); }

// What each lane of the warp brought, in words.
inline const uint32_t (*exchange(std::initializer_list<uint32_t> mine))[6] {
  emulation::Exchange& warp = emulation::exchanges[threadIdx.x / 32];
  const unsigned turn = warp.turn[threadIdx.x % 32]++ % 2;
  std::copy(mine.begin(), mine.end(), warp.words[turn][threadIdx.x % 32]);
  __syncwarp();
  return warp.words[turn];
}
inline float shuffle(float value, unsigned from) {
  return gp::GP_ISA::bits_to_float(exchange({gp::GP_ISA::float_to_bits(value)})[from % 32][0]);
}
inline float __shfl_sync(unsigned, float value, int lane) { return shuffle(value, unsigned(lane)); }
inline float __shfl_xor_sync(unsigned, float value, int mask) {
  return shuffle(value, threadIdx.x ^ unsigned(mask));
}

// --- arithmetic ----------------------------------------------------------------------------------

template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline void __stcs(T* p, T v) { *p = v; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
inline uint32_t __float_as_uint(float x) { return gp::GP_ISA::float_to_bits(x); }
inline float __uint_as_float(uint32_t bits) { return gp::GP_ISA::bits_to_float(bits); }
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const int byte = selector >> 4 * i & 15;
    if (byte > 7) std::abort();  // the sign of a byte: not emulated
    out |= uint32_t(bytes >> 8 * byte & 255) << 8 * i;
  }
  return out;
}

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {gp::GP_ISA::float_to_bf16(x)}; }
inline __half __float2half_rn(float x) { return {gp::GP_ISA::float_to_f16(x)}; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline float __half2float(__half x) { return gp::GP_ISA::f16_to_float(x.bits); }

// Two 16-bit numbers in a word; Type says what a number is.
template <class Type>
uint32_t emulated_fma2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out = 0;
  for (int shift : {0, 16}) {
    const auto value = [shift](uint32_t word) { return Type::value(uint16_t(word >> shift)); };
    out |= uint32_t(Type::bits(std::fma(value(a), value(b), value(c)))) << shift;
  }
  return out;
}

// mma.m16n8k16, as PTX places its operands: lane 4g + t holds of a, 16 x 16, rows g (words 0 and 2)
// and g + 8 (1 and 3), columns 2t, 2t + 1 (0 and 1) and those 8 further (2 and 3); of b, 16 x 8,
// column g at the same rows (words 4 and 5); of c rows g and g + 8, columns 2t and 2t + 1. Products
// are exact; the hardware's order of additions is its own, and so is this one.
template <class Type>
void emulated_mma(float (&c)[4], std::initializer_list<uint32_t> mine) {
  const uint32_t(*lanes)[6] = exchange(mine);
  const auto number = [&](unsigned lane, int word, int k) {
    return Type::value(uint16_t(lanes[lane][word] >> 16 * (k % 2)));
  };
  const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (unsigned i = 0; i < 4; ++i)
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned from = k % 8 / 2, far = k / 8;
      const float a = number(4 * g + from, int(i / 2 + 2 * far), int(k));
      c[i] = std::fma(a, number(4 * (2 * t + i % 2) + from, int(4 + far), int(k)), c[i]);
    }
}

// --- the runtime: one device, number 0 -----------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidDevice = 101,
  cudaErrorMisalignedAddress = 716,
};
using cudaStream_t = void*;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 2;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorMisalignedAddress: return "misaligned address";
  }
  return "unrecognized error code";
}

#define GP_LAUNCH(kernel, blocks, threads, stream, ...)                 \
  ((void)(stream), emulate(blocks, threads, [&] { kernel(__VA_ARGS__); }))
