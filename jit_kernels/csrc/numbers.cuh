// Eight numbers at a time: vectors of 16 (or 8) bytes and their conversions to and from fp32.
// Plain C++ over the CUDA headers, whose host versions round the same way, so that an emulator
// includes this file as it is (after device.cuh, which defines the function specifiers).
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "device.cuh"

namespace jit {

constexpr int kVector = 8;  // elements of one vector

// `Bytes` bytes that move in one access.
template <int Bytes>
struct alignas(Bytes) Packed {
  uint32_t word[Bytes / 4];
};

template <int Bytes>
__device__ __forceinline__ Packed<Bytes> load(const void* address) {
  return *static_cast<const Packed<Bytes>*>(address);
}

template <int Bytes>
__device__ __forceinline__ void store(void* address, const Packed<Bytes>& value) {
  *static_cast<Packed<Bytes>*>(address) = value;
}

template <class To, class From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the sizes differ");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// What a type of number needs: the vector of eight, and pairs to and from fp32.
template <class T>
struct Number;

template <>
struct Number<__nv_bfloat16> {
  using Vector = Packed<16>;
  static __device__ __forceinline__ float2 wide(uint32_t pair) {
    return __bfloat1622float2(bits_as<__nv_bfloat162>(pair));
  }
  static __device__ __forceinline__ uint32_t narrow(float low, float high) {
    return bits_as<uint32_t>(__floats2bfloat162_rn(low, high));
  }
};

template <>
struct Number<__half> {
  using Vector = Packed<16>;
  static __device__ __forceinline__ float2 wide(uint32_t pair) {
    return __half22float2(bits_as<__half2>(pair));
  }
  static __device__ __forceinline__ uint32_t narrow(float low, float high) {
    return bits_as<uint32_t>(__floats2half2_rn(low, high));
  }
};

// FP8, to which values only go: beyond the largest finite one they saturate, NaN stays NaN.
template <__nv_fp8_interpretation_t Format>
struct Fp8 {
  using Vector = Packed<8>;
  static __device__ __forceinline__ uint32_t narrow(float low, float high) {
    return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, Format);
  }
};

template <>
struct Number<__nv_fp8_e4m3> : Fp8<__NV_E4M3> {};

template <>
struct Number<__nv_fp8_e5m2> : Fp8<__NV_E5M2> {};

// Eight numbers of bf16 or fp16 as fp32.
template <class T>
__device__ __forceinline__ void widen(const Packed<16>& from, float (&to)[kVector]) {
  for (int i = 0; i < kVector / 2; ++i) {
    const float2 pair = Number<T>::wide(from.word[i]);
    to[2 * i] = pair.x;
    to[2 * i + 1] = pair.y;
  }
}

// Eight fp32 numbers, each rounded once to T.
template <class T>
__device__ __forceinline__ typename Number<T>::Vector narrow(const float (&from)[kVector]) {
  typename Number<T>::Vector to;
  if constexpr (sizeof(to) == 16) {
    for (int i = 0; i < 4; ++i) to.word[i] = Number<T>::narrow(from[2 * i], from[2 * i + 1]);
  } else {
    for (int i = 0; i < 2; ++i) {
      to.word[i] = Number<T>::narrow(from[4 * i], from[4 * i + 1]) |
                   Number<T>::narrow(from[4 * i + 2], from[4 * i + 3]) << 16;
    }
  }
  return to;
}

}  // namespace jit
