// SPDX-License-Identifier: Apache-2.0
// checker.h - the state of a checked launch, shared by checker.cpp (judging), ordering.cpp (what comes before what),
// requests.cpp (counting) and tsan.cpp (where instrumented code calls in). A checked launch has one worker, so nothing
// here is locked.
#ifndef CUPYATTN_CPU_CHECKER_H
#define CUPYATTN_CPU_CHECKER_H

#include <deque>
#include <unordered_map>

#include "executor.h"

namespace ca {

// An access as the shadow remembers it. Epochs count block barriers, clocks the synchronisations of one thread
// between two of them. Epoch 0: no access.
struct Mark {
  uint32_t epoch = 0;
  uint32_t thread : 10, clock : 22;
  uint32_t pc = 0;  // offset in the kernel library
};

struct SharedByte {
  Mark write, read, other_read;  // the reads are of different threads, of different warps if there were such
  bool atomic = false, pending = false;  // the write was atomic; was a cp.async nobody waited for
};

struct GlobalByte {
  Mark write, read;
  uint32_t write_block, read_block;  // index into Checker::blocks
  bool atomic;
};

// Blocks are ordered as CUDA's memory model does it: a thread's __threadfence, then its atomic (or that of a thread
// which a barrier or collective puts after the fence), then another block's atomic on the same address, then a
// __threadfence there. What came before the first fence is visible after the second.

// What a block had fenced when a thread of it went through an atomic.
struct Release {
  uint32_t block;
  std::vector<uint32_t> clocks;  // by thread: accesses up to here
};
using Releases = std::vector<uint32_t>;  // ascending indices into Checker::releases

struct Fence {
  Mark at;
  std::vector<uint32_t> clocks;  // by thread of the running block: accesses up to here come before the fence
  Releases releases;             // acquired before the fence: visible after it
};

struct Acquire {
  Mark at;
  Releases releases;  // those of the atomics before this one
};

struct Request {  // the lanes of a warp at one instruction, collected one after another
  uint32_t lanes = 0;
  uint32_t bytes = 0;
  CaAccess access = CA_READ;
  int buffer = -1;  // -1: shared memory
  uintptr_t address[WARP];
};

struct Instruction {  // per warp, code address and access
  const void* pc = nullptr;
  uint64_t meeting = 0;       // of the warp, the latest before
  uint32_t times[WARP] = {};  // executed by each lane since
  uint64_t first = 0;         // number of the oldest open request
  std::deque<Request> open;
};

struct Clocks {  // what an acquiring thread will know, by thread; valid in one epoch
  uint32_t epoch = 0;
  std::vector<uint32_t> seen;
};

struct Range {
  uintptr_t low = 0, high = 0;
  bool holds(uintptr_t a, size_t bytes) const { return a >= low && a + bytes <= high; }
};

struct Checker {
  const CaLaunch* launch;
  int threads;
  std::vector<GlobalByte*> global;  // shadow of each buffer, null for read-only ones
  std::vector<int> by_base;         // buffers in the order of their addresses
  std::vector<uint64_t> reach;      // where by_base[0..i] end
  std::vector<bool> overlaps;       // the buffer shares bytes with another
  int last_buffer = 0;
  std::vector<SharedByte> dynamic_shared, static_shared;
  Range static_range;   // static shared memory of this OS thread
  Range library, args;  // of the kernel
  uint32_t epoch = 0, block_epoch = 0;  // now, and when the block began
  std::vector<uint32_t> clock;          // own clock of each thread
  std::vector<uint32_t> epoch_clock;    // what it was when the epoch before this one ended
  std::vector<Clocks> known;            // what each thread knows of the others
  Clocks barriers[BARRIERS];
  std::unordered_map<uintptr_t, Clocks> atomics;
  uint32_t crossed_epoch = 0;           // in it, knowledge has passed between warps
  std::vector<uint64_t> blocks{0};      // numbers of those that have begun, the running one last; entry 0: none
  std::vector<Release> releases;
  std::unordered_map<uintptr_t, Releases> places;  // of atomics that follow a fence
  std::vector<Fence> fences;            // of the running block in this epoch,
  Fence settled;                        // those before it taken together
  std::vector<Acquire> acquires;        // of the running block in this epoch,
  Releases acquired;                    // those before it taken together
  uint32_t last_release = 0;            // the one that made an access legal last, plus one
  bool unseen = false;                  // inside a collective's own code
  std::unordered_map<uint64_t, Instruction> instructions;
  uint64_t meetings[MAX_WARPS] = {};    // of all lanes of a warp
  std::unordered_map<uint64_t, CaSharedCounters> shared;  // by code address and access
};

// Judges one access of the running thread.
void on_access(const void* pointer, size_t bytes, CaAccess access, bool atomic, const void* pc);
inline void on_access(const void* pointer, size_t bytes, bool write, bool atomic, const void* pc) {
  on_access(pointer, bytes, write ? CA_WRITE : CA_READ, atomic, pc);
}
// A read-modify-write; it orders the thread after every earlier one on the address.
void on_atomic(const void* pointer, size_t bytes, const void* pc);
void on_function_entry(const void* frame, const void* pc);

// ordering.cpp
Mark mark_now(Checker* c, int thread, const void* pc);
bool ordered_before(Checker* c, const Mark& m, int thread);      // within the block
void release_to(Checker* c, Clocks& place, int thread);          // publishes what the thread has done and knows
void acquire_from(Checker* c, Clocks& place, int thread);
void begin_epoch(Checker* c);
void pass_global_atomic(Checker* c, uintptr_t address, int thread);
bool visible_from_block(Checker* c, uint32_t block, const Mark& m, int thread);  // an access of another block

// requests.cpp
void note_request(Worker* w, int buffer, uintptr_t address, size_t bytes, CaAccess access, const void* pc);
void finish_requests(Checker* c);   // of a block
void report_requests(Checker* c);   // of the launch

}  // namespace ca

#endif  // CUPYATTN_CPU_CHECKER_H
