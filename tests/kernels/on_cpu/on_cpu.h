// What CUDA source sees when it is compiled as C++ for the emulator in this folder.
//
// Names and meaning are CUDA's. Everything that a thread could do to another goes through functions
// of machine.cpp, warp.cpp and memory.cpp; plain loads and stores reach memory.cpp through the
// compiler's -fsanitize=thread hooks. A source location travels along: an error names its line.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <vector_types.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "calls.h"

#undef __launch_bounds__
#undef __grid_constant__
#define __launch_bounds__(...)
#define __grid_constant__

#define ON_CPU_HERE ::on_cpu::Where where = ::on_cpu::Where::current()

#define threadIdx (::on_cpu::thread_index())
#define blockIdx (::on_cpu::block_index())
#define blockDim (::on_cpu::block_size())
#define gridDim (::on_cpu::grid_size())

// One object a block, shared by its threads.
#define SHARED_MEMORY(Type, name)                                                       \
  std::type_identity_t<Type>& name = *static_cast<std::type_identity_t<Type>*>(          \
      ::on_cpu::shared_memory(#name, sizeof(Type), alignof(Type), ::on_cpu::Where::current()))

inline void __syncthreads(ON_CPU_HERE) { on_cpu::sync_threads(where); }
inline void __syncwarp(unsigned mask = 0xffffffffu, ON_CPU_HERE) { on_cpu::sync_warp(mask, where); }

template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, ON_CPU_HERE) {
  static_assert(sizeof(T) == 4);
  return std::bit_cast<T>(
      on_cpu::shuffle_xor(mask, std::bit_cast<std::uint32_t>(value), lanes, width, where));
}

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32, ON_CPU_HERE) {
  static_assert(sizeof(T) == 4);
  return std::bit_cast<T>(
      on_cpu::shuffle_from(mask, std::bit_cast<std::uint32_t>(value), lane, width, where));
}

inline unsigned long long atomicAdd(unsigned long long* word, unsigned long long value,
                                    ON_CPU_HERE) {
  return on_cpu::atomic_add(reinterpret_cast<std::uint64_t*>(word), value, where);
}

inline float __fdiv_rn(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }

namespace jit {

inline std::uint64_t ld_relaxed_sys(const std::uint64_t* word, ON_CPU_HERE) {
  return on_cpu::load_word(word, where);
}
inline void st_relaxed_sys(std::uint64_t* word, std::uint64_t value, ON_CPU_HERE) {
  on_cpu::store_word(word, value, where);
}
inline void grid_dependency_wait() { on_cpu::wait_for_previous_grid(); }
inline void grid_dependency_launch() { on_cpu::let_next_grid_start(); }

}  // namespace jit
