// The emulator as kernels and drivers call it; machine.cpp, warp.cpp and memory.cpp answer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <type_traits>

namespace on_cpu {

using Where = std::source_location;

struct Index {
  unsigned x, y;
};

// Constant for as long as a thread lives, which [[gnu::const]] tells the optimiser.
[[gnu::const]] Index thread_index();
[[gnu::const]] Index block_index();
[[gnu::const]] Index block_size();
[[gnu::const]] Index grid_size();

void sync_threads(Where where);
void sync_warp(unsigned mask, Where where);
// `lanes`: what the lane number is xored with; `lane`: the one that is read.
std::uint32_t shuffle_xor(unsigned mask, std::uint32_t value, int lanes, int width, Where where);
std::uint32_t shuffle_from(unsigned mask, std::uint32_t value, int lane, int width, Where where);
std::uint64_t atomic_add(std::uint64_t* word, std::uint64_t value, Where where);
std::uint64_t load_word(const std::uint64_t* word, Where where);
void store_word(std::uint64_t* word, std::uint64_t value, Where where);
void wait_for_previous_grid();
void let_next_grid_start();
void* shared_memory(const char* name, std::size_t bytes, std::size_t alignment, Where where);

struct Machine;

// Where a kernel is launched. ranks_in_grid: a thread's rank is its blockIdx.y, not its stream.
// overlaps: a programmatic dependent launch, which may start before the one ahead of it has ended.
// lets_in_last: a block that has let the next grid in may not poll any more (docs/exchange.md, "Room
// on the chip").
struct Grid {
  int stream;
  Index blocks;
  unsigned threads;
  bool ranks_in_grid = false;
  bool overlaps = false;
  bool lets_in_last = false;
};

// `call` is given a copy of the `bytes` at `bound`, aligned to 16.
void launch(Machine& machine, const Grid& grid, void (*call)(const void*), const void* bound,
            std::size_t bytes);

// Put a kernel with its one parameter, of which every thread gets a copy, into a rank's stream.
template <class Params>
void launch(Machine& machine, const Grid& grid, void (*kernel)(Params), const Params& params) {
  struct Bound {
    void (*kernel)(Params);
    Params params;
    // Its own loads are no kernel's.
    __attribute__((no_sanitize("thread", "alignment"))) static void call(const void* bound) {
      auto* self = static_cast<const Bound*>(bound);
      self->kernel(self->params);
    }
  };
  static_assert(std::is_trivially_copyable_v<Params> && alignof(Bound) <= 16);
  const Bound bound{kernel, params};
  launch(machine, grid, &Bound::call, &bound, sizeof(bound));
}

}  // namespace on_cpu
