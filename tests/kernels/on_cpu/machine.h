// The emulated machine: ranks with one stream each, kernels as grids of cooperating fibers.
//
// Every CUDA thread is a fiber, and all threads of a grid are resident. A fiber runs until it meets
// a barrier, a shuffle, an atomic or a relaxed word; then the scheduler, seeded, chooses who goes
// on. Relaxed stores wait in a queue for each (writer, reader) pair of ranks and are delivered late
// and out of order, except that stores to one address keep theirs. What CUDA leaves undefined is an
// error that names thread and line; so is a state in which nobody can go on.
//
// Not modelled: caches, timing, and rounding of rsqrtf and FMA contraction.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "calls.h"

namespace on_cpu {

constexpr unsigned kWarp = 32;
constexpr std::size_t kStackBytes = 128 << 10;  // virtual; a kernel touches a page or two of it

struct Block;
struct Launch;

enum class State { kRunnable, kInWarp, kInBlock, kParked, kWaitsForGrid, kExited };
enum class Collective { kSync, kShuffleXor, kShuffleFrom };

// A warp-wide operation as one lane called it; the lanes that meet must agree on all but the value.
struct Meeting {
  Collective kind;
  unsigned mask;
  int width;
  int argument;  // kShuffleXor: must agree. kShuffleFrom: the lane read, free.
  std::uint32_t value;
  Where where;
};

struct Thread {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  Block* block = nullptr;
  unsigned number = 0;  // threadIdx.x
  State state = State::kRunnable;
  Where where;       // of the last operation that could wait
  Meeting meeting;   // while kInWarp
  std::uint32_t received = 0;
  bool previous_grid_done = true;  // false until it has waited, where the launch may overlap
  unsigned polls = 0;              // loads of words since the last delivery to its rank
  std::uint64_t polled_at = 0;
};

struct Shared {
  const char* name;
  Where where;
  char* data;
  std::size_t bytes;
};

struct Block {
  Launch* launch = nullptr;
  Index index{};
  std::vector<Thread> threads;
  std::vector<Thread*> runnable;
  std::vector<std::uint32_t> warp_generation;  // __syncwarp calls completed
  std::uint32_t generation = 0;                // __syncthreads calls completed
  unsigned arrived = 0, exited = 0;
  std::deque<Shared> shared;
  std::uint64_t priority = 0;
  bool lets_next_start = false;
  int rank() const;
};

struct Launch {
  Grid grid;
  unsigned serial = 0;  // never 0, unique within a run
  void (*call)(const void*) = nullptr;
  std::vector<std::max_align_t> bound;  // what it is called with
  std::vector<std::unique_ptr<Block>> blocks;
  unsigned live_blocks = 0;
  unsigned pending = 0;  // its relaxed stores that are not delivered yet
  bool started = false, done = false;
};

// Relaxed stores on their way from one rank to one buffer's owner.
struct Link {
  struct Store {
    std::uint64_t* word;
    std::uint64_t value;
    Launch* launch;
  };
  std::vector<Store> stores;
  int owner = 0;
  std::uint64_t priority = 0;
};

// Who touched four bytes last: 0 for nobody. See memory.cpp for the fields.
struct Shadow {
  std::uint64_t writer, reader;
};

enum class Kind { kReadOnly, kReadWrite, kWords, kShared };

struct Buffer {
  std::uintptr_t begin = 0, end = 0;
  std::string name;
  int owner = -1;  // the only rank that may touch it with plain loads and stores; -1: any
  Kind kind = Kind::kReadOnly;
  Shadow* shadow = nullptr;  // made when first needed
};

struct Machine {
  Machine(int ranks, std::uint64_t seed);
  ~Machine();
  Machine(const Machine&) = delete;

  // Before run, and by run itself for shared memory.
  void add_buffer(const void* begin, std::size_t bytes, const char* name, int owner, Kind kind);
  void launch(const Grid& grid, void (*call)(const void*), const void* bound, std::size_t bytes);
  // Runs everything that was launched. Returns an error, or an empty string.
  std::string run();

  // What the parts of the emulator share.
  std::mt19937_64 random;
  Thread* current = nullptr;
  void* scheduler = nullptr;
  std::string error;
  std::vector<std::deque<Launch*>> streams;  // not yet done, in order
  std::vector<std::unique_ptr<Launch>> launches;
  std::vector<Block*> resident;
  std::map<std::pair<int, int>, Link> links;
  std::vector<Buffer> buffers;  // by address
  std::vector<std::uint64_t> deliveries;  // to each rank, for who polls
  std::uint64_t steps = 0;
  unsigned furthest_ahead = 0;  // most launches that one rank had ended and another had not

  void make_runnable(Thread& thread);
  void yield(State state, Where where);  // the current fiber
  [[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 2, 3)));
  [[noreturn]] void fail_at(Where where, const char* format, ...)
      __attribute__((format(printf, 3, 4)));
  void wake_pollers(int rank);
  void deliver(Link& link);
  void sort_buffers();

 private:
  void start_launches();
  void start(Launch& launch);
  void finish(Launch& launch);
  bool step();
  void report_deadlock();
  void resume(Thread& thread);
  // A block that can run or a link that can deliver; neither where there is none.
  struct Able {
    std::uint64_t* priority = nullptr;
    Block* block = nullptr;
    Link* link = nullptr;
  };
  Able choose();
  Block* chosen_ = nullptr;  // has the machine for `burst_` more steps
  unsigned burst_ = 0;
  unsigned last_chances_ = 0;  // given to pollers since the last delivery
  bool by_priority_ = false;
  std::vector<char*> stacks_;
};

extern Machine* machine;  // the one that runs

std::string describe(const Thread& thread);
std::string describe(Where where);
void check_exit(Thread& thread);

}  // namespace on_cpu
