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
  uint32_t write_owner, read_owner;  // index into Checker::owners
  bool atomic;
};

// The accesses of a block between two global atomics of it. Entry 0 stands for none.
struct Owner {
  uint64_t block;
  uint64_t published;  // time of the atomic that followed, 0 if none did
};

struct Request {  // the lanes of a warp at one instruction, collected one after another
  uint32_t lanes = 0;
  uint32_t bytes = 0;
  bool write = false;
  int buffer = -1;  // -1: shared memory
  uintptr_t address[WARP];
};

struct Instruction {  // per warp and code address
  uint32_t times[WARP] = {};  // executed by each lane
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
  std::vector<bool> overlaps;       // the buffer shares bytes with another
  int last_buffer = 0;
  std::vector<SharedByte> dynamic_shared, static_shared;
  Range static_range;   // static shared memory of this OS thread
  Range library, args;  // of the kernel
  uint32_t epoch = 0, block_epoch = 0;  // now, and when the block began
  std::vector<uint32_t> clock;          // own clock of each thread
  std::vector<Clocks> known;            // what each thread knows of the others
  Clocks barriers[BARRIERS];
  std::unordered_map<uintptr_t, Clocks> atomics;
  uint32_t crossed_epoch = 0;           // in it, knowledge has passed between warps
  std::vector<Owner> owners;
  uint32_t owner = 0;                   // of the running block's accesses, 0: none yet
  uint64_t time = 0, acquired = 0;      // global atomics so far; the block's last
  bool unseen = false;                  // inside a collective's own code
  std::unordered_map<uint64_t, Instruction> instructions;
};

// Judges one access of the running thread.
void on_access(const void* pointer, size_t bytes, bool write, bool atomic, const void* pc);
// A read-modify-write; it orders the thread after every earlier one on the address.
void on_atomic(const void* pointer, size_t bytes, const void* pc);
void on_function_entry(const void* frame, const void* pc);

// ordering.cpp
Mark mark_now(Checker* c, int thread, const void* pc);
bool ordered_before(Checker* c, const Mark& m, int thread);      // within the block
void release_to(Checker* c, Clocks& place, int thread);          // publishes what the thread has done and knows
void acquire_from(Checker* c, Clocks& place, int thread);

// requests.cpp
void note_request(Worker* w, int buffer, uintptr_t address, size_t bytes, bool write, const void* pc);
void finish_requests(Checker* c);

}  // namespace ca

#endif  // CUPYATTN_CPU_CHECKER_H
