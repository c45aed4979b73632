// SPDX-License-Identifier: Apache-2.0
// executor.h - what the scheduler (runtime.cpp) and the checker (checker.cpp) know of each other.
#ifndef CUPYATTN_CPU_EXECUTOR_H
#define CUPYATTN_CPU_EXECUTOR_H

#include <memory>
#include <vector>

#include "api.h"
#include "cuda_cpu.h"

namespace ca {

constexpr int MAX_THREADS = 1024;
constexpr int MAX_WARPS = MAX_THREADS / 32;
constexpr int BARRIERS = 16;            // barrier 0 is __syncthreads
constexpr int MEETINGS = 4;             // collectives a warp may have open at once, with disjoint masks
constexpr size_t STACK_BYTES = 256 * 1024;

enum class State : uint8_t { NEW, READY, AT_BARRIER, IN_COLLECTIVE, DONE };

struct Fiber : Thread {
  void* sp;          // saved stack pointer while another fiber runs
  char* stack;       // lowest address, a guard page
  const void* pc;    // where it waits
  State state;
};

struct Meeting {     // one collective of some lanes of a warp
  uint32_t mask, arrived;
  Meet meet;
  const void* pc;
  void* operands[32];
};

struct BarrierState {
  uint32_t arrived;
  const void* pc;
  uint32_t waiting[MAX_WARPS];  // lanes of each warp
};

struct AsyncCopy {   // a cp.async whose data is not there yet
  char* to;
  const char* from;
  uint32_t bytes, valid_bytes;
  uint32_t group;
};

struct Checker;

// What one OS thread needs to run one block at a time.
struct Worker {
  Fiber fibers[MAX_THREADS];
  uint32_t runnable[MAX_WARPS];
  Meeting meetings[MAX_WARPS][MEETINGS];
  BarrierState barriers[BARRIERS];
  std::vector<char*> stacks;               // unused ones
  std::vector<char> shared;
  std::vector<std::vector<AsyncCopy>> copies;  // per thread, only with late_async
  std::vector<uint32_t> copy_group;            // per thread: group the next cp.async joins
  Block block;
  uint64_t block_number;
  void* main_sp;
  int threads, live, warps;
  uint64_t random;
  const CaLaunch* launch;
  CaError* error;
  bool failed;
  Checker* checker;                        // null unless the launch is checked
  ~Worker();
};

extern thread_local Worker* worker;

// Ends the launch with an error; the calling fiber never comes back.
[[noreturn]] void fail(Worker* w, int kind, const void* pc, const char* format, ...) __attribute__((format(printf, 4, 5)));

// ---- checker.cpp: called by the scheduler when worker->checker is set -----------------------------------

Checker* new_checker(const CaLaunch* launch);
void delete_checker(Checker* checker);
void check_block_start(Worker* w);
void check_block_end(Worker* w);
void check_arrive(Worker* w, const Fiber& fiber, int barrier);              // a thread reaches a barrier
void check_release(Worker* w, const Fiber& fiber, int barrier);             // and leaves it
void check_meeting(Worker* w, uint32_t warp, uint32_t mask);                // lanes met in a collective
void check_async_issue(Worker* w, const void* to, const void* from, uint32_t bytes, uint32_t valid, const void* pc);
void check_async_land(Worker* w, const void* to, uint32_t bytes);
void check_count(Worker* w, int event, uint64_t amount);

}  // namespace ca

#endif  // CUPYATTN_CPU_EXECUTOR_H
