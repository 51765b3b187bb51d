// Scheduler, streams and fibers of the emulated machine. See machine.h.
#include "machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if !defined(__x86_64__) || defined(ON_CPU_UCONTEXT)
#define ON_CPU_UCONTEXT
#include <ucontext.h>
#endif

namespace on_cpu {

Machine* machine = nullptr;

namespace {


constexpr unsigned kLastChances = 16;

void thread_main() {
  Thread& self = *machine->current;
  self.block->launch->call(self.block->launch->bound.data());
  check_exit(self);
  machine->yield(State::kExited, self.where);
  std::abort();
}

#if !defined(ON_CPU_UCONTEXT)
// Saves the callee-saved registers on this stack, and goes on where `to` was left.
extern "C" void on_cpu_switch(void** from, void* to);
asm(R"(
.hidden on_cpu_switch
.globl on_cpu_switch
.type on_cpu_switch, @function
on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size on_cpu_switch, .-on_cpu_switch
)");

void switch_to(void** from, void* to) { on_cpu_switch(from, to); }

void* fresh_stack(char* stack, unsigned number) {
  // Tops at different places of a page, or they would all compete for the same lines of the cache.
  auto** top = reinterpret_cast<void**>(stack + kStackBytes - 64 - number % 64 * 64 * 3);
  *--top = nullptr;  // where a return address would be: keeps the ABI's alignment at entry
  *--top = reinterpret_cast<void*>(&thread_main);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  return top;
}
#else
void switch_to(void** from, void* to) {
  ucontext_t here;
  *from = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
}

void* fresh_stack(char* stack, unsigned) {
  auto* context = reinterpret_cast<ucontext_t*>(stack);  // the low end, which nothing reaches
  getcontext(context);
  context->uc_stack.ss_sp = stack + sizeof(ucontext_t);
  context->uc_stack.ss_size = kStackBytes - sizeof(ucontext_t);
  makecontext(context, &thread_main, 0);
  return context;
}
#endif

}  // namespace

int Block::rank() const {
  return launch->grid.ranks_in_grid ? static_cast<int>(index.y) : launch->grid.stream;
}

Machine::Machine(int ranks, std::uint64_t seed)
    : random(seed), streams(ranks), deliveries(ranks), by_priority_(seed % 3 != 0) {
  machine = this;
}

Machine::~Machine() {
  for (char* stack : stacks_) munmap(stack, kStackBytes);
  for (auto& launch : launches)
    for (auto& block : launch->blocks) {
      for (Thread& thread : block->threads)
        if (thread.stack != nullptr) munmap(thread.stack, kStackBytes);
      for (Shared& shared : block->shared) std::free(shared.data);
    }
  for (Buffer& buffer : buffers) std::free(buffer.shadow);
  machine = nullptr;
}

void Machine::launch(const Grid& grid, void (*call)(const void*), const void* bound,
                     std::size_t bytes) {
  auto launch = std::make_unique<Launch>();
  launch->grid = grid;
  launch->serial = static_cast<unsigned>(launches.size()) + 1;
  launch->call = call;
  launch->bound.resize(bytes / sizeof(std::max_align_t) + 1);
  std::memcpy(launch->bound.data(), bound, bytes);
  streams[static_cast<std::size_t>(grid.stream)].push_back(launch.get());
  launches.push_back(std::move(launch));
}

void Machine::start_launches() {
  for (auto& stream : streams) {
    for (std::size_t i = 0; i < stream.size(); ++i) {
      Launch& launch = *stream[i];
      if (launch.started) continue;
      if (i > 0) {
        Launch& before = *stream[i - 1];
        const bool let = std::all_of(before.blocks.begin(), before.blocks.end(), [](auto& block) {
          return block->lets_next_start || block->exited == block->threads.size();
        });
        if (i > 1 || !launch.grid.overlaps || !let) break;
      }
      start(launch);
    }
  }
}

void Machine::start(Launch& launch) {
  launch.started = true;
  for (unsigned y = 0; y < launch.grid.blocks.y; ++y)
    for (unsigned x = 0; x < launch.grid.blocks.x; ++x) {
      auto block = std::make_unique<Block>();
      block->launch = &launch;
      block->index = {x, y};
      block->priority = random();
      block->threads.resize(launch.grid.threads);
      block->warp_generation.resize((launch.grid.threads + kWarp - 1) / kWarp);
      for (unsigned i = 0; i < launch.grid.threads; ++i) {
        Thread& thread = block->threads[i];
        thread.block = block.get();
        thread.number = i;
        thread.previous_grid_done = !launch.grid.overlaps;
        if (stacks_.empty()) {
          void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
          if (stack == MAP_FAILED) std::abort();
          stacks_.push_back(static_cast<char*>(stack));
        }
        thread.stack = stacks_.back();
        stacks_.pop_back();
        thread.stack_pointer = fresh_stack(thread.stack, i);
        block->runnable.push_back(&thread);
      }
      resident.push_back(block.get());
      launch.blocks.push_back(std::move(block));
    }
  launch.live_blocks = static_cast<unsigned>(launch.blocks.size());
}

void Machine::finish(Launch& launch) {
  launch.done = true;
  std::vector<unsigned> ended(streams.size());
  for (auto& other : launches) ended[static_cast<std::size_t>(other->grid.stream)] += other->done;
  const auto [least, most] = std::minmax_element(ended.begin(), ended.end());
  furthest_ahead = std::max(furthest_ahead, *most - *least);
  streams[launch.grid.stream].pop_front();
  for (auto& block : launch.blocks) {
    for (Thread& thread : block->threads) {
      stacks_.push_back(thread.stack);
      thread.stack = nullptr;
    }
    resident.erase(std::find(resident.begin(), resident.end(), block.get()));
    if (chosen_ == block.get()) chosen_ = nullptr;
  }
  if (streams[launch.grid.stream].empty()) return;
  for (auto& block : streams[launch.grid.stream].front()->blocks)
    for (Thread& thread : block->threads)
      if (thread.state == State::kWaitsForGrid) make_runnable(thread);
}

void Machine::make_runnable(Thread& thread) {
  thread.state = State::kRunnable;
  thread.block->runnable.push_back(&thread);
}

void Machine::wake_pollers(int rank) {
  ++deliveries[rank];
  for (Block* block : resident)
    if (block->rank() == rank)
      for (Thread& thread : block->threads)
        if (thread.state == State::kParked) make_runnable(thread);
}

void Machine::yield(State state, Where where) {
  Thread& self = *current;
  self.state = state;
  self.where = where;
  if (state == State::kRunnable) self.block->runnable.push_back(&self);
  switch_to(&self.stack_pointer, scheduler);
}

void Machine::resume(Thread& thread) {
  current = &thread;
  switch_to(&scheduler, thread.stack_pointer);
  current = nullptr;
  if (!error.empty() || thread.state != State::kExited) return;
  Block& block = *thread.block;
  if (++block.exited == block.threads.size()) --block.launch->live_blocks;
}

// A third of the seeds run whoever chance picks; the others starve whoever has a low priority until
// nobody else can go on, with a change of priorities now and then. That is what drives ranks, and
// single blocks and stores, as far apart as the protocol lets them.
Machine::Able Machine::choose() {
  std::vector<Able> able;
  for (Block* block : resident)
    if (!block->runnable.empty()) able.push_back({&block->priority, block, nullptr});
  for (auto& [ends, link] : links)
    if (!link.stores.empty()) able.push_back({&link.priority, nullptr, &link});
  if (able.empty()) return {};
  Able choice = able[random() % able.size()];
  if (by_priority_ && random() % 64 != 0)
    choice = *std::max_element(able.begin(), able.end(), [](const Able& a, const Able& b) {
      return *a.priority < *b.priority;
    });
  if (random() % 128 == 0) *choice.priority = random();
  return choice;
}

bool Machine::step() {
  if (chosen_ == nullptr || burst_ == 0) {
    const Able choice = choose();
    chosen_ = choice.block;
    burst_ = 1 + static_cast<unsigned>(random() % 64);
    if (choice.link != nullptr) deliver(*choice.link);
    if (chosen_ == nullptr) return choice.link != nullptr;
  }
  Block& block = *chosen_;
  if (block.runnable.empty()) {
    chosen_ = nullptr;
    return true;
  }
  --burst_;
  ++steps;
  std::swap(block.runnable[random() % block.runnable.size()], block.runnable.back());
  Thread& thread = *block.runnable.back();
  block.runnable.pop_back();
  resume(thread);
  return true;
}

void Machine::deliver(Link& link) {
  // Any store may be next, but stores to one address keep their order.
  const std::size_t any = random() % link.stores.size();
  std::size_t first = 0;
  while (link.stores[first].word != link.stores[any].word) ++first;
  const Link::Store store = link.stores[first];
  link.stores.erase(link.stores.begin() + static_cast<std::ptrdiff_t>(first));
  *store.word = store.value;
  --store.launch->pending;
  last_chances_ = 0;
  wake_pollers(link.owner);
}

std::string Machine::run() {
  unsigned quiet = 0;
  sort_buffers();
  while (error.empty()) {
    for (auto& stream : streams)
      while (!stream.empty() && stream.front()->started && stream.front()->live_blocks == 0 &&
             stream.front()->pending == 0)
        finish(*stream.front());
    start_launches();
    if (std::all_of(streams.begin(), streams.end(), [](auto& stream) { return stream.empty(); }))
      return "";
    const std::uint64_t before = steps;
    // Launches end and begin only where a thread exits or a store is delivered: look now and then.
    for (int i = 0; i < 256 && error.empty(); ++i)
      if (!step()) break;
    quiet = steps == before ? quiet + 1 : 0;
    const bool delivered = std::all_of(links.begin(), links.end(),
                                       [](auto& link) { return link.second.stores.empty(); });
    if (quiet < 4 || !delivered) continue;
    // Who polls many words in turn may rest before it has seen them all: let it go on for a while.
    if (last_chances_++ == kLastChances) report_deadlock();
    for (std::size_t rank = 0; rank < streams.size(); ++rank) wake_pollers(static_cast<int>(rank));
  }
  return error;
}

void Machine::report_deadlock() {
  std::string text = "nobody can go on:";
  unsigned shown = 0, waiting = 0;
  for (Block* block : resident)
    for (Thread& thread : block->threads) {
      if (thread.state == State::kExited) continue;
      ++waiting;
      static const char* const kDoing[] = {
          "runs",         "waits for lanes of its warp", "waits for its block",
          "polls a word", "waits for the previous grid", ""};
      if (shown++ < 8)
        text += "\n  " + describe(thread) + " " + kDoing[static_cast<int>(thread.state)] + " at " +
                describe(thread.where);
    }
  if (waiting > shown) text += "\n  ...";
  error = text + "\n  (" + std::to_string(waiting) + " threads in all)";
}

std::string describe(Where where) {
  const char* name = std::strrchr(where.file_name(), '/');
  return std::string(name != nullptr ? name + 1 : where.file_name()) + ":" +
         std::to_string(where.line());
}

std::string describe(const Thread& thread) {
  const Block& block = *thread.block;
  return "rank " + std::to_string(block.rank()) + ", launch " +
         std::to_string(block.launch->serial) + ", block " + std::to_string(block.index.x) +
         ", thread " + std::to_string(thread.number);
}

namespace {

std::string formatted(const char* format, va_list arguments) {
  char text[1024];
  std::vsnprintf(text, sizeof(text), format, arguments);
  return text;
}

}  // namespace

void Machine::fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  error = describe(*current) + ": " + formatted(format, arguments);
  va_end(arguments);
  yield(State::kExited, current->where);  // never resumed
  std::abort();
}

void Machine::fail_at(Where where, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  error = describe(*current) + " at " + describe(where) + ": " + formatted(format, arguments);
  va_end(arguments);
  yield(State::kExited, where);
  std::abort();
}

}  // namespace on_cpu
