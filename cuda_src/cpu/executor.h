// SPDX-License-Identifier: Apache-2.0
// executor.h - the state of one OS thread that runs blocks, and what the executor's files know of each other.
//
// fibers.cpp schedules the threads of a block, primitives.cpp makes them meet, pool.cpp spreads a grid over OS
// threads, checker.cpp judges memory accesses.
#ifndef CUPYATTN_CPU_EXECUTOR_H
#define CUPYATTN_CPU_EXECUTOR_H

#include <atomic>
#include <vector>

#include "cuda_cpu.h"

namespace ca {

constexpr int WARP = 32, MAX_THREADS = 1024, MAX_WARPS = MAX_THREADS / WARP;
constexpr int BARRIERS = 16;                 // barrier 0 is __syncthreads
constexpr size_t PAGE = 4096;
constexpr size_t STACK_BYTES = 128 * 1024;   // address space; only pages that are touched exist
constexpr size_t STACK_STRIDE = STACK_BYTES + PAGE;  // a guard page below each
constexpr uint32_t MAX_DYNAMIC_SHARED = 227 * 1024;

struct Checker;
struct Worker;

// Where a kernel waits. `pc` is a return address inside the kernel library.
struct Site {
  const char* file;
  int line;
  const void* pc;
};

// What a thread last waited for; it may be running again.
enum class State : uint8_t { NEW, STARTED, AT_BARRIER, IN_COLLECTIVE, DONE };

struct alignas(64) Fiber : Thread {  // one cache line
  void* sp;          // saved stack pointer while another fiber runs
  Worker* worker;
  int number;        // of the thread in its block, x fastest
  int stack;         // index of its stack
  uint32_t waits_for;  // number of the barrier, or mask of the collective
  State state;
};

// A collective that some lanes of a warp have reached.
struct Meeting {
  uint32_t mask, arrived;
  Meet meet;
  Site site;
};

struct BarrierState {
  uint32_t arrived, expected;
  uint32_t waiting[MAX_WARPS];  // lanes of each warp
  int first;                    // thread that came first,
  Site site;                    // and where
};

struct AsyncCopy {  // a cp.async whose data is not there yet
  char* to;
  const char* from;
  uint32_t bytes, valid_bytes;
  uint32_t group;
};
struct AsyncQueue {  // of one thread, late mode only
  std::vector<AsyncCopy> copies;
  uint32_t group = 0;  // the one the next copy joins
};

// One launch, as all workers see it.
struct Job {
  CaLaunch launch;
  std::vector<char> storage;
  const void* args;                // 64-byte aligned copy of the argument struct
  uint64_t blocks;
  uint64_t factor, offset;         // the i-th block taken is (i * factor + offset) % blocks
  std::atomic<uint64_t> next;      // i
  std::atomic<bool> stop;          // abandon all blocks
  std::atomic<bool> failed;        // `error` is taken
  CaError error;
  Checker* checker;                // null unless the launch is checked
};

struct Worker {
  Fiber fibers[MAX_THREADS];
  uint32_t runnable[MAX_WARPS];    // lanes ready to run, without the running one
  uint32_t existing[MAX_WARPS];    // lanes the block has
  uint32_t runnable_warps;         // warps with a runnable lane
  Meeting meetings[MAX_WARPS][WARP];
  uint32_t open_meetings[MAX_WARPS];  // those that some lanes have reached
  void* operands[MAX_WARPS][WARP];
  BarrierState barriers[BARRIERS];
  AsyncQueue async[MAX_THREADS];
  int free_stacks[MAX_THREADS], num_free_stacks;
  bool guarded[MAX_THREADS];
  char* stacks;
  size_t shared_capacity;
  Block block;
  uint64_t block_number;
  void* main_sp;
  Fiber* suspended;                // runs first when the next time slice begins
  Job* job;
  CaEntry entry;
  Checker* checker;
  CaError error;                   // filled before fail() is called
  int threads, warps, done, schedule;
  uint64_t random;
  uint64_t switches, idle_yields;
  uint64_t deadline_ns;            // end of the time slice; 0 on helpers, which have none
  bool dirty;                      // a block was abandoned half way
};

// The open collective of exactly these lanes; null if none has come yet. Disjoint masks may be open at once, and a
// mask may overlap one whose other lanes go there first.
inline Meeting* find_meeting(Worker* w, uint32_t warp, uint32_t mask) {
  for (uint32_t open = w->open_meetings[warp]; open; open &= open - 1) {
    Meeting* m = &w->meetings[warp][__builtin_ctz(open)];
    if (m->mask == mask) return m;
  }
  return nullptr;
}

inline Fiber* self() { return static_cast<Fiber*>(ca_self); }

// ---- fibers.cpp ------------------------------------------------------------------------------------------

enum class Outcome { DONE, ABANDONED, SUSPENDED };

Worker* new_worker();              // null without memory
void prepare(Worker* w, Job* job);
Outcome run_block(Worker* w, uint64_t number);
Outcome resume_block(Worker* w);
void wait_as(Fiber* f, State why, uint32_t what);  // until make_runnable names it
void make_runnable(Worker* w, int warp, uint32_t lanes);
void* map_memory(size_t bytes);    // zeroed and only reserved; null if there is none
uint64_t now_ns();
// Names `other` as the second party of the error to come.
void blame(Worker* w, const Fiber* other, const void* pc);
// Ends the launch with an error; the calling fiber never comes back.
[[noreturn]] void fail(Worker* w, int kind, const void* pc, const char* format, ...)
    __attribute__((format(printf, 4, 5)));

// ---- checker.cpp and ordering.cpp: called when worker->checker is set -------------------------------------

Checker* new_checker(const Job* job);  // null without memory
void delete_checker(Checker* checker);
void check_block_start(Worker* w);
void check_block_end(Worker* w);
void check_arrive(Worker* w, const Fiber& fiber, int barrier);   // a thread reaches a barrier
void check_release(Worker* w, const Fiber& fiber, int barrier);  // and leaves it
void check_meeting(Worker* w, uint32_t warp, uint32_t mask);     // lanes met in a collective
void check_fence(Worker* w);                                     // the running thread's __threadfence
void check_meet_body(Worker* w, bool running);                   // what a collective does itself is not judged
void check_async_issue(Worker* w, const AsyncCopy& copy, const void* pc);
void check_async_land(Worker* w, const AsyncCopy& copy);
void check_count(Worker* w, int event, uint64_t amount);

}  // namespace ca

#endif  // CUPYATTN_CPU_EXECUTOR_H
