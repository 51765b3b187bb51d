// Toy kernels, right and wrong, that test the emulator itself.
#include "on_cpu.h"

#include <cstring>

namespace {

struct Params {
  float* data;
  std::uint64_t* words;
  int count;
};

__global__ void __launch_bounds__(64) block_sum(const __grid_constant__ Params p) {
  using Partials = float[2];
  SHARED_MEMORY(Partials, partials);
  float sum = p.data[threadIdx.x];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (threadIdx.x % 32 == 0) partials[threadIdx.x / 32] = sum;
  __syncthreads();
  p.data[threadIdx.x] = partials[0] + partials[1];
}

__global__ void block_sum_without_barrier(const __grid_constant__ Params p) {
  using Partials = float[2];
  SHARED_MEMORY(Partials, partials);
  float sum = p.data[threadIdx.x];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (threadIdx.x % 32 == 0) partials[threadIdx.x / 32] = sum;
  p.data[threadIdx.x] = partials[0] + partials[1];
}

__global__ void divergent_shuffle(const __grid_constant__ Params p) {
  float value = p.data[threadIdx.x];
  if (threadIdx.x % 16 < 8) value = __shfl_xor_sync(~0u, value, 4);
  p.data[threadIdx.x] = value;
}

__global__ void divergent_shuffle_then_barrier(const __grid_constant__ Params p) {
  if (threadIdx.x % 16 < 8) p.data[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, 4);
  __syncthreads();
}

__global__ void shuffle_within_half(const __grid_constant__ Params p) {
  // Legal: the masks name exactly the lanes that come.
  const unsigned mask = threadIdx.x % 32 < 16 ? 0xffffu : 0xffff0000u;
  p.data[threadIdx.x] = __shfl_sync(mask, p.data[threadIdx.x], 5, 16);
}

__global__ void shuffle_from_outside_mask(const __grid_constant__ Params p) {
  if (threadIdx.x < 16) p.data[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 16);
}

__global__ void barrier_in_branch(const __grid_constant__ Params) {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void out_of_bounds(const __grid_constant__ Params p) {
  p.data[threadIdx.x + 1] = 1.0f;
}

__global__ void misaligned(const __grid_constant__ Params p) {
  struct alignas(16) Four {
    float x[4];
  };
  if (threadIdx.x == 0) *reinterpret_cast<Four*>(p.data + 1) = Four{};
}

__global__ void overflowing_index(const __grid_constant__ Params p) {
  const int index = p.count * 65536 * (static_cast<int>(threadIdx.x) + 1);
  if (index == 5) p.data[0] = 1.0f;
}

__global__ void race_between_blocks(const __grid_constant__ Params p) { p.data[0] = 1.0f; }

__global__ void never_written(const __grid_constant__ Params p) {
  SHARED_MEMORY(float, value);
  p.data[threadIdx.x] = value;
}

__global__ void polls_forever(const __grid_constant__ Params p) {
  while (jit::ld_relaxed_sys(p.words) == 0) {
  }
}

// words[0] = payload, words[1] = flag: relaxed, so a reader may see the flag first.
__global__ void relaxed_message(const __grid_constant__ Params p) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    jit::st_relaxed_sys(p.words, 7);
    jit::st_relaxed_sys(p.words + 1, 1);
  } else {
    while (jit::ld_relaxed_sys(p.words + 1) == 0) {
    }
    p.data[0] = static_cast<float>(jit::ld_relaxed_sys(p.words));
  }
}

__global__ void ordered_stores(const __grid_constant__ Params p) {
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    jit::st_relaxed_sys(p.words, 1);
    jit::st_relaxed_sys(p.words, 2);
  }
}

__global__ void count_threads(const __grid_constant__ Params p) {
  atomicAdd(reinterpret_cast<unsigned long long*>(p.words), 1ull);
}

__global__ void polls_then_lets_in(const __grid_constant__ Params p) {
  if (threadIdx.x == 0) jit::st_relaxed_sys(p.words, 1);
  while (jit::ld_relaxed_sys(p.words) == 0) {
  }
  __syncthreads();
  jit::grid_dependency_launch();
}

// Of two words: all but the last poll are over.
__global__ void lets_in_then_polls(const __grid_constant__ Params p) {
  if (threadIdx.x < 2) jit::st_relaxed_sys(p.words + threadIdx.x, 1);
  while (jit::ld_relaxed_sys(p.words) == 0) {
  }
  __syncthreads();
  jit::grid_dependency_launch();
  while (jit::ld_relaxed_sys(p.words + 1) == 0) {
  }
}

__global__ void increment(const __grid_constant__ Params p) {
  jit::grid_dependency_wait();
  jit::grid_dependency_launch();
  p.data[threadIdx.x] += 1.0f;
}

__global__ void increment_too_early(const __grid_constant__ Params p) {
  jit::grid_dependency_launch();
  p.data[threadIdx.x] += 1.0f;
}

struct Toy {
  const char* name;
  void (*kernel)(Params);
};

#define TOY(name) {#name, name}
const Toy kToys[] = {
    TOY(block_sum),          TOY(block_sum_without_barrier),
    TOY(divergent_shuffle),  TOY(divergent_shuffle_then_barrier),
    TOY(shuffle_within_half), TOY(shuffle_from_outside_mask),
    TOY(barrier_in_branch),  TOY(out_of_bounds),
    TOY(misaligned),         TOY(overflowing_index),
    TOY(race_between_blocks), TOY(never_written),
    TOY(polls_forever),      TOY(relaxed_message),
    TOY(ordered_stores),     TOY(count_threads),
    TOY(increment),          TOY(increment_too_early),
    TOY(polls_then_lets_in), TOY(lets_in_then_polls),
};

}  // namespace

extern "C" __attribute__((visibility("default"))) int toy_launch(
    on_cpu::Machine* machine, const char* name, unsigned blocks, unsigned threads, int overlaps,
    int lets_in_last, float* data, std::uint64_t* words, int count) {
  for (const Toy& toy : kToys) {
    if (std::strcmp(toy.name, name) != 0) continue;
    const Params params{data, words, count};
    on_cpu::launch(*machine,
                   {0, {blocks, 1}, threads, false, overlaps != 0, lets_in_last != 0}, toy.kernel,
                   params);
    return 0;
  }
  return 1;
}
