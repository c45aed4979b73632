// SPDX-License-Identifier: Apache-2.0
// fibers.cpp - the threads of a block as fibers: switching, scheduling, and the life of a block on one OS thread.
//
// A fiber that must wait picks the next one itself and switches to it directly. Threads that never wait run one
// after the other on the same stack.
#include "executor.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "switch.h"

namespace ca {
__thread Thread* ca_self = nullptr;
}

namespace ca {
namespace {

constexpr uint64_t POLL_MASK = 0xfff;  // switches between two looks at the clock and the stop flag
constexpr uint64_t MAX_IDLE_YIELDS = 20'000'000;

uint32_t random_below(Worker* w, uint32_t n) {
  w->random ^= w->random << 13;
  w->random ^= w->random >> 7;
  w->random ^= w->random << 17;
  return static_cast<uint32_t>((w->random >> 32) * n >> 32);
}

int nth_bit(uint32_t bits, uint32_t n) {
  for (; n; --n) bits &= bits - 1;
  return __builtin_ctz(bits);
}

// The warp to go on with when `warp` has no runnable lane, or must not run (other_warp).
inline int pick_warp(Worker* w, int warp, bool other_warp) {
  const uint32_t all = w->runnable_warps;
  if (w->schedule == 2) return nth_bit(all, random_below(w, __builtin_popcount(all)));
  if (!other_warp && all >> warp & 1) return warp;
  if (w->schedule == 1) {
    const uint32_t below = all & ((1u << warp) - 1);
    return 31 - __builtin_clz(below ? below : all);
  }
  const uint32_t above = all & ~((2u << warp) - 1);
  return __builtin_ctz(above ? above : all);
}

// Takes a runnable fiber out of the runnable set; null if there is none.
inline Fiber* pick(Worker* w, int warp, bool other_warp = false) {
  if (!w->runnable_warps) return nullptr;
  warp = pick_warp(w, warp, other_warp);
  const uint32_t lanes = w->runnable[warp];
  int lane = __builtin_ctz(lanes);
  if (__builtin_expect(w->schedule != 0, 0)) {
    lane = w->schedule == 1 ? 31 - __builtin_clz(lanes) : nth_bit(lanes, random_below(w, __builtin_popcount(lanes)));
  }
  const uint32_t left = lanes & ~(1u << lane);
  w->runnable[warp] = left;
  if (!left) w->runnable_warps &= ~(1u << warp);
  return &w->fibers[warp * WARP + lane];
}

void fiber_main();

// A stack no fiber uses, starting at its own multiple of 64 bytes: equal ones would compete for the same cache sets.
__attribute__((noinline)) void* take_stack(Worker* w, Fiber* f) {
  const int i = f->stack = w->free_stacks[--w->num_free_stacks];
  char* base = w->stacks + i * STACK_STRIDE;
  if (!w->guarded[i]) {
    w->guarded[i] = true;
    mprotect(base, PAGE, PROT_NONE);
  }
  void** top = reinterpret_cast<void**>(base + STACK_STRIDE - 128 - i % 64 * 64);
  top -= 1;  // as after a call: misaligned by one word on x86-64, see the alignment below
#if defined(__aarch64__)
  top -= 1;
#endif
  *top = nullptr;
  top -= SAVED_WORDS;
  memset(top, 0, SAVED_WORDS * sizeof(void*));
  top[RETURN_WORD] = reinterpret_cast<void*>(fiber_main);
  return top;
}

// Leaves the running code, whose stack pointer goes to *from, for fiber `to`.
inline void run(Worker* w, Fiber* to, void** from) {
  ++w->switches;
  ca_self = to;
  if (__builtin_expect(to->state == State::NEW, 0)) {
    to->state = State::STARTED;
    to->sp = take_stack(w, to);
  }
  ca_switch(from, to->sp);
}

[[noreturn]] void leave_block(Worker* w) {
  void* dead;
  ca_switch(&dead, w->main_sp);
  __builtin_unreachable();
}

// True once in a while, when the launch is being abandoned or the time slice is over.
__attribute__((noinline)) bool must_pause(Worker* w) {
  if (w->job->stop.load(std::memory_order_relaxed)) {
    w->dirty = true;
    leave_block(w);
  }
  return w->deadline_ns && now_ns() > w->deadline_ns;
}

[[noreturn]] void fail_stuck(Worker* w);

// The calls of ca_switch on the way of a waiting thread are tail calls: it keeps one frame on its stack.
void go_on_with(Worker* w, Fiber* f, Fiber* to) {
  if (__builtin_expect((w->switches & POLL_MASK) == POLL_MASK, 0) && must_pause(w)) {
    ++w->switches;
    w->suspended = to;
    return ca_switch(&f->sp, w->main_sp);
  }
  run(w, to, &f->sp);
}

void fiber_main() {
  Worker* const w = self()->worker;
  for (;;) {
    Fiber* f = self();
    w->entry(w->job->args);
    f->state = State::DONE;
    ++w->done;
    w->idle_yields = 0;
    Fiber* to = pick(w, f->warp);
    if (to && to->state == State::NEW) {  // on this very stack
      to->state = State::STARTED;
      to->stack = f->stack;
      ca_self = to;
      continue;
    }
    if (!to && w->done < w->threads) fail_stuck(w);
    w->free_stacks[w->num_free_stacks++] = f->stack;
    if (!to) leave_block(w);
    void* dead;
    run(w, to, &dead);
  }
}

const Site& place(Worker* w, const Fiber* f) {
  if (f->state == State::AT_BARRIER) return w->barriers[f->waits_for].site;
  return find_meeting(w, f->warp, f->waits_for)->site;
}

// Lanes wait in a collective for `absent` ones of their warp that will not come.
[[noreturn]] void fail_meeting(Worker* w, Fiber* f, uint32_t absent) {
  const Fiber* other = &w->fibers[f->warp * WARP + __builtin_ctz(absent)];
  const Site& here = place(w, f);
  ca_self = f;
  if (other->state == State::DONE) {
    blame(w, other, nullptr);
    fail(w, CA_COLLECTIVE_MISMATCH, here.pc, "lanes of mask 0x%08x wait at %s:%d for lane %u, which has ended",
         f->waits_for, here.file, here.line, other->lane);
  }
  const Site& there = place(w, other);
  blame(w, other, there.pc);
  fail(w, CA_COLLECTIVE_MISMATCH, here.pc, "lanes of mask 0x%08x wait at %s:%d for lane %u, which waits at %s:%d",
       f->waits_for, here.file, here.line, other->lane, there.file, there.line);
}

// No thread can run and some have not ended: says who waits for whom.
[[noreturn]] __attribute__((noinline)) void fail_stuck(Worker* w) {
  Fiber* f = nullptr;
  const Fiber* ended = nullptr;
  for (int i = 0; i < w->threads; ++i) {
    Fiber* each = &w->fibers[i];
    if (each->state == State::IN_COLLECTIVE) {
      fail_meeting(w, each, each->waits_for & ~find_meeting(w, each->warp, each->waits_for)->arrived);
    }
    if (each->state == State::DONE) {
      ended = each;
    } else if (!f) {
      f = each;
    }
  }
  ca_self = f;
  const BarrierState& b = w->barriers[f->waits_for];
  if (ended && b.expected == static_cast<uint32_t>(w->threads)) {
    blame(w, ended, nullptr);
    fail(w, CA_DIVERGENT_BARRIER, b.site.pc,
         "%u of %u threads wait at the barrier of %s:%d, %d have ended without reaching it", b.arrived, b.expected,
         b.site.file, b.site.line, w->done);
  }
  fail(w, CA_DEADLOCK, b.site.pc, "no thread can go on: barrier %u at %s:%d waits for %u threads, %u have come",
       f->waits_for, b.site.file, b.site.line, b.expected, b.arrived);
}

void reset(Worker* w) {
  memset(w->open_meetings, 0, sizeof(w->open_meetings));
  memset(w->barriers, 0, sizeof(w->barriers));
  for (int i = 0; i < MAX_THREADS; ++i) w->free_stacks[i] = MAX_THREADS - 1 - i;
  w->num_free_stacks = MAX_THREADS;
  for (AsyncQueue& q : w->async) q = AsyncQueue();
  w->suspended = nullptr;
  w->dirty = false;
}

void set_shape(Worker* w, const uint32_t* block) {
  w->block.size = dim3{block[0], block[1], block[2]};
  w->threads = block[0] * block[1] * block[2];
  w->warps = (w->threads + WARP - 1) / WARP;
  for (int i = 0; i < w->warps; ++i) {
    const int lanes = w->threads - i * WARP;
    w->existing[i] = lanes >= WARP ? ~0u : (1u << lanes) - 1;
  }
  for (int i = 0; i < w->threads; ++i) {
    Fiber* f = &w->fibers[i];
    const uint32_t n = i;
    f->index = {n % block[0], n / block[0] % block[1], n / block[0] / block[1]};
  }
}

Outcome outcome(Worker* w) {
  ca_self = nullptr;
  if (w->suspended) return Outcome::SUSPENDED;
  if (w->dirty) return Outcome::ABANDONED;
  if (w->checker) check_block_end(w);
  return Outcome::DONE;
}

}  // namespace

uint64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<uint64_t>(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

void* map_memory(size_t bytes) {
  void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return found == MAP_FAILED ? nullptr : found;
}

Worker* new_worker() {
  Worker* w = new Worker();
  w->stacks = static_cast<char*>(map_memory(MAX_THREADS * STACK_STRIDE));
  if (!w->stacks) {
    delete w;
    return nullptr;
  }
  for (int i = 0; i < MAX_THREADS; ++i) {
    Fiber* f = &w->fibers[i];
    f->worker = w;
    f->number = i;
    f->lane = i % WARP;
    f->warp = i / WARP;
    f->block = &w->block;
  }
  w->dirty = true;
  return w;
}

void prepare(Worker* w, Job* job) {
  const CaLaunch& l = job->launch;
  if (w->dirty) reset(w);
  w->job = job;
  w->entry = l.entry;
  w->schedule = l.schedule;
  w->checker = job->checker;
  w->error = CaError();
  w->error.argument = w->error.shared_offset = -1;
  const dim3& size = w->block.size;
  if (!w->threads || size.x != l.block[0] || size.y != l.block[1] || size.z != l.block[2]) set_shape(w, l.block);
  w->block.grid = dim3{l.grid[0], l.grid[1], l.grid[2]};
  if (w->shared_capacity < l.shared_bytes) {
    if (w->block.shared) munmap(w->block.shared, w->shared_capacity);
    w->shared_capacity = (l.shared_bytes + PAGE - 1) / PAGE * PAGE;
    w->block.shared = static_cast<char*>(map_memory(w->shared_capacity));
  }
  w->switches = 0;
}

Outcome run_block(Worker* w, uint64_t number) {
  const CaLaunch& l = w->job->launch;
  const uint64_t rest = number / l.grid[0];
  w->block.index = {static_cast<unsigned>(number % l.grid[0]), static_cast<unsigned>(rest % l.grid[1]),
                    static_cast<unsigned>(rest / l.grid[1])};
  w->block_number = number;
  w->random = ((l.seed + 1) * 0x9e3779b97f4a7c15u ^ (number + 1) * 0xbf58476d1ce4e5b9u) | 1;
  w->done = 0;
  w->idle_yields = 0;
  for (int i = 0; i < w->threads; ++i) w->fibers[i].state = State::NEW;
  if (l.late_async) {
    for (int i = 0; i < w->threads; ++i) w->async[i] = AsyncQueue();
  }
  memcpy(w->runnable, w->existing, w->warps * sizeof(uint32_t));
  w->runnable_warps = w->warps == MAX_WARPS ? ~0u : (1u << w->warps) - 1;
  if (w->checker) check_block_start(w);
  run(w, pick(w, w->schedule == 1 ? w->warps - 1 : 0), &w->main_sp);
  return outcome(w);
}

Outcome resume_block(Worker* w) {
  Fiber* to = w->suspended;
  w->suspended = nullptr;
  run(w, to, &w->main_sp);
  return outcome(w);
}

void wait_as(Fiber* f, State why, uint32_t what) {
  f->state = why;
  f->waits_for = what;
  Worker* w = f->worker;
  Fiber* to = pick(w, f->warp);
  if (__builtin_expect(!to, 0)) fail_stuck(w);
  go_on_with(w, f, to);
}

void make_runnable(Worker* w, int warp, uint32_t lanes) {
  w->runnable[warp] |= lanes;
  if (lanes) w->runnable_warps |= 1u << warp;
}

// ---- errors ----------------------------------------------------------------------------------------------

namespace {

void copy_index(uint32_t* to, const uint3& from) {
  to[0] = from.x;
  to[1] = from.y;
  to[2] = from.z;
}

}  // namespace

void blame(Worker* w, const Fiber* other, const void* pc) {
  w->error.other_pc = reinterpret_cast<uint64_t>(pc);
  copy_index(w->error.other_thread, other->index);
  copy_index(w->error.other_block, w->block.index);
}

void fail(Worker* w, int kind, const void* pc, const char* format, ...) {
  Job* job = w->job;
  if (!job->failed.exchange(true)) {
    CaError& e = w->error;
    e.kind = kind;
    e.pc = reinterpret_cast<uint64_t>(pc);
    copy_index(e.block, w->block.index);
    copy_index(e.thread, ca_self->index);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(e.message, sizeof(e.message), format, arguments);
    va_end(arguments);
    job->error = e;
  }
  job->stop = true;
  w->dirty = true;
  leave_block(w);
}

}  // namespace ca

using namespace ca;

CA_API void ca::ca_yield(void) {
  Fiber* f = self();
  Worker* w = f->worker;
  if (++w->idle_yields > MAX_IDLE_YIELDS) {
    fail(w, CA_DEADLOCK, __builtin_return_address(0), "threads spin without end, waiting for what nobody does");
  }
  if (!w->runnable_warps) {
    if ((++w->switches & POLL_MASK) == POLL_MASK && must_pause(w)) {
      w->suspended = f;
      ca_switch(&f->sp, w->main_sp);
    }
    return;
  }
  make_runnable(w, f->warp, 1u << f->lane);
  go_on_with(w, f, pick(w, f->warp, true));
}
