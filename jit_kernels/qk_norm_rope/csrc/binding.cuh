// The entry points of one compiled shape, called from Python through tvm-ffi.
//
// The caller has checked shapes, dtypes, strides and alignment; this only fills Params and launches.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include "kernel.cuh"

namespace qk_norm_rope {

using tvm::ffi::TensorView;
using MaybeTensor = tvm::ffi::Optional<TensorView>;

inline void check(cudaError_t status, const char* doing) {
  if (status != cudaSuccess) {
    TVM_FFI_THROW(RuntimeError) << doing << ": " << cudaGetErrorString(status);
  }
}

template <class S>
struct Binding {
  // Virtual ranks: the tensors' first dimension is the rank.
  static constexpr int kFirst = S::kVirtual ? 1 : 0;

  static Rows rows(const TensorView& x) {
    return {x.data_ptr(), static_cast<uint32_t>(x.stride(kFirst)),
            S::kVirtual ? x.stride(0) : 0};
  }

  static Cache cache(const TensorView& x, double scale) {
    const bool paged = x.ndim() - kFirst == 4;
    return {x.data_ptr(), static_cast<uint32_t>(x.stride(kFirst)),
            static_cast<uint32_t>(paged ? x.stride(kFirst + 1) : 0),
            S::kVirtual ? x.stride(0) : 0, static_cast<float>(scale)};
  }

  static bool wide(const TensorView& index) { return index.dtype().bits == 64; }

  // Blocks of this kernel that are resident on the device at the same time.
  static int64_t resident_blocks(int64_t device) {
    int blocks = 0, multiprocessors = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, prologue<S>, S::kThreads, 0),
          "asking for the occupancy");
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount,
                                 static_cast<int>(device)),
          "asking for the multiprocessors");
    return static_cast<int64_t>(blocks) * multiprocessors;
  }

  // What a launch is given; calls nothing of CUDA. v, slots and the caches: absent without a cache.
  // positions and cos_sin: absent without a rotation. pointers and ticket: absent without an
  // exchange.
  static Params params(TensorView q, TensorView k, TensorView q_weight, TensorView k_weight,
                       double q_divisor, double k_divisor, double eps, MaybeTensor positions,
                       MaybeTensor cos_sin, MaybeTensor v, MaybeTensor k_cache,
                       MaybeTensor v_cache, MaybeTensor slots, double k_scale, double v_scale,
                       int64_t first_slot, MaybeTensor pointers, MaybeTensor ticket, int64_t rank,
                       int64_t buffer_slots, bool launch_early) {
    Params params{};
    params.q = rows(q);
    params.k = rows(k);
    params.q_weight = q_weight.data_ptr();
    params.k_weight = k_weight.data_ptr();
    params.q_divisor = static_cast<float>(q_divisor);
    params.k_divisor = static_cast<float>(k_divisor);
    params.eps = static_cast<float>(eps);
    params.tokens = static_cast<uint32_t>(q.size(kFirst));
    params.page_size = 1;
    if constexpr (S::kRotary > 0) {
      params.positions = positions.value().data_ptr();
      params.wide_positions = wide(positions.value());
      params.cos_sin = static_cast<const float*>(cos_sin.value().data_ptr());
    }
    if constexpr (S::kCaches) {
      params.v = rows(v.value());
      params.k_cache = cache(k_cache.value(), k_scale);
      params.v_cache = cache(v_cache.value(), v_scale);
      params.slots = slots.value().data_ptr();
      params.wide_slots = wide(slots.value());
      params.first_slot = static_cast<int32_t>(first_slot);
      if (k_cache.value().ndim() - kFirst == 4) {
        params.page_size = static_cast<uint32_t>(k_cache.value().size(kFirst + 1));
      }
    }
    if constexpr (S::kExchanges) {
      params.buffers = static_cast<const uint64_t*>(pointers.value().data_ptr());
      params.ticket = static_cast<uint64_t*>(ticket.value().data_ptr());
      params.buffer_slots = static_cast<uint32_t>(buffer_slots);
      params.rank = static_cast<uint32_t>(rank);
      params.launch_early = launch_early;
    }
    return params;
  }

  // Launch on the current stream, with the arguments of `params`. blocks: of the grid, a rank.
  // dependent: a programmatic dependent launch.
  static void launch(TensorView q, TensorView k, TensorView q_weight, TensorView k_weight,
                     double q_divisor, double k_divisor, double eps, MaybeTensor positions,
                     MaybeTensor cos_sin, MaybeTensor v, MaybeTensor k_cache, MaybeTensor v_cache,
                     MaybeTensor slots, double k_scale, double v_scale, int64_t first_slot,
                     MaybeTensor pointers, MaybeTensor ticket, int64_t rank, int64_t buffer_slots,
                     int64_t blocks, bool dependent, bool launch_early) {
    start(params(q, k, q_weight, k_weight, q_divisor, k_divisor, eps, positions, cos_sin, v,
                 k_cache, v_cache, slots, k_scale, v_scale, first_slot, pointers, ticket, rank,
                 buffer_slots, launch_early),
          q.device(), static_cast<unsigned>(blocks), dependent);
  }

 private:
  static void start(const Params& params, DLDevice device, unsigned blocks, bool dependent) {
    cudaLaunchAttribute attributes[2] = {};
    unsigned count = 0;
    if (dependent) {
      attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (S::kVirtual) {
      // All ranks poll one another: the launch fails unless all of them are resident together.
      attributes[count].id = cudaLaunchAttributeCooperative;
      attributes[count++].val.cooperative = 1;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks, S::kVirtual ? S::kRanks : 1);
    config.blockDim = dim3(S::kThreads);
    config.stream = static_cast<cudaStream_t>(
        TVMFFIEnvGetStream(device.device_type, device.device_id));
    config.attrs = attributes;
    config.numAttrs = count;
    check(cudaLaunchKernelEx(&config, prologue<S>, params), "launching the attention prologue");
  }
};

}  // namespace qk_norm_rope

#define QK_NORM_ROPE_EXPORT(...)                                                        \
  using CompiledBinding = qk_norm_rope::Binding<qk_norm_rope::Shape<__VA_ARGS__>>;      \
  TVM_FFI_DLL_EXPORT_TYPED_FUNC(launch, CompiledBinding::launch);                       \
  TVM_FFI_DLL_EXPORT_TYPED_FUNC(resident_blocks, CompiledBinding::resident_blocks)
