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

namespace ca {
__thread Thread* ca_self = nullptr;
}

// ca_switch(save, load): keeps the callee-saved registers on the stack and the stack pointer in *save, then goes on
// where `load` was left. It ends in a return: fibers mostly wait at equal call depth, so the predictor stays right.
extern "C" void ca_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.p2align 4
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
constexpr int SAVED_WORDS = 7, RETURN_WORD = 6;
#elif defined(__aarch64__)
asm(R"(
.text
.p2align 4
.globl ca_switch
.hidden ca_switch
.type ca_switch,%function
ca_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
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
constexpr int SAVED_WORDS = 20, RETURN_WORD = 11;
#else
#error "the executor runs on x86-64 and aarch64"
#endif

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
int pick_warp(Worker* w, int warp, bool other_warp) {
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
Fiber* pick(Worker* w, int warp, bool other_warp = false) {
  if (!w->runnable_warps) return nullptr;
  warp = pick_warp(w, warp, other_warp);
  uint32_t& lanes = w->runnable[warp];
  int lane;
  if (w->schedule == 0) {
    lane = __builtin_ctz(lanes);
  } else if (w->schedule == 1) {
    lane = 31 - __builtin_clz(lanes);
  } else {
    lane = nth_bit(lanes, random_below(w, __builtin_popcount(lanes)));
  }
  lanes &= ~(1u << lane);
  if (!lanes) w->runnable_warps &= ~(1u << warp);
  return &w->fibers[warp * WARP + lane];
}

void fiber_main();

// A stack no fiber uses, starting at its own multiple of 64 bytes: equal ones would compete for the same cache sets.
void* take_stack(Worker* w, Fiber* f) {
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
void run(Worker* w, Fiber* to, void** from) {
  ++w->switches;
  ca_self = to;
  if (to->state == State::NEW) {
    to->state = State::READY;
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
bool must_pause(Worker* w) {
  if (w->job->stop.load(std::memory_order_relaxed)) {
    w->dirty = true;
    leave_block(w);
  }
  return w->deadline_ns && now_ns() > w->deadline_ns;
}

[[noreturn]] void fail_stuck(Worker* w);

void go_on_with(Worker* w, Fiber* f, Fiber* to) {
  if (__builtin_expect((w->switches & POLL_MASK) == POLL_MASK, 0) && must_pause(w)) {
    ++w->switches;
    w->suspended = to;
    ca_switch(&f->sp, w->main_sp);
    return;
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
      to->state = State::READY;
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

// Lanes wait in a collective for `absent` ones of their warp that will not come.
[[noreturn]] void fail_meeting(Worker* w, Fiber* f, uint32_t absent) {
  const Fiber* other = &w->fibers[f->warp * WARP + __builtin_ctz(absent)];
  const bool ended = other->state == State::DONE;
  blame(w, other, ended ? nullptr : other->site.pc);
  ca_self = f;
  if (ended) {
    fail(w, CA_COLLECTIVE_MISMATCH, f->site.pc, "lanes of mask 0x%08x wait at %s:%d for lane %u, which has ended",
         f->mask, f->site.file, f->site.line, other->lane);
  }
  fail(w, CA_COLLECTIVE_MISMATCH, f->site.pc, "lanes of mask 0x%08x wait at %s:%d for lane %u, which waits at %s:%d",
       f->mask, f->site.file, f->site.line, other->lane, other->site.file, other->site.line);
}

// No thread can run and some have not ended: says who waits for whom.
[[noreturn]] void fail_stuck(Worker* w) {
  Fiber* f = nullptr;
  const Fiber* ended = nullptr;
  for (int i = 0; i < w->threads; ++i) {
    Fiber* each = &w->fibers[i];
    if (each->state == State::IN_COLLECTIVE) {
      const Meeting& m = w->meetings[each->warp][__builtin_ctz(each->mask)];
      fail_meeting(w, each, each->mask & ~m.arrived);
    }
    if (each->state == State::DONE) {
      ended = each;
    } else if (!f) {
      f = each;
    }
  }
  ca_self = f;
  const BarrierState& b = w->barriers[f->barrier];
  if (ended && b.expected == static_cast<uint32_t>(w->threads)) {
    blame(w, ended, nullptr);
    fail(w, CA_DIVERGENT_BARRIER, f->site.pc,
         "%u of %u threads wait at the barrier of %s:%d, %d have ended without reaching it", b.arrived, b.expected,
         f->site.file, f->site.line, w->done);
  }
  fail(w, CA_DEADLOCK, f->site.pc, "no thread can go on: barrier %d at %s:%d waits for %u threads, %u have come",
       f->barrier, f->site.file, f->site.line, b.expected, b.arrived);
}

void reset(Worker* w) {
  memset(w->meetings, 0, sizeof(w->meetings));
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

void wait_as(Fiber* f, State why, const Site& site) {
  f->state = why;
  f->site = site;
  Worker* w = f->worker;
  Fiber* to = pick(w, f->warp);
  if (__builtin_expect(!to, 0)) fail_stuck(w);
  go_on_with(w, f, to);
}

void make_runnable(Worker* w, int warp, uint32_t lanes) {
  w->runnable[warp] |= lanes;
  if (lanes) w->runnable_warps |= 1u << warp;
  for (; lanes; lanes &= lanes - 1) w->fibers[warp * WARP + __builtin_ctz(lanes)].state = State::READY;
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
