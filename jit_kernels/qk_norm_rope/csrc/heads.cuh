// Who does what in a block, and the arithmetic of a head.
//
// A thread holds one vector (8 elements, 16 bytes) of a head, so head_dim / 8 lanes, a team, hold a
// head. A block serves one token at a time, and team t takes the heads t, t + teams, ... of
// [q heads | k heads | v heads]; v's only where there is a cache to copy them to.
#pragma once

#include <type_traits>

#include "../../csrc/numbers.cuh"
#include "params.cuh"

namespace qk_norm_rope {

using jit::kVector;
using Vector = jit::Packed<16>;

constexpr uint32_t kWholeWarp = 0xFFFFFFFFu;

// The shape that a kernel is compiled for. T: of q, k, v and the norm weights. CacheT: of the K/V
// cache, void where none is written. Heads are this rank's. kRotary: 0 where nothing turns.
// kVirtual: all ranks in one grid whose y is the rank, over tensors stacked by rank.
// kExchange: false replaces the group's sum by kRanks times the own one, to measure the exchange.
template <class T_, class CacheT_, int kQHeads_, int kKvHeads_, int kHeadDim_, int kRotary_,
          int kRanks_, bool kVirtual_ = false, bool kExchange_ = true>
struct Shape {
  using T = T_;
  using CacheT = CacheT_;
  static constexpr int kQHeads = kQHeads_, kKvHeads = kKvHeads_, kHeadDim = kHeadDim_;
  static constexpr int kRotary = kRotary_, kRanks = kRanks_;
  static constexpr bool kVirtual = kVirtual_;
  static constexpr bool kExchanges = kExchange_ && kRanks > 1;
  static constexpr bool kCaches = !std::is_void_v<CacheT>;

  static constexpr int kHeads = kQHeads + kKvHeads + (kCaches ? kKvHeads : 0);
  static constexpr int kLanes = kHeadDim / kVector;
  static_assert(kLanes == 8 || kLanes == 16 || kLanes == 32, "head_dim is 64, 128 or 256");
  static_assert(kRotary % (2 * kVector) == 0 && kRotary <= kHeadDim, "a vector turns as a whole");

  // At most 512 threads, with the heads dealt evenly: a block of twice the threads would leave one
  // block on a multiprocessor, which then idles at each of its barriers.
  static constexpr int kMaxThreads = 512;
  static constexpr int kTurns = (kHeads * kLanes + kMaxThreads - 1) / kMaxThreads;
  static constexpr int kThreads = ((kHeads + kTurns - 1) / kTurns * kLanes + 31) / 32 * 32;
  static constexpr int kTeams = kThreads / kLanes;
  static constexpr int kWarps = kThreads / 32;
  // Blocks on a multiprocessor that the compiler makes room for: 1024 threads of 64 registers.
  static constexpr int kBlocks = 1024 / kThreads;
  static_assert(kBlocks >= 2, "one block would leave the multiprocessor idle at its barriers");
};

enum class Side { q, k, v, none };

// A head of one team: which tensor it is in, and the column of this thread's vector.
template <class S>
struct Head {
  Side side;
  int column;

  __device__ __forceinline__ Head(uint32_t thread, int turn) {
    const int head = static_cast<int>(thread) / S::kLanes + turn * S::kTeams;
    const bool all_q = (turn + 1) * S::kTeams <= S::kQHeads;  // known to the compiler
    const int first_v = S::kQHeads + S::kKvHeads;
    side = all_q || head < S::kQHeads ? Side::q
           : head < first_v  ? Side::k
           : head < S::kHeads ? Side::v
                              : Side::none;
    const int first = side == Side::q ? 0 : head < first_v ? S::kQHeads : first_v;
    column = (head - first) * S::kHeadDim + static_cast<int>(thread) % S::kLanes * kVector;
  }

  __device__ __forceinline__ bool normed() const { return side == Side::q || side == Side::k; }

  // This thread's vector in a token's row. The product is 64-bit, since rows of a long batch pass
  // 2^31 elements; its factors are 32-bit, which takes half the registers.
  __device__ __forceinline__ typename S::T* at(const Params& params, uint32_t rank,
                                               uint32_t token) const {
    const Rows& rows = side == Side::q ? params.q : side == Side::k ? params.k : params.v;
    const uint64_t offset = static_cast<uint64_t>(token) * rows.stride;
    const int64_t virtual_offset = S::kVirtual ? rank * rows.rank_stride : 0;
    return static_cast<typename S::T*>(rows.data) + offset + virtual_offset + column;
  }

  __device__ __forceinline__ Vector weight(const Params& params, uint32_t rank) const {
    if (!normed()) return Vector{};
    const int width = (side == Side::q ? S::kQHeads : S::kKvHeads) * S::kHeadDim;
    const void* weights = side == Side::q ? params.q_weight : params.k_weight;
    const int64_t offset = (S::kVirtual ? static_cast<int64_t>(rank) * width : 0) + column;
    return jit::load<16>(static_cast<const typename S::T*>(weights) + offset);
  }
};

// A token's row of the cos/sin cache: on its way to shared memory a vector in each of a few
// threads, then read by all. It is the same for all heads; in registers it would take 16 a thread.
template <class S>
class Angles {
  static constexpr int kHalf = S::kRotary / 2 / kVector;  // lanes of half the rotated dimensions
  static constexpr int kCopiers = S::kRotary / 4;         // threads, the last ones of the block
  static_assert(kCopiers <= S::kThreads, "a thread for each vector of the row");

 public:
  struct alignas(16) Row {
    float cos_sin[S::kRotary > 0 ? S::kRotary : 4];
  };

  __device__ __forceinline__ void load(const float* cos_sin, int32_t position) {
    if constexpr (kHalf > 0) {
      const int copier = S::kThreads - 1 - static_cast<int>(threadIdx.x);
      if (copier < kCopiers) {
        piece_ = jit::load<16>(cos_sin + static_cast<int64_t>(position) * S::kRotary + 4 * copier);
      }
    }
  }

  __device__ __forceinline__ void share(Row& row) const {
    if constexpr (kHalf > 0) {
      const int copier = S::kThreads - 1 - static_cast<int>(threadIdx.x);
      if (copier < kCopiers) jit::store<16>(row.cos_sin + 4 * copier, piece_);
    }
  }

  // Rotate y in place: (a, b) -> (a cos - b sin, b cos + a sin). part: the lane in its team. All
  // lanes of a warp call it together, whatever their heads are: they read one another's registers.
  __device__ __forceinline__ static void apply(const Row& row, float (&y)[kVector], int part) {
    if constexpr (kHalf > 0) {
      const bool turns = part < 2 * kHalf, first = part < kHalf;
      const int partner = !turns ? part : first ? part + kHalf : part - kHalf;
      const float* cos = row.cos_sin + part % kHalf * kVector;
      const float* sin = cos + S::kRotary / 2;
#pragma unroll
      for (int i = 0; i < kVector; i += 4) {
        const auto c = jit::bits_as<float4>(jit::load<16>(cos + i));
        const auto s = jit::bits_as<float4>(jit::load<16>(sin + i));
        turn(y[i], c.x, s.x, partner, turns, first);
        turn(y[i + 1], c.y, s.y, partner, turns, first);
        turn(y[i + 2], c.z, s.z, partner, turns, first);
        turn(y[i + 3], c.w, s.w, partner, turns, first);
      }
    }
  }

 private:
  __device__ __forceinline__ static void turn(float& y, float cos, float sin, int partner,
                                              bool turns, bool first) {
    const float other = __shfl_sync(kWholeWarp, y, partner, S::kLanes);
    if (turns) y = y * cos + (first ? -other : other) * sin;
  }

  Vector piece_;
};

// y = (x * inverse) * weight: that order, since x * weight could overflow where y does not.
template <class T>
__device__ __forceinline__ void normalize(const Vector& x, const Vector& weight, float inverse,
                                          float (&y)[kVector]) {
  float w[kVector];
  jit::widen<T>(x, y);
  jit::widen<T>(weight, w);
#pragma unroll
  for (int i = 0; i < kVector; ++i) y[i] = (y[i] * inverse) * w[i];
}

template <class T>
__device__ __forceinline__ float square_sum(const Vector& x) {
  float wide[kVector], sum = 0.0f;
  jit::widen<T>(x, wide);
#pragma unroll
  for (int i = 0; i < kVector; ++i) sum += wide[i] * wide[i];
  return sum;
}

// Where this thread's vector of a token's K or V goes. slot is not negative.
template <class S>
__device__ __forceinline__ auto* cache_at(const Cache& cache, const Params& params, uint32_t rank,
                                          uint32_t slot, int column) {
  int64_t offset = column + (S::kVirtual ? rank * cache.rank_stride : 0);
  if (params.page_size == 1) {
    offset += static_cast<uint64_t>(slot) * cache.page_stride;
  } else {
    offset += static_cast<uint64_t>(slot / params.page_size) * cache.page_stride;
    offset += static_cast<uint64_t>(slot % params.page_size) * cache.slot_stride;
  }
  return static_cast<typename S::CacheT*>(cache.data) + offset;
}

// Store x / scale as FP8.
template <class CacheT>
__device__ __forceinline__ void store_fp8(CacheT* address, float (&x)[kVector], float scale) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = __fdiv_rn(x[i], scale);
  jit::store<8>(address, jit::narrow<CacheT>(x));
}

}  // namespace qk_norm_rope
