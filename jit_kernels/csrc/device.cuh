// What the kernels need of the platform. They use nothing else that is not plain C++, except:
//
//   __global__ __device__ __forceinline__ __launch_bounds__ __grid_constant__
//   threadIdx.x  blockIdx.x/.y  blockDim.x  gridDim.x/.y
//   __syncthreads()  __syncwarp(mask)
//   __shfl_xor_sync, __shfl_sync   of float, uint32_t, int; optional width
//   atomicAdd(unsigned long long*, unsigned long long)
//   rsqrtf  __fdiv_rn  fminf  fmaxf  __float_as_uint  __uint_as_float
//
// and numbers.cuh (16-byte vectors and conversions), plain C++ over the CUDA headers. So a small
// emulator can run the same kernel sources as a host program: with JIT_KERNELS_ON_CPU defined,
// on_cpu.h stands in for all of the above and for what this header defines.
#pragma once

#ifdef JIT_KERNELS_ON_CPU
#include "on_cpu.h"
#else

#include <cstdint>

#include <cuda_runtime.h>

// Storage of one block, uninitialised: a variable `name` of `Type`, which is trivial (may be an
// array through an alias). At most one per name and kernel instantiation.
#define SHARED_MEMORY(Type, name) __shared__ Type name

namespace jit {

// Load and store one aligned 64-bit word at system scope, relaxed: the word is never torn, also
// where another GPU wrote it, and neither orders any other access.
__device__ __forceinline__ uint64_t ld_relaxed_sys(const uint64_t* address) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void st_relaxed_sys(uint64_t* address, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

// Programmatic dependent launch. `wait` returns when the kernels before this one in the stream
// have ended and their writes are visible; `launch` lets the next kernel start its blocks once
// every block of this grid has called it or ended. No-ops before sm_90, and where the launch did
// not ask for it.
__device__ __forceinline__ void grid_dependency_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void grid_dependency_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace jit

#endif  // JIT_KERNELS_ON_CPU
