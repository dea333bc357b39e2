// Which instruction set a kernel is compiled for, and which one this machine runs.
//
// Each csrc/cpu/*_kernel.cpp is compiled once per instruction set with GP_ISA set to the name of the
// set, and puts its code in the namespace gp::GP_ISA. Kernels use no std:: templates: an inline
// function compiled for AVX-512 may be the copy that the linker keeps for everybody.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#define GP_X86 1
#else
#define GP_X86 0
#endif

namespace gp {

enum class Isa { scalar = 0, avx2 = 1, avx512 = 2 };

// The best set that the processor and the operating system support, or the one that was forced.
Isa active_isa();
Isa best_isa();
// Force a lower set (tests, benchmarks). Returns false if the machine does not have it.
bool force_isa(Isa isa);
const char* isa_name(Isa isa);

}  // namespace gp

// GP_DECLARE_KERNEL(void, attention_fwd, const AttentionFwdArgs&) declares the kernel in every set.
// GP_KERNEL(attention_fwd) is the pointer to the one to call.
#if GP_X86
#define GP_DECLARE_KERNEL(ret, name, ...)          \
  namespace scalar { ret name(__VA_ARGS__); }      \
  namespace avx2 { ret name(__VA_ARGS__); }        \
  namespace avx512 { ret name(__VA_ARGS__); }
#define GP_KERNEL(name)                                              \
  (::gp::active_isa() == ::gp::Isa::avx512 ? &::gp::avx512::name     \
   : ::gp::active_isa() == ::gp::Isa::avx2 ? &::gp::avx2::name       \
                                           : &::gp::scalar::name)
#else
#define GP_DECLARE_KERNEL(ret, name, ...) \
  namespace scalar { ret name(__VA_ARGS__); }
#define GP_KERNEL(name) (&::gp::scalar::name)
#endif
