// What one launch of the prologue is given: plain data, filled by the host. Strides count elements
// of the tensor that they belong to; those that the kernel keeps at hand are 32-bit numbers (their
// products with a token or a slot are not), in eight bytes, as a host mirrors them most easily.
#pragma once

#include <cstdint>

namespace qk_norm_rope {

// q, k or v: [tokens, heads * head_dim], unit inner stride, rows and strides 16-byte aligned.
struct Rows {
  void* data;
  alignas(8) uint32_t stride;  // from one token to the next
  int64_t rank_stride;         // virtual ranks: from one rank's tensor to the next; else 0
};

// K or V cache: the row of slot s starts at (s / page_size) * page_stride + (s % page_size) *
// slot_stride and holds kv_heads * head_dim contiguous elements, aligned to eight of them.
struct Cache {
  void* data;
  alignas(8) uint32_t page_stride;
  alignas(8) uint32_t slot_stride;
  int64_t rank_stride;
  float scale;  // FP8: stored is x / scale; other dtypes: 1
};

struct Params {
  Rows q;                // overwritten
  Rows k;                // overwritten
  Rows v;                // read only; unused without a cache
  const void* q_weight;  // [q_heads * head_dim], virtual ranks: [N, q_heads * head_dim]
  const void* k_weight;  // [kv_heads * head_dim], likewise
  Cache k_cache;         // unused where the cache type is void
  Cache v_cache;
  const void* positions;  // [tokens] int64 or int32; unused where rotary_dim is 0
  const void* slots;      // [tokens] int64 or int32; unused without a cache
  const float* cos_sin;   // [max_position, rotary_dim] fp32: cos, then sin; 16-byte aligned rows
  const uint64_t* buffers;  // [N] addresses of the ranks' exchange buffers; unused where N is 1
  uint64_t* ticket;         // epoch << 32 | 0, epoch >= 1; virtual ranks: [N], one each
  float q_divisor;          // elements behind the group's sum of squares of q
  float k_divisor;          // and of k, every replica of a head counted
  float eps;                // added to the mean
  uint32_t tokens;          // at least 1 and, where N > 1, at most buffer_slots
  uint32_t buffer_slots;    // S of the exchange buffers
  uint32_t page_size;       // slots a page; 1 for a cache addressed by slot (page_stride is used)
  int32_t first_slot;       // slots below it are not written; at least 0
  uint32_t rank;            // in the group; virtual ranks: unused, blockIdx.y counts
  bool wide_positions;      // int64 rather than int32
  bool wide_slots;
  bool launch_early;  // let the next kernel of the stream in at once, not after the last poll
};

}  // namespace qk_norm_rope
