// Launches the attention prologue on the emulated machine, from Python.
#pragma once

#include <utility>

#include "qk_norm_rope/csrc/kernel.cuh"

// What Python gives: Params flattened, eight bytes a field, in the order of prologue.py.
struct Arguments {
  struct Rows {
    std::int64_t data, stride, rank_stride;
  } q, k, v;
  struct Cache {
    std::int64_t data, page_stride, slot_stride, rank_stride;
    double scale;
  } k_cache, v_cache;
  std::int64_t q_weight, k_weight, positions, slots, cos_sin, buffers, ticket;
  std::int64_t tokens, buffer_slots, page_size, first_slot, rank;
  std::int64_t wide_positions, wide_slots, launch_early;
  double q_divisor, k_divisor, eps;
};

namespace {

using namespace qk_norm_rope;

struct Entry {
  void (*kernel)(const Params);
  unsigned threads;
  unsigned ranks_in_grid;  // N with virtual ranks, else 0
};

template <class S>
constexpr Entry entry() {
  return {prologue<S>, S::kThreads, S::kVirtual ? S::kRanks : 0u};
}

extern const Entry kEntries[];  // one for each shape, defined by the source that includes this

// Sets a field of Params of any integer, bool or pointer type; false where the value does not fit.
template <class T>
bool set(T& field, std::int64_t value) {
  if constexpr (std::is_pointer_v<T>) {
    field = reinterpret_cast<T>(value);
    return true;
  } else {
    field = static_cast<T>(value);
    return std::cmp_equal(static_cast<std::int64_t>(field), value);
  }
}

bool set(Rows& rows, const Arguments::Rows& from) {
  return set(rows.data, from.data) && set(rows.stride, from.stride) &&
         set(rows.rank_stride, from.rank_stride);
}

bool set(Cache& cache, const Arguments::Cache& from) {
  cache.scale = static_cast<float>(from.scale);
  return set(cache.data, from.data) && set(cache.page_stride, from.page_stride) &&
         set(cache.slot_stride, from.slot_stride) && set(cache.rank_stride, from.rank_stride);
}

bool set(Params& params, const Arguments& from) {
  params.q_divisor = static_cast<float>(from.q_divisor);
  params.k_divisor = static_cast<float>(from.k_divisor);
  params.eps = static_cast<float>(from.eps);
  return set(params.q, from.q) && set(params.k, from.k) && set(params.v, from.v) &&
         set(params.k_cache, from.k_cache) && set(params.v_cache, from.v_cache) &&
         set(params.q_weight, from.q_weight) && set(params.k_weight, from.k_weight) &&
         set(params.positions, from.positions) && set(params.slots, from.slots) &&
         set(params.cos_sin, from.cos_sin) && set(params.buffers, from.buffers) &&
         set(params.ticket, from.ticket) && set(params.tokens, from.tokens) &&
         set(params.buffer_slots, from.buffer_slots) && set(params.page_size, from.page_size) &&
         set(params.first_slot, from.first_slot) && set(params.rank, from.rank) &&
         set(params.wide_positions, from.wide_positions) &&
         set(params.wide_slots, from.wide_slots) && set(params.launch_early, from.launch_early);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT unsigned prologue_arguments_bytes() { return sizeof(Arguments); }

// Returns whether the arguments fit the fields of Params.
EXPORT int prologue_launch(on_cpu::Machine* machine, unsigned shape, int stream,
                           const Arguments* arguments, unsigned blocks, int overlaps) {
  const Entry& chosen = kEntries[shape];
  const unsigned y = chosen.ranks_in_grid > 0 ? chosen.ranks_in_grid : 1u;
  Params params{};
  if (!set(params, *arguments)) return 0;
  on_cpu::launch(*machine,
                 {.stream = stream,
                  .blocks = {blocks, y},
                  .threads = chosen.threads,
                  .ranks_in_grid = chosen.ranks_in_grid > 0,
                  .overlaps = overlaps != 0,
                  .lets_in_last = !params.launch_early},
                 chosen.kernel, params);
  return 1;
}
