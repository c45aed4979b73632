// SPDX-License-Identifier: Apache-2.0
// runtime.cpp - the scheduler: fibers for the threads of a block, barriers, collectives and asynchronous copies,
// and a pool of OS threads that share the blocks of a grid.
//
// A fiber runs until it must wait; then the next runnable one of its warp, else of the next warp, goes on. A thread
// that ends hands its stack to the next one that has not started, so threads that never wait cost a function call.
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <numeric>
#include <thread>

#include "executor.h"

namespace ca {
__thread Thread* ca_self = nullptr;
thread_local Worker* worker = nullptr;
}  // namespace ca

// ca_switch(save, load): stores the callee-saved registers and the stack pointer in *save, and continues at `load`.
extern "C" void ca_switch(void** save, void* load) __attribute__((visibility("hidden")));
#if defined(__x86_64__)
constexpr int SAVED_REGISTERS = 6;
asm(R"(
.text
.globl ca_switch
.hidden ca_switch
.type ca_switch,@function
ca_switch:
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
.size ca_switch,.-ca_switch
)");
#elif defined(__aarch64__)
constexpr int SAVED_REGISTERS = 20;
asm(R"(
.text
.globl ca_switch
.hidden ca_switch
.type ca_switch,%function
ca_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size ca_switch,.-ca_switch
)");
#endif

namespace ca {
namespace {

void fiber_main();

char* new_stack() {
  void* base = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  mprotect(base, 4096, PROT_NONE);
  return static_cast<char*>(base);
}

// A stack whose first switch enters fiber_main. Tops are spread over cache sets: same depth, different lines.
void** first_frame(char* stack, int thread) {
  void** top = reinterpret_cast<void**>(stack + STACK_BYTES - 64 - thread % 64 * 64);
#if defined(__x86_64__)
  *--top = nullptr;  // keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(fiber_main);
  top -= SAVED_REGISTERS;
#else
  top -= SAVED_REGISTERS;
  top[11] = reinterpret_cast<void*>(fiber_main);  // x30, the link register
#endif
  return top;
}

uint64_t next_random(Worker* w) {
  w->random ^= w->random << 13;
  w->random ^= w->random >> 7;
  w->random ^= w->random << 17;
  return w->random;
}

Fiber* pick_other(Worker* w);

// The next fiber that can run, preferring the warp `warp`; null when none can.
inline Fiber* pick(Worker* w, int warp) {
  if (__builtin_expect(w->launch->schedule != 0, 0)) return pick_other(w);
  for (int i = 0; i < w->warps; ++i) {
    if (w->runnable[warp]) return &w->fibers[warp * 32 + __builtin_ctz(w->runnable[warp])];
    if (++warp == w->warps) warp = 0;
  }
  return nullptr;
}

// Reverse order, or any runnable fiber.
Fiber* pick_other(Worker* w) {
  int total = 0;
  for (int k = 0; k < w->warps; ++k) total += __builtin_popcount(w->runnable[k]);
  if (total == 0) return nullptr;
  int skip = w->launch->schedule == 1 ? total - 1 : static_cast<int>(next_random(w) % total);
  for (int k = 0;; ++k) {
    uint32_t lanes = w->runnable[k];
    const int n = __builtin_popcount(lanes);
    if (skip >= n) {
      skip -= n;
      continue;
    }
    for (; skip; --skip) lanes &= lanes - 1;
    return &w->fibers[k * 32 + __builtin_ctz(lanes)];
  }
}

// Leaves the running stack for fiber `to`.
inline void go_to(Worker* w, Fiber* to, void** save) {
  ca_self = to;
  if (to->state == State::NEW) {
    if (w->stacks.empty()) w->stacks.push_back(new_stack());
    to->stack = w->stacks.back();
    w->stacks.pop_back();
    to->state = State::READY;
    ca_switch(save, first_frame(to->stack, static_cast<int>(to - w->fibers)));
  } else {
    ca_switch(save, to->sp);
  }
}

[[noreturn]] void back_to_worker(Worker* w) {
  ca_self = nullptr;
  void* never_resumed;
  ca_switch(&never_resumed, w->main_sp);
  __builtin_unreachable();
}

[[noreturn]] void fail_stuck(Worker* w) {
  const Fiber* first = nullptr;
  int at_barrier = 0, in_collective = 0, done = 0;
  for (int i = 0; i < w->threads; ++i) {
    const Fiber& f = w->fibers[i];
    done += f.state == State::DONE;
    at_barrier += f.state == State::AT_BARRIER;
    in_collective += f.state == State::IN_COLLECTIVE;
    if (!first && f.state != State::DONE) first = &f;
  }
  ca_self = const_cast<Fiber*>(first);
  const int kind = in_collective && done ? CA_COLLECTIVE_MISMATCH : at_barrier && in_collective ? CA_DIVERGENT_BARRIER : CA_DEADLOCK;
  fail(w, kind, first->pc, "no thread can go on: %d wait at a barrier, %d in a warp collective, %d have ended", at_barrier,
       in_collective, done);
}

void wait_as(Worker* w, Fiber* f, State why, const void* pc) {
  f->state = why;
  f->pc = pc;
  w->runnable[f->warp] &= ~(1u << f->lane);
  Fiber* to = pick(w, f->warp);
  if (!to) fail_stuck(w);
  go_to(w, to, &f->sp);
}

void release(Worker* w, int id) {
  BarrierState& b = w->barriers[id];
  for (int k = 0; k < w->warps; ++k) {
    const uint32_t waiting = b.waiting[k];
    w->runnable[k] |= waiting;
    for (uint32_t lanes = waiting; lanes; lanes &= lanes - 1) {
      Fiber& f = w->fibers[k * 32 + __builtin_ctz(lanes)];
      f.state = State::READY;
      if (w->checker) check_release(w, f, id);
    }
    b.waiting[k] = 0;
  }
  b.arrived = 0;
}

void end_thread(Worker* w, Fiber* f) {
  f->state = State::DONE;
  w->runnable[f->warp] &= ~(1u << f->lane);
  --w->live;
  BarrierState& all = w->barriers[0];
  if (all.arrived == 0 || all.arrived != static_cast<uint32_t>(w->live)) return;
  if (w->checker) {
    fail(w, CA_DIVERGENT_BARRIER, all.pc, "%u threads wait at a block barrier that %d threads ended without reaching",
         all.arrived, w->threads - w->live);
  }
  release(w, 0);
}

void fiber_main() {
  Worker* w = worker;
  for (;;) {
    Fiber* f = static_cast<Fiber*>(ca_self);
    w->launch->entry(w->launch->args);
    end_thread(w, f);
    Fiber* to = pick(w, f->warp);
    if (to && to->state == State::NEW) {
      to->state = State::READY;
      to->stack = f->stack;
      ca_self = to;
      continue;
    }
    w->stacks.push_back(f->stack);
    if (w->live == 0) back_to_worker(w);
    if (!to) fail_stuck(w);
    void* never_resumed;
    ca_self = to;
    ca_switch(&never_resumed, to->sp);
  }
}

// Blocks are taken in order, backwards, or in a stride that visits each once.
uint64_t block_at(const CaLaunch* l, uint64_t i, uint64_t total) {
  if (l->schedule == 1) return total - 1 - i;
  if (l->schedule == 2) {
    uint64_t step = (l->seed * 2654435761u | 1) % total;
    while (std::gcd(step, total) != 1) step = (step + 1) % total;
    return (i * step + l->seed) % total;
  }
  return i;
}

void run_block(Worker* w, uint64_t number) {
  const CaLaunch* l = w->launch;
  w->block_number = number;
  w->block.index = {static_cast<unsigned>(number % l->grid[0]), static_cast<unsigned>(number / l->grid[0] % l->grid[1]),
                    static_cast<unsigned>(number / l->grid[0] / l->grid[1])};
  w->live = w->threads;
  for (int i = 0; i < w->threads; ++i) w->fibers[i].state = State::NEW;
  for (int k = 0; k < w->warps; ++k) {
    const int n = w->threads - k * 32;
    w->runnable[k] = n >= 32 ? 0xffffffffu : (1u << n) - 1;
  }
  if (w->checker) check_block_start(w);
  go_to(w, pick(w, 0), &w->main_sp);
  if (w->checker && !w->failed) check_block_end(w);
}

void prepare(Worker* w, const CaLaunch* l, CaError* error) {
  w->launch = l;
  w->error = error;
  w->failed = false;
  w->random = l->seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du;
  w->threads = l->block[0] * l->block[1] * l->block[2];
  w->warps = (w->threads + 31) / 32;
  w->block.size = {l->block[0], l->block[1], l->block[2]};
  w->block.grid = {l->grid[0], l->grid[1], l->grid[2]};
  if (w->shared.size() < l->shared_bytes + 256) w->shared.resize(l->shared_bytes + 256);
  w->block.shared = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(w->shared.data()) + 127) & ~uintptr_t(127));
  memset(w->meetings, 0, sizeof w->meetings);
  memset(w->barriers, 0, sizeof w->barriers);
  w->copies.assign(l->late_async ? w->threads : 0, {});
  w->copy_group.assign(l->late_async ? w->threads : 0, 0);
  for (int i = 0; i < w->threads; ++i) {
    Fiber& f = w->fibers[i];
    f.index = {i % l->block[0], i / l->block[0] % l->block[1], i / l->block[0] / l->block[1]};
    f.lane = i % 32;
    f.warp = i / 32;
    f.block = &w->block;
  }
}

struct Pool {
  std::mutex mutex;
  std::condition_variable wake;
  std::vector<std::thread> threads;
  std::atomic<uint64_t> launches{0};  // goes up by one when helpers have work
  std::atomic<int> busy{0};           // helpers not yet done with this launch
  std::atomic<uint64_t> next{0};      // block to take next
  std::atomic<bool> stop{false};      // an error, or abandoned
  CaLaunch launch;
  CaError error;
  uint64_t total;
  int helpers;
  Checker* checker;
};
Pool* pool = new Pool;
std::mutex launching;  // held from ca_launch to the launch's end

// The child of a fork has no helpers: it starts over with an empty pool.
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] {
  pool = new Pool;
  new (&launching) std::mutex;
});

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  asm volatile("yield");
#endif
}

// Takes blocks until there are none, or for about 100 ms when `sliced`.
void work(bool sliced) {
  if (!worker) worker = new Worker();
  CaError error{};
  error.argument = -1;
  prepare(worker, &pool->launch, &error);
  worker->checker = pool->checker;
  timespec start, now;
  clock_gettime(CLOCK_MONOTONIC, &start);
  while (!pool->stop.load(std::memory_order_relaxed)) {
    const uint64_t i = pool->next.fetch_add(1, std::memory_order_relaxed);
    if (i >= pool->total) break;
    run_block(worker, block_at(&pool->launch, i, pool->total));
    if (worker->failed) {
      std::lock_guard<std::mutex> hold(pool->mutex);
      if (!pool->stop) pool->error = error;
      pool->stop = true;
      delete worker;  // with the stacks of the fibers that never ended
      worker = nullptr;
      return;
    }
    if (sliced) {
      clock_gettime(CLOCK_MONOTONIC, &now);
      if ((now.tv_sec - start.tv_sec) * 1000 + (now.tv_nsec - start.tv_nsec) / 1000000 > 100) return;
    }
  }
}

void help(int id, uint64_t seen) {
  for (;;) {
    for (int i = 0; i < 2000 && pool->launches.load(std::memory_order_acquire) == seen; ++i) pause_briefly();
    if (pool->launches.load(std::memory_order_acquire) == seen) {
      std::unique_lock<std::mutex> hold(pool->mutex);
      pool->wake.wait(hold, [&] { return pool->launches.load() != seen; });
    }
    seen = pool->launches.load();
    if (id < pool->helpers) {
      work(false);
      pool->busy.fetch_sub(1, std::memory_order_release);
    }
  }
}

void end_launch() {
  while (pool->busy.load(std::memory_order_acquire)) pause_briefly();
  if (pool->checker) delete_checker(pool->checker);
  pool->checker = nullptr;
  launching.unlock();
}

int go_on(CaError* error) {
  work(true);
  if (!pool->stop && pool->next.load() < pool->total) return 2;
  while (pool->busy.load(std::memory_order_acquire)) pause_briefly();
  const int code = pool->stop ? 1 : 0;
  if (code) *error = pool->error;
  end_launch();
  return code;
}

}  // namespace

void fail(Worker* w, int kind, const void* pc, const char* format, ...) {
  CaError& e = *w->error;
  w->failed = true;
  e.kind = kind;
  e.pc = reinterpret_cast<uint64_t>(pc);
  e.block[0] = w->block.index.x, e.block[1] = w->block.index.y, e.block[2] = w->block.index.z;
  if (ca_self) e.thread[0] = ca_self->index.x, e.thread[1] = ca_self->index.y, e.thread[2] = ca_self->index.z;
  va_list list;
  va_start(list, format);
  vsnprintf(e.message, sizeof e.message, format, list);
  va_end(list);
  back_to_worker(w);
}

Worker::~Worker() {
  for (char* stack : stacks) munmap(stack, STACK_BYTES);
  for (int i = 0; i < threads; ++i) {
    if (fibers[i].state != State::NEW && fibers[i].state != State::DONE) munmap(fibers[i].stack, STACK_BYTES);
  }
}

}  // namespace ca

using namespace ca;

CA_API int ca_launch(const CaLaunch* l, CaError* error) {
  const uint64_t threads = uint64_t{l->block[0]} * l->block[1] * l->block[2];
  if (threads == 0 || threads > MAX_THREADS) {
    error->kind = CA_BAD_LAUNCH;
    snprintf(error->message, sizeof error->message, "a block must have 1 to 1024 threads, got %llu",
             static_cast<unsigned long long>(threads));
    return 1;
  }
  launching.lock();
  pool->launch = *l;
  pool->total = uint64_t{l->grid[0]} * l->grid[1] * l->grid[2];
  pool->next = 0;
  pool->stop = false;
  pool->checker = l->check ? new_checker(&pool->launch) : nullptr;
  // one worker when checking: the shadow of global memory has no locks
  pool->helpers = l->check || pool->total < 2 ? 0 : static_cast<int>(std::min<uint64_t>(l->workers - 1, pool->total - 1));
  while (static_cast<int>(pool->threads.size()) < pool->helpers) {
    pool->threads.emplace_back(help, static_cast<int>(pool->threads.size()), pool->launches.load());
    pool->threads.back().detach();
  }
  if (pool->helpers) {
    pool->busy = pool->helpers;
    {
      std::lock_guard<std::mutex> hold(pool->mutex);
      pool->launches.fetch_add(1, std::memory_order_release);
    }
    pool->wake.notify_all();
  }
  return go_on(error);
}

CA_API int ca_resume(CaError* error) { return go_on(error); }

CA_API void ca_abandon(void) {
  pool->stop = true;
  end_launch();
}

CA_API int ca_api_version(void) { return 1; }

CA_API void ca_collective(uint32_t mask, Meet meet, void* operand) {
  Worker* w = worker;
  Fiber* f = static_cast<Fiber*>(ca_self);
  const void* pc = __builtin_return_address(0);
  const int in_warp = w->threads - static_cast<int>(f->warp) * 32;
  if (in_warp < 32) mask &= (1u << in_warp) - 1;
  Meeting* meeting = nullptr;
  for (Meeting& m : w->meetings[f->warp]) {
    if (m.arrived && m.mask == mask) {
      meeting = &m;
      break;
    }
    if (!m.arrived && !meeting) meeting = &m;
  }
  if (!(mask >> f->lane & 1) || !meeting) {
    fail(w, CA_COLLECTIVE_MISMATCH, pc, "lane %u is not in the mask %08x of its own collective", f->lane, mask);
  }
  if (!meeting->arrived) {
    meeting->mask = mask;
    meeting->meet = meet;
    meeting->pc = pc;
    if (mask != 0xffffffffu) memset(meeting->operands, 0, sizeof meeting->operands);
  } else if (meeting->meet != meet) {
    w->error->other_pc = reinterpret_cast<uint64_t>(meeting->pc);
    fail(w, CA_COLLECTIVE_MISMATCH, pc, "lanes of mask %08x meet in different instructions", mask);
  }
  meeting->arrived |= 1u << f->lane;
  meeting->operands[f->lane] = operand;
  if (meeting->arrived != mask) {
    wait_as(w, f, State::IN_COLLECTIVE, pc);
    return;
  }
  meeting->arrived = 0;
  if (w->checker) check_meeting(w, f->warp, mask);
  meet(meeting->operands, mask);
  w->runnable[f->warp] |= mask;
}

CA_API void ca_barrier(int id, uint32_t threads, int arrive_only) {
  Worker* w = worker;
  Fiber* f = static_cast<Fiber*>(ca_self);
  BarrierState& b = w->barriers[id];
  const void* pc = __builtin_return_address(0);
  if (w->checker) {
    if (b.arrived && id == 0 && b.pc != pc) {
      w->error->other_pc = reinterpret_cast<uint64_t>(b.pc);
      fail(w, CA_DIVERGENT_BARRIER, pc, "threads of one block wait at different barriers");
    }
    check_arrive(w, *f, id);
  }
  b.pc = pc;
  if (++b.arrived == (threads ? threads : static_cast<uint32_t>(w->live))) {
    if (w->checker && threads == 0 && w->live != w->threads) {
      fail(w, CA_DIVERGENT_BARRIER, pc, "%d threads reach a block barrier that %d threads ended without reaching",
           w->live, w->threads - w->live);
    }
    release(w, id);
    if (w->checker) check_release(w, *f, id);
  } else if (!arrive_only) {
    b.waiting[f->warp] |= 1u << f->lane;
    wait_as(w, f, State::AT_BARRIER, pc);
  }
}

CA_API void ca_cp_async(void* to, const void* from, uint32_t bytes, int valid) {
  Worker* w = worker;
  const uint32_t valid_bytes = valid ? bytes : 0;
  if (w->checker) check_async_issue(w, to, from, bytes, valid_bytes, __builtin_return_address(0));
  if (!w->launch->late_async) {
    memcpy(to, from, valid_bytes);
    memset(static_cast<char*>(to) + valid_bytes, 0, bytes - valid_bytes);
    if (w->checker) check_async_land(w, to, bytes);
    return;
  }
  const size_t thread = static_cast<Fiber*>(ca_self) - w->fibers;
  memset(to, 0xff, bytes);  // NaN until the wait
  w->copies[thread].push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes, valid_bytes,
                               w->copy_group[thread]});
}

CA_API void ca_cp_async_commit(void) {
  Worker* w = worker;
  if (w->launch->late_async) ++w->copy_group[static_cast<Fiber*>(ca_self) - w->fibers];
}

CA_API void ca_cp_async_wait(uint32_t pending) {
  Worker* w = worker;
  if (!w->launch->late_async) return;
  const size_t thread = static_cast<Fiber*>(ca_self) - w->fibers;
  std::vector<AsyncCopy>& copies = w->copies[thread];
  const auto lands = [&](const AsyncCopy& c) { return c.group + pending < w->copy_group[thread]; };
  for (const AsyncCopy& c : copies) {
    if (!lands(c)) continue;
    memcpy(c.to, c.from, c.valid_bytes);
    memset(c.to + c.valid_bytes, 0, c.bytes - c.valid_bytes);
    if (w->checker) check_async_land(w, c.to, c.bytes);
  }
  copies.erase(std::remove_if(copies.begin(), copies.end(), lands), copies.end());
}

CA_API void ca_count(int event, uint64_t amount) {
  if (worker->checker) check_count(worker, event, amount);
}
