// What threads of a block do together: barriers, shuffles, shared memory, and who misses them.
#include <cstdlib>
#include <cstring>

#include "machine.h"

namespace on_cpu {

[[gnu::const]] Index thread_index() { return {machine->current->number, 0}; }
[[gnu::const]] Index block_index() { return machine->current->block->index; }
[[gnu::const]] Index block_size() { return {machine->current->block->launch->grid.threads, 1}; }
[[gnu::const]] Index grid_size() { return machine->current->block->launch->grid.blocks; }

namespace {

const char* name_of(Collective kind) {
  return kind == Collective::kSync ? "__syncwarp" : "shuffle";
}

bool same_place(Where a, Where b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

bool meets(const Meeting& a, const Meeting& b) {
  return a.kind == b.kind && a.mask == b.mask && a.width == b.width &&
         (a.kind != Collective::kShuffleXor || a.argument == b.argument) &&
         same_place(a.where, b.where);
}

unsigned lane_of(const Thread& thread) { return thread.number % kWarp; }

// The thread in a lane of the warp of `thread`, or null where the block has none.
Thread* in_lane(const Thread& thread, unsigned lane) {
  const unsigned number = thread.number / kWarp * kWarp + lane;
  return number < thread.block->threads.size() ? &thread.block->threads[number] : nullptr;
}

// `self` goes to a place where no lane that waits for it in the warp can be met.
void check_nobody_waits_for(Thread& self, const char* instead, Where where) {
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    Thread* other = in_lane(self, lane);
    if (other == nullptr || other->state != State::kInWarp) continue;
    if (other->meeting.mask >> lane_of(self) & 1u)
      machine->fail_at(where, "%s, while lane %u waits for it in a %s at %s (divergent branch)",
                       instead, lane, name_of(other->meeting.kind),
                       describe(other->meeting.where).c_str());
  }
}

void complete(Thread& self, unsigned mask) {
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1u)) continue;
    Thread& reader = *in_lane(self, lane);
    const Meeting& meeting = reader.meeting;
    if (meeting.kind == Collective::kSync) continue;
    const unsigned width = static_cast<unsigned>(meeting.width), segment = lane & ~(width - 1);
    const unsigned argument = static_cast<unsigned>(meeting.argument);
    unsigned source = meeting.kind == Collective::kShuffleXor ? lane ^ argument
                                                              : segment | (argument & (width - 1));
    if (source >= segment + width) source = lane;
    if (source >= kWarp || !(mask >> source & 1u))
      machine->fail_at(meeting.where, "lane %u reads lane %u, which mask %08x does not name", lane,
                       source, mask);
    reader.received = in_lane(self, source)->meeting.value;
  }
  if (self.meeting.kind == Collective::kSync) ++self.block->warp_generation[self.number / kWarp];
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    Thread* other = in_lane(self, lane);
    if ((mask >> lane & 1u) && other != &self) machine->make_runnable(*other);
  }
}

std::uint32_t meet(const Meeting& meeting) {
  Thread& self = *machine->current;
  const Where where = meeting.where;
  const unsigned mine = lane_of(self), mask = meeting.mask;
  if (meeting.width < 1 || meeting.width > 32 || (meeting.width & (meeting.width - 1)) != 0)
    machine->fail_at(where, "a shuffle of width %d", meeting.width);
  if (!(mask >> mine & 1u)) machine->fail_at(where, "mask %08x does not name the caller", mask);
  self.meeting = meeting;
  bool all = true;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    Thread* other = in_lane(self, lane);
    if (lane == mine) continue;
    const bool named = mask >> lane & 1u;
    if (!named) continue;
    if (other == nullptr || other->state == State::kExited)
      machine->fail_at(where, "%s whose mask %08x names lane %u, which %s", name_of(meeting.kind),
                       mask, lane, other == nullptr ? "does not exist" : "has ended");
    if (other->state == State::kInBlock)
      machine->fail_at(where,
                       "%s whose mask %08x names lane %u, which waits in __syncthreads at %s",
                       name_of(meeting.kind), mask, lane, describe(other->where).c_str());
    if (other->state != State::kInWarp) {
      all = false;
    } else if (!meets(other->meeting, meeting)) {
      if (other->meeting.mask >> mine & 1u)
        machine->fail_at(where, "%s, while lane %u waits for it in another %s at %s (divergence)",
                         name_of(meeting.kind), lane, name_of(other->meeting.kind),
                         describe(other->meeting.where).c_str());
      all = false;
    }
  }
  if (all) {
    complete(self, mask);
    machine->yield(State::kRunnable, where);
  } else {
    machine->yield(State::kInWarp, where);
  }
  return self.received;
}

}  // namespace

void check_exit(Thread& self) {
  check_nobody_waits_for(self, "ends", self.where);
  if (self.block->arrived > 0)
    for (Thread& other : self.block->threads)
      if (other.state == State::kInBlock)
        machine->fail("ends, while thread %u waits for it in __syncthreads at %s", other.number,
                      describe(other.where).c_str());
}

void sync_threads(Where where) {
  Thread& self = *machine->current;
  Block& block = *self.block;
  check_nobody_waits_for(self, "__syncthreads", where);
  if (block.exited > 0) machine->fail_at(where, "__syncthreads after a thread of the block ended");
  if (block.arrived > 0)
    for (Thread& other : block.threads)
      if (other.state == State::kInBlock) {
        if (!same_place(other.where, where))
          machine->fail_at(where, "__syncthreads, while thread %u waits in another one at %s",
                           other.number, describe(other.where).c_str());
        break;
      }
  if (++block.arrived < block.threads.size()) {
    machine->yield(State::kInBlock, where);
    return;
  }
  block.arrived = 0;
  ++block.generation;
  for (Thread& other : block.threads)
    if (other.state == State::kInBlock) machine->make_runnable(other);
  machine->yield(State::kRunnable, where);
}

void sync_warp(unsigned mask, Where where) { meet({Collective::kSync, mask, 32, 0, 0, where}); }

std::uint32_t shuffle_xor(unsigned mask, std::uint32_t value, int lanes, int width, Where where) {
  return meet({Collective::kShuffleXor, mask, width, lanes, value, where});
}

std::uint32_t shuffle_from(unsigned mask, std::uint32_t value, int lane, int width, Where where) {
  return meet({Collective::kShuffleFrom, mask, width, lane, value, where});
}

void wait_for_previous_grid() {
  Thread& self = *machine->current;
  self.previous_grid_done = true;
  Launch& launch = *self.block->launch;
  const auto stream = static_cast<std::size_t>(launch.grid.stream);
  const bool first = machine->streams[stream].front() == &launch;
  machine->yield(first ? State::kRunnable : State::kWaitsForGrid, Where::current());
}

void let_next_grid_start() { machine->current->block->lets_next_start = true; }

void* shared_memory(const char* name, std::size_t bytes, std::size_t alignment, Where where) {
  Block& block = *machine->current->block;
  for (Shared& shared : block.shared)
    if (same_place(shared.where, where) && std::strcmp(shared.name, name) == 0) return shared.data;
  // On a page of its own kind; garbage, as on the device (the shadow knows what was written).
  const std::size_t unit = alignment < 64 ? 64 : alignment;
  auto* data = static_cast<char*>(std::aligned_alloc(unit, (bytes + unit - 1) / unit * unit));
  std::memset(data, 0xa5, bytes);
  block.shared.push_back({name, where, data, bytes});
  machine->add_buffer(data, bytes, name, block.rank(), Kind::kShared);
  return data;
}

}  // namespace on_cpu
