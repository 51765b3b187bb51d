// The attention prologue in one launch: norm over the group, partial rotation, K/V write.
//
// Per token: sums of squares of q and of k -> over the block -> over the group's ranks -> apply.
// Blocks walk over the tokens with a stride of the grid and load the next token's rows before they
// wait for this one's sums, so that memory works while the ranks talk. Positions and slots, which
// lead to further loads, are read one token ahead for the same reason.
#pragma once

#include "exchange.cuh"
#include "heads.cuh"

namespace qk_norm_rope {

template <class S>
struct Shared {
  float partial[2][2 * S::kWarps];  // [half][warp][which]: which is 0 for q, 1 for k
  float inverse[2];                 // 1 / RMS of the token's q and k
  typename Angles<S>::Row angles[2];
  Vector weight[S::kTurns][S::kThreads];  // each thread's own: read by nobody else
};

// The sum over a warp of q's and of k's part: lanes 0-15 return q's, the others k's. The halves
// trade parts first, so that both sums take five shuffles and not ten.
__device__ __forceinline__ float warp_sums(float q, float k, uint32_t lane) {
  const bool low = lane < 16;
  float sum = (low ? q : k) + __shfl_xor_sync(kWholeWarp, low ? k : q, 16);
#pragma unroll
  for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, step);
  return sum;
}

// The sum over a block's warps, from their partials: each lane returns that of which = lane & 1.
template <int kWarps>
__device__ __forceinline__ float block_sum(const float* partial, uint32_t lane) {
  static_assert(2 * kWarps <= 32, "a lane for each partial");
  float sum = lane < 2 * kWarps ? partial[lane] : 0.0f;
#pragma unroll
  for (int step = 2; step < 32; step *= 2) sum += __shfl_xor_sync(kWholeWarp, sum, step);
  return sum;
}

// A position or a slot: both fit 32 bits, however they are stored.
__device__ __forceinline__ int32_t index_at(const void* index, bool wide, uint32_t token) {
  return wide ? static_cast<int32_t>(static_cast<const int64_t*>(index)[token])
              : static_cast<const int32_t*>(index)[token];
}

// 1 / RMS of which = lane & 1, from its sum over the group.
__device__ __forceinline__ float inverse_rms(const Params& params, float sum, uint32_t lane) {
  const float divisor = lane & 1u ? params.k_divisor : params.q_divisor;
  return rsqrtf(__fdiv_rn(sum, divisor) + params.eps);
}

// What a thread loads of a token before the sums are known.
template <class S>
struct Loaded {
  Vector x[S::kTurns];
  int32_t position = 0;
  int32_t slot = -1;

  __device__ __forceinline__ void load(const Params& params, uint32_t rank, uint32_t token) {
    if constexpr (S::kRotary > 0) {
      position = index_at(params.positions, params.wide_positions, token);
    }
    if constexpr (S::kCaches) slot = index_at(params.slots, params.wide_slots, token);
#pragma unroll
    for (int turn = 0; turn < S::kTurns; ++turn) {
      const Head<S> head(threadIdx.x, turn);
      if (head.side != Side::none) x[turn] = jit::load<16>(head.at(params, rank, token));
    }
  }

  // This thread's share of the sum over the warp, as warp_sums returns it.
  __device__ __forceinline__ float sums(uint32_t lane) const {
    float q = 0.0f, k = 0.0f;
#pragma unroll
    for (int turn = 0; turn < S::kTurns; ++turn) {
      const Head<S> head(threadIdx.x, turn);
      const float sum = head.normed() ? square_sum<typename S::T>(x[turn]) : 0.0f;
      (head.side == Side::q ? q : k) += sum;
    }
    return warp_sums(q, k, lane);
  }
};

// Norm, rotate and store one vector.
template <class S>
__device__ __forceinline__ void finish(const Params& params, uint32_t rank, uint32_t token,
                                       const Head<S>& head, const Vector& x, const Vector& weight,
                                       float inverse, const typename Angles<S>::Row& angles,
                                       int32_t slot) {
  using T = typename S::T;
  float y[kVector];
  normalize<T>(x, weight, inverse, y);
  // By the whole warp, so before any branch.
  Angles<S>::apply(angles, y, static_cast<int>(threadIdx.x) % S::kLanes);
  Vector rounded = x;
  if (head.normed()) {
    rounded = jit::narrow<T>(y);
    jit::store<16>(head.at(params, rank, token), rounded);
  }
  if constexpr (S::kCaches) {
    if (slot < params.first_slot || (head.side != Side::k && head.side != Side::v)) return;
    const Cache& cache = head.side == Side::k ? params.k_cache : params.v_cache;
    auto* to = cache_at<S>(cache, params, rank, static_cast<uint32_t>(slot), head.column);
    if constexpr (std::is_same_v<typename S::CacheT, T>) {
      jit::store<16>(to, rounded);
    } else {
      if (head.side == Side::v) jit::widen<T>(x, y);
      store_fp8(to, y, cache.scale);
    }
  }
}

// The block's partials -> 1 / RMS of q and of k over the group, returned to every thread.
template <class S>
__device__ __forceinline__ float2 group_inverse(const Params& params, Shared<S>& shared, int half,
                                                uint32_t token,
                                                const Exchange<S::kRanks>& exchange,
                                                const Angles<S>& angles) {
  const uint32_t lane = threadIdx.x % 32;
  __syncthreads();  // the partials of this half are there; the other may still be read
  if constexpr (!S::kExchanges) {
    // Each warp adds the partials up itself, which saves the second barrier.
    const float sum = S::kRanks * block_sum<S::kWarps>(shared.partial[half], lane);
    const float inverse = inverse_rms(params, sum, lane);
    return {__shfl_sync(kWholeWarp, inverse, 0), __shfl_sync(kWholeWarp, inverse, 1)};
  } else {
    if (threadIdx.x < 32) {
      const float sum = exchange.sum(token, block_sum<S::kWarps>(shared.partial[half], lane));
      const float inverse = inverse_rms(params, sum, lane);
      if (lane < 2) shared.inverse[lane] = inverse;
    }
    angles.share(shared.angles[half]);  // not before: they may arrive later than x
    __syncthreads();
    return {shared.inverse[0], shared.inverse[1]};
  }
}

// Grid: x blocks per rank, at most params.tokens and such that all are resident together where
// ranks exchange; y is 1, or with virtual ranks kRanks. Block: S::kThreads.
template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    prologue(const __grid_constant__ Params params) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t rank = S::kVirtual ? blockIdx.y : params.rank;
  SHARED_MEMORY(Shared<S>, shared);

  // Nothing is touched before the kernels ahead in the stream have ended: one of them wrote q, and
  // one may be the call before this, whose epoch must be over.
  jit::grid_dependency_wait();
  if (!S::kExchanges || params.launch_early) jit::grid_dependency_launch();

  Loaded<S> now;
  now.load(params, rank, blockIdx.x);
  // The weights wait in shared memory, where they cost no registers: loaded before the epoch is
  // drawn, stored after it, so that the three ways to memory and back overlap.
  Vector weight[S::kTurns];
#pragma unroll
  for (int turn = 0; turn < S::kTurns; ++turn) {
    weight[turn] = Head<S>(threadIdx.x, turn).weight(params, rank);
  }
  Exchange<S::kRanks> exchange;
  if constexpr (S::kExchanges) {
    if (warp == 0) {
      uint64_t* ticket = params.ticket + (S::kVirtual ? rank : 0);
      exchange.begin(params.buffers, ticket, rank, params.buffer_slots, gridDim.x, lane);
      if (blockIdx.x == 0) exchange.scrub(params.tokens, params.buffer_slots);
    }
  }

#pragma unroll
  for (int turn = 0; turn < S::kTurns; ++turn) shared.weight[turn][threadIdx.x] = weight[turn];

  Angles<S> angles;
  angles.load(params.cos_sin, now.position);
  int half = 0;  // of the partials: a slow warp may still read the other one
  for (uint32_t token = blockIdx.x; token < params.tokens; token += gridDim.x) {
    const bool last = params.tokens - token <= gridDim.x;
    const float sums = now.sums(lane);
    if (lane % 16 == 0) shared.partial[half][2 * warp + lane / 16] = sums;
    Loaded<S> next;
    if (!last) next.load(params, rank, token + gridDim.x);
    if (!S::kExchanges) angles.share(shared.angles[half]);
    const float2 inverse = group_inverse<S>(params, shared, half, token, exchange, angles);
    // Not with the next rows: the position that it needs is on its way with them.
    if (!last) angles.load(params.cos_sin, next.position);
    if (S::kExchanges && last && !params.launch_early) jit::grid_dependency_launch();
#pragma unroll
    for (int turn = 0; turn < S::kTurns; ++turn) {
      const Head<S> head(threadIdx.x, turn);
      finish<S>(params, rank, token, head, now.x[turn], shared.weight[turn][threadIdx.x],
                head.side == Side::q ? inverse.x : inverse.y, shared.angles[half], now.slot);
    }
    now = next;
    half ^= 1;
  }
}

}  // namespace qk_norm_rope
