// The sum of one number over the ranks of a group, from inside a kernel, by pushing to the peers.
//
// Each rank owns a buffer of 64-bit words that its peers write and only it reads:
//
//   word[half 2][slot S][sender N][which 2]     value (fp32 bits, low half) | tag (high half)
//
// Slot = token of the call, which = 0 for q, 1 for k. In call e (its epoch) rank r stores its
// partial with tag e into [e & 1][slot][r][which] of every rank, its own included, and polls
// [e & 1][slot][p][which] of its own buffer for every p until the tag is e. Value and tag travel
// in one aligned 64-bit store, which is never torn, so the tag alone says that the value is there:
// zeros, NaN and infinities are ordinary values, nothing has to be cleared, no fence is needed.
//
// Epochs come from the rank's `ticket` word, in device memory: epoch (high half) | arrivals (low
// half). Each block adds 1: one atomic tells it the epoch and how many blocks came before. The last
// one to arrive stores next(epoch) | 0; by then all have read it. Nothing comes from the host, so a
// replayed CUDA graph draws fresh epochs.
//
// Why a word is never overwritten before it was read. A rank runs its calls one after another
// (stream order; a programmatic dependent launch waits first). When it begins call e + 1 it has
// ended call e, so it holds a push of e from every peer: every peer has begun e, hence ended e - 1,
// hence read all its words of e - 1. Call e + 1 writes the half that e - 1 used. No rank is ever two
// calls ahead, and two halves are enough. This needs every call to exchange on every rank: a call of
// zero tokens launches nothing and draws no epoch. For the same reason a batch that is larger than
// S goes in one launch per S tokens, each with its own epoch: inside one launch a block that
// has no slot in the last, shorter piece could still be polling an earlier one.
//
// Why an old tag is never mistaken for a new one. Tags are epochs 1 .. 2^32 - 1, and next() skips
// to 2 after the last, so that 0 (memory never written) is no tag and halves still alternate. A word
// that no call had written in between would carry a valid tag again 2^32 calls later, so each call
// also clears one slot that it does not use of its half of the own buffer, the next one every time:
// no word keeps a tag for more than a few times S calls. No peer writes there meanwhile: it writes
// this half beyond this call's tokens in e + 2 at the earliest, which takes this rank's push of e + 1.
//
// Why polling cannot lock up the chip. Blocks that poll stay resident, so all blocks of the grids of
// all channels that share the chip must fit on it together, beside other kernels that wait for a peer
// (the caller caps the grid), and kernels that wait for this one may not take that room: unless a
// channel has the chip alone, the next kernel of the stream is let in only after the last poll
// (Params::launch_early).
#pragma once

#include "../../csrc/device.cuh"

namespace qk_norm_rope {

constexpr int kMaxRanks = 16;  // 2 * 16 lanes of one warp exchange a token

__device__ __forceinline__ uint32_t next_epoch(uint32_t epoch) {
  return epoch == 0xFFFFFFFFu ? 2u : epoch + 1u;
}

// Draw this call's epoch: once per block, by one thread, in a grid of `blocks` blocks per rank.
__device__ __forceinline__ uint32_t draw_epoch(uint64_t* ticket, uint32_t blocks) {
  const uint64_t drawn = atomicAdd(reinterpret_cast<unsigned long long*>(ticket), 1ull);
  const uint32_t epoch = static_cast<uint32_t>(drawn >> 32);
  if (static_cast<uint32_t>(drawn) == blocks - 1) {
    jit::st_relaxed_sys(ticket, static_cast<uint64_t>(next_epoch(epoch)) << 32);
  }
  return epoch;
}

// One call's exchange as a lane of the exchanging warp sees it: lane = 2 * peer + which.
template <int kRanks>
class Exchange {
  static_assert(kRanks >= 1 && kRanks <= kMaxRanks, "a group has 1 to 16 ranks");
  static constexpr uint32_t kSlotWords = 2 * kRanks;

 public:
  // Begin a call: once per block, by a whole warp, which makes all the other calls too.
  // buffers: the addresses of all ranks' buffers, as this rank maps them. blocks: of the grid that
  // this rank launched. slots: of the buffers.
  __device__ __forceinline__ void begin(const uint64_t* buffers, uint64_t* ticket, uint32_t rank,
                                        uint32_t slots, uint32_t blocks, uint32_t lane) {
    lane_ = lane;
    // Pointers first: their loads run while the atomic is under way.
    const uint32_t peer = lane < kSlotWords ? lane / 2 : rank;
    uint64_t* theirs = reinterpret_cast<uint64_t*>(buffers[peer]);
    uint64_t* mine = reinterpret_cast<uint64_t*>(buffers[rank]);
    const uint32_t drawn = lane == 0 ? draw_epoch(ticket, blocks) : 0u;
    epoch_ = __shfl_sync(0xFFFFFFFFu, drawn, 0);
    const int64_t half = static_cast<int64_t>(epoch_ & 1u) * slots * kSlotWords;
    push_ = theirs + half + 2 * rank + (lane & 1u);
    poll_ = mine + half + lane;
  }

  // Clear the slot whose turn it is, unless this call uses it: once per call and rank, by a warp.
  __device__ __forceinline__ void scrub(uint32_t tokens, uint32_t slots) const {
    const uint32_t slot = (epoch_ >> 1) % slots;
    if (slot >= tokens && lane_ < kSlotWords) {
      jit::st_relaxed_sys(poll_ + static_cast<int64_t>(slot) * kSlotWords, 0);
    }
  }

  // Sum over the ranks, each giving the partial of `slot` that belongs to lane & 1, in an order that
  // is the same on every rank: ranks that hold the same K head must get the same bits.
  __device__ __forceinline__ float sum(uint32_t slot, float partial) const {
    float value = 0.0f;
    if (lane_ < kSlotWords) {
      const int64_t offset = static_cast<int64_t>(slot) * kSlotWords;
      const uint64_t tag = static_cast<uint64_t>(epoch_) << 32;
      jit::st_relaxed_sys(push_ + offset, tag | __float_as_uint(partial));
      uint64_t word = jit::ld_relaxed_sys(poll_ + offset);
      while (static_cast<uint32_t>(word >> 32) != epoch_) {
        word = jit::ld_relaxed_sys(poll_ + offset);
      }
      value = __uint_as_float(static_cast<uint32_t>(word));
    }
    __syncwarp(0xFFFFFFFFu);
#pragma unroll
    for (int step = 2; step < 32; step *= 2) {
      value += __shfl_xor_sync(0xFFFFFFFFu, value, step);
    }
    return value;
  }

 private:
  uint32_t lane_;
  uint32_t epoch_;
  uint64_t* push_;  // in the peer's buffer: [half][0][rank][which]
  uint64_t* poll_;  // in the own buffer: [half][0][peer][which]
};

}  // namespace qk_norm_rope
