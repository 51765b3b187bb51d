// What Python calls of the emulator; drivers add functions that launch their kernels.
#include "machine.h"

namespace on_cpu {

void launch(Machine& machine, const Grid& grid, void (*call)(const void*), const void* bound,
            std::size_t bytes) {
  machine.launch(grid, call, bound, bytes);
}

}  // namespace on_cpu

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT on_cpu::Machine* machine_new(int ranks, std::uint64_t seed) {
  return new on_cpu::Machine(ranks, seed);
}

// kind: 0 read only, 1 read and write, 2 words (atomics and relaxed words only).
EXPORT void machine_add_buffer(on_cpu::Machine* machine, const void* begin, std::uint64_t bytes,
                               const char* name, int owner, int kind) {
  machine->add_buffer(begin, bytes, name, owner, static_cast<on_cpu::Kind>(kind));
}

// Returns an error, empty where there is none; it lives as long as the machine.
EXPORT const char* machine_run(on_cpu::Machine* machine) {
  machine->error = machine->error.empty() ? machine->run() : machine->error;
  return machine->error.c_str();
}

EXPORT unsigned machine_furthest_ahead(on_cpu::Machine* machine) { return machine->furthest_ahead; }

EXPORT void machine_delete(on_cpu::Machine* machine) { delete machine; }
