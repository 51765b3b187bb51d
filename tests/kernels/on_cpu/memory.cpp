// Every load and store of the kernel: bounds, alignment, races, and relaxed words.
//
// The kernel's translation unit is compiled with -fsanitize=thread and -fsanitize=alignment, but
// not linked with their runtimes: the functions that the compiler calls are defined here.
#include <link.h>

#include <algorithm>
#include <cstdlib>

#include "machine.h"

namespace on_cpu {

namespace {

// Who touched a word: launch 16 bits, block 12, thread 10, __syncthreads 14, __syncwarp 12.
std::uint64_t stamp(const Thread& thread) {
  const Block& block = *thread.block;
  const std::uint64_t number = block.index.y * block.launch->grid.blocks.x + block.index.x;
  return std::uint64_t{block.launch->serial} << 48 | (number & 0xfff) << 36 |
         std::uint64_t{thread.number} << 26 | std::uint64_t{block.generation & 0x3fff} << 12 |
         (block.warp_generation[thread.number / kWarp] & 0xfff);
}

unsigned launch_of(std::uint64_t stamp) { return static_cast<unsigned>(stamp >> 48); }
unsigned block_of(std::uint64_t stamp) { return stamp >> 36 & 0xfff; }
unsigned thread_of(std::uint64_t stamp) { return stamp >> 26 & 0x3ff; }

// Whether what `then` stands for has certainly happened before what the running thread does now.
bool ordered(std::uint64_t then, std::uint64_t now) {
  if (then >> 26 == now >> 26) return true;  // the same thread
  if (launch_of(then) != launch_of(now)) {
    const Launch& before = *machine->launches[launch_of(then) - 1];
    const Thread& self = *machine->current;
    const bool same_stream = before.grid.stream == self.block->launch->grid.stream;
    return same_stream && self.previous_grid_done && before.done;
  }
  if (block_of(then) != block_of(now)) return false;
  if ((then >> 12 & 0x3fff) != (now >> 12 & 0x3fff)) return true;
  return thread_of(then) / kWarp == thread_of(now) / kWarp && (then & 0xfff) != (now & 0xfff);
}

[[noreturn]] void fail_access(const char* what, std::uintptr_t address, std::size_t bytes,
                              const void* pc, const Buffer* buffer, const char* why) {
  std::string where = "no buffer";
  if (buffer != nullptr)
    where = buffer->name + " + " +
            std::to_string(static_cast<std::int64_t>(address - buffer->begin)) + " of " +
            std::to_string(buffer->end - buffer->begin);
  machine->fail("%s of %zu bytes at %s: %s [pc %p]", what, bytes, where.c_str(), why, pc);
}

const Buffer* find(std::uintptr_t address) {
  auto after = std::upper_bound(machine->buffers.begin(), machine->buffers.end(), address,
                                [](std::uintptr_t a, const Buffer& b) { return a < b.begin; });
  return after == machine->buffers.begin() ? nullptr : &*std::prev(after);
}

// The addresses of this library, whose constants a kernel may read.
struct Image {
  std::uintptr_t begin = ~std::uintptr_t{0}, end = 0;
  Image() {
    dl_iterate_phdr(
        [](dl_phdr_info* info, std::size_t, void* data) {
          Image image = *static_cast<Image*>(data);
          bool mine = false;
          const auto probe = reinterpret_cast<std::uintptr_t>(&machine);
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& segment = info->dlpi_phdr[i];
            if (segment.p_type != PT_LOAD) continue;
            const std::uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
            image.begin = std::min(image.begin, begin);
            image.end = std::max(image.end, begin + segment.p_memsz);
            mine |= probe >= begin && probe < begin + segment.p_memsz;
          }
          if (mine) *static_cast<Image*>(data) = image;
          return mine ? 1 : 0;
        },
        this);
  }
};

Shadow* shadow_of(const Buffer& buffer) {
  if (buffer.shadow == nullptr) {
    // Large ones take memory only where it is touched.
    void* memory = std::calloc((buffer.end - buffer.begin) / 4 + 2, sizeof(Shadow));
    if (memory == nullptr) std::abort();
    const_cast<Buffer&>(buffer).shadow = static_cast<Shadow*>(memory);
  }
  return buffer.shadow;
}

void check_race(const Buffer& buffer, std::uintptr_t address, std::size_t bytes, bool write,
                const void* pc) {
  const std::uint64_t now = stamp(*machine->current);
  Shadow* first = shadow_of(buffer) + (address - buffer.begin) / 4;
  Shadow* last = shadow_of(buffer) + (address + bytes - 1 - buffer.begin) / 4;
  for (Shadow* shadow = first; shadow <= last; ++shadow) {
    if (!write && buffer.kind == Kind::kShared && shadow->writer == 0)
      fail_access("read", address, bytes, pc, &buffer, "nothing was written there");
    std::uint64_t other = 0;
    if (shadow->writer != 0 && !ordered(shadow->writer, now)) other = shadow->writer;
    if (write && shadow->reader != 0 && !ordered(shadow->reader, now)) other = shadow->reader;
    if (other != 0) {
      const std::string with = "a race with launch " + std::to_string(launch_of(other)) +
                               ", block " + std::to_string(block_of(other)) + ", thread " +
                               std::to_string(thread_of(other));
      fail_access(write ? "write" : "read", address, bytes, pc, &buffer, with.c_str());
    }
    (write ? shadow->writer : shadow->reader) = now;
  }
}

void access(const void* pointer, std::size_t bytes, bool write, const void* pc) {
  if (machine == nullptr || machine->current == nullptr) return;  // the driver, not a kernel
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  const Thread& self = *machine->current;
  if (address - reinterpret_cast<std::uintptr_t>(self.stack) < kStackBytes) return;
  const char* const what = write ? "write" : "read";
  const Buffer* buffer = find(address);
  if (buffer == nullptr || address + bytes > buffer->end) {
    static const Image image;
    if (!write && address >= image.begin && address + bytes <= image.end) return;
    fail_access(what, address, bytes, pc, buffer, "outside of it");
  }
  if (write && buffer->kind == Kind::kReadOnly)
    fail_access(what, address, bytes, pc, buffer, "it is read only");
  if (buffer->kind == Kind::kWords)
    fail_access(what, address, bytes, pc, buffer, "it is for atomics and relaxed words only");
  if (buffer->owner >= 0 && buffer->owner != self.block->rank())
    fail_access(what, address, bytes, pc, buffer, "it belongs to another rank");
  if (buffer->kind != Kind::kReadOnly && bytes >= 4)
    check_race(*buffer, address, bytes, write, pc);
}

// The buffer of a word that is read or written as one, checked.
const Buffer& word_buffer(const std::uint64_t* word, Where where) {
  const auto address = reinterpret_cast<std::uintptr_t>(word);
  const Buffer* buffer = find(address);
  if (buffer == nullptr || address + 8 > buffer->end || buffer->kind != Kind::kWords ||
      buffer->owner < 0)
    machine->fail_at(where, "a relaxed word outside of any rank's words%s%s",
                     buffer != nullptr ? ", after " : "",
                     buffer != nullptr ? buffer->name.c_str() : "");
  if (address % 8 != 0) machine->fail_at(where, "a relaxed word that is not aligned");
  if (!machine->current->previous_grid_done)
    machine->fail_at(where, "a word of %s before the grid waited for the previous one",
                     buffer->name.c_str());
  return *buffer;
}

}  // namespace

void Machine::add_buffer(const void* begin, std::size_t bytes, const char* name, int owner,
                         Kind kind) {
  Buffer buffer;
  buffer.begin = reinterpret_cast<std::uintptr_t>(begin);
  buffer.end = buffer.begin + bytes;
  buffer.name = name;
  buffer.owner = owner;
  buffer.kind = kind;
  if (current == nullptr) {
    buffers.push_back(buffer);
    return;
  }
  auto after = std::upper_bound(buffers.begin(), buffers.end(), buffer.begin,
                                [](std::uintptr_t a, const Buffer& b) { return a < b.begin; });
  buffers.insert(after, buffer);
}

void Machine::sort_buffers() {
  std::stable_sort(buffers.begin(), buffers.end(), [](const Buffer& a, const Buffer& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
  });
  // The same memory again (weights that calls share) is fine; part of it is a driver's mistake.
  auto same = [](const Buffer& a, const Buffer& b) {
    return a.begin == b.begin && a.end == b.end && a.owner == b.owner && a.kind == b.kind;
  };
  buffers.erase(std::unique(buffers.begin(), buffers.end(), same), buffers.end());
  for (std::size_t i = 1; i < buffers.size(); ++i)
    if (buffers[i - 1].end > buffers[i].begin)
      error = "buffer " + buffers[i].name + " overlaps " + buffers[i - 1].name;
}

std::uint64_t atomic_add(std::uint64_t* word, std::uint64_t value, Where where) {
  machine->yield(State::kRunnable, where);
  word_buffer(word, where);
  const std::uint64_t before = *word;
  *word += value;
  return before;
}

std::uint64_t load_word(const std::uint64_t* word, Where where) {
  // Nothing can change for a poller before the next delivery to its rank, so let it rest after some
  // loads; loads of several words in turn are not mistaken for polls of one.
  constexpr unsigned kPollsBeforeRest = 8;
  Thread& self = *machine->current;
  const Buffer& buffer = word_buffer(word, where);
  if (buffer.owner != self.block->rank())
    machine->fail_at(where, "polls %s, which is a peer's", buffer.name.c_str());
  if (self.block->launch->grid.lets_in_last && self.block->lets_next_start)
    machine->fail_at(where, "polls %s after its block has let the next grid in",
                     buffer.name.c_str());
  std::uint64_t& version = machine->deliveries[static_cast<std::size_t>(self.block->rank())];
  if (self.polled_at != version) self.polls = 0;
  self.polled_at = version;
  machine->yield(++self.polls > kPollsBeforeRest ? State::kParked : State::kRunnable, where);
  return *word;
}

void store_word(std::uint64_t* word, std::uint64_t value, Where where) {
  Thread& self = *machine->current;
  const Buffer& buffer = word_buffer(word, where);
  Launch* launch = self.block->launch;
  Link& link = machine->links[{self.block->rank(), buffer.owner}];
  link.owner = buffer.owner;
  if (link.stores.empty()) link.priority = machine->random();
  link.stores.push_back({word, value, launch});
  ++launch->pending;
  machine->yield(State::kRunnable, where);
}

}  // namespace on_cpu

extern "C" {

#define ON_CPU_HOOKS(size)                                                   \
  void __tsan_read##size(const void* address) {                             \
    on_cpu::access(address, size, false, __builtin_return_address(0));       \
  }                                                                          \
  void __tsan_write##size(const void* address) {                            \
    on_cpu::access(address, size, true, __builtin_return_address(0));        \
  }                                                                          \
  void __tsan_unaligned_read##size(const void* address) {                   \
    on_cpu::access(address, size, false, __builtin_return_address(0));       \
  }                                                                          \
  void __tsan_unaligned_write##size(const void* address) {                  \
    on_cpu::access(address, size, true, __builtin_return_address(0));        \
  }

ON_CPU_HOOKS(1)
ON_CPU_HOOKS(2)
ON_CPU_HOOKS(4)
ON_CPU_HOOKS(8)
ON_CPU_HOOKS(16)

void __tsan_read_range(const void* address, std::size_t bytes) {
  on_cpu::access(address, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(const void* address, std::size_t bytes) {
  on_cpu::access(address, bytes, true, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

// The first member of the compiler's record is where in the source it happened.
struct Undefined {
  const char* file;
  std::uint32_t line, column;
};

void __ubsan_handle_type_mismatch_v1(const Undefined* at, std::uintptr_t address) {
  if (on_cpu::machine != nullptr && on_cpu::machine->current != nullptr)
    on_cpu::machine->fail("%s:%u: an access to %#zx, which is null or not aligned", at->file,
                          at->line, static_cast<std::size_t>(address));
}

#define ON_CPU_OVERFLOW(operation)                                                            \
  void __ubsan_handle_##operation##_overflow(const Undefined* at, std::size_t, std::size_t) { \
    if (on_cpu::machine != nullptr && on_cpu::machine->current != nullptr)                    \
      on_cpu::machine->fail("%s:%u: signed overflow", at->file, at->line);                    \
  }
ON_CPU_OVERFLOW(add)
ON_CPU_OVERFLOW(sub)
ON_CPU_OVERFLOW(mul)
ON_CPU_OVERFLOW(negate)

}  // extern "C"
