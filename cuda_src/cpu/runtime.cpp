// SPDX-License-Identifier: Apache-2.0
// runtime.cpp - the executor: fibers, their scheduler, barriers, collectives, and a pool of OS threads for the grid.
#include <pthread.h>
#include <stdio.h>
#include <sys/mman.h>
#include <time.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "api.h"
#include "cuda_cpu.h"

namespace ca { extern "C" thread_local Thread* ca_self = nullptr; }

// switch_stack(save, load): pushes the callee-saved registers, stores sp to *save, takes sp from load.
extern "C" void ca_switch(void** save, void* load);
#if defined(__x86_64__)
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
#endif

namespace {
using namespace ca;
constexpr int MAX_THREADS = 1024;
constexpr size_t STACK = 256 * 1024;

enum State : uint8_t { NEW, READY, BARRIER, MEETING, DONE };

struct Fiber : Thread {
  void* sp;
  char* stack;
  State state;
};

struct Meeting { uint32_t mask, arrived; ca::Meet meet; void* operands[32]; };

struct Worker {
  Fiber fibers[MAX_THREADS];
  uint32_t runnable[32];
  Meeting meetings[32][4];
  uint32_t arrived[16], expected[16];
  uint32_t barrier_wait[16][32];
  std::vector<char*> stacks;
  std::vector<char> shared;
  Block block;
  void* main_sp;
  int threads, live, warps;
  const CaLaunch* launch;
  CaError* error;
  bool failed;
};
thread_local Worker* worker;

char* new_stack() {
  char* base = static_cast<char*>(mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  mprotect(base, 4096, PROT_NONE);
  return base;
}

Fiber* next_fiber(Worker* w, int warp) {
  for (int i = 0; i < w->warps; ++i) {
    int k = warp + i; if (k >= w->warps) k -= w->warps;
    if (w->runnable[k]) return &w->fibers[k * 32 + __builtin_ctz(w->runnable[k])];
  }
  return nullptr;
}

void fiber_main();

// Leaves the running fiber for `to`; `from_sp` is where its stack pointer is kept.
void resume(Worker* w, Fiber* to, void** from_sp) {
  ca_self = to;
  if (to->state == NEW) {
    if (w->stacks.empty()) w->stacks.push_back(new_stack());
    to->stack = w->stacks.back();
    w->stacks.pop_back();
    to->state = READY;
    void** top = reinterpret_cast<void**>(to->stack + STACK - 64 - (to - w->fibers) % 32 * 64);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(fiber_main);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    ca_switch(from_sp, top);
  } else {
    ca_switch(from_sp, to->sp);
  }
}

void give_up(Worker* w, int kind, const char* message) {
  w->failed = true;
  w->error->kind = kind;
  snprintf(w->error->message, sizeof w->error->message, "%s", message);
  void* dead;
  ca_self = nullptr;
  ca_switch(&dead, w->main_sp);
}

// The running fiber cannot go on; run another.
void block_fiber(Worker* w, Fiber* f, State why) {
  f->state = why;
  w->runnable[f->warp] &= ~(1u << f->lane);
  Fiber* to = next_fiber(w, f->warp);
  if (!to) give_up(w, CA_DEADLOCK, "no thread of the block can go on");
  resume(w, to, &f->sp);
}

void release(Worker* w, int id) {
  for (int k = 0; k < w->warps; ++k) {
    uint32_t lanes = w->barrier_wait[id][k];
    w->runnable[k] |= lanes;
    for (; lanes; lanes &= lanes - 1) w->fibers[k * 32 + __builtin_ctz(lanes)].state = READY;
    w->barrier_wait[id][k] = 0;
  }
  w->arrived[id] = 0;
}

void fiber_main() {
  Worker* w = worker;
  for (;;) {
    Fiber* f = static_cast<Fiber*>(ca_self);
    w->launch->entry(w->launch->args);
    f->state = DONE;
    w->runnable[f->warp] &= ~(1u << f->lane);
    --w->live;
    if (w->arrived[0] && w->arrived[0] == static_cast<uint32_t>(w->live)) release(w, 0);
    Fiber* to = next_fiber(w, f->warp);
    char* stack = f->stack;
    if (to && to->state == NEW) {
      to->state = READY;
      to->stack = stack;
      ca_self = to;
      continue;
    }
    w->stacks.push_back(stack);
    void* dead;
    if (to) {
      ca_self = to;
      ca_switch(&dead, to->sp);
    } else if (w->live == 0) {
      ca_self = nullptr;
      ca_switch(&dead, w->main_sp);
    } else {
      give_up(w, CA_DEADLOCK, "threads wait for others that have ended");
    }
  }
}

void run_block(Worker* w, uint64_t linear) {
  const CaLaunch* l = w->launch;
  w->block.index = {static_cast<unsigned>(linear % l->grid[0]), static_cast<unsigned>(linear / l->grid[0] % l->grid[1]),
                    static_cast<unsigned>(linear / l->grid[0] / l->grid[1])};
  w->live = w->threads;
  for (int i = 0; i < w->threads; ++i) w->fibers[i].state = NEW;
  for (int k = 0; k < w->warps; ++k) {
    const int n = w->threads - k * 32;
    w->runnable[k] = n >= 32 ? 0xffffffffu : (1u << n) - 1;
  }
  resume(w, next_fiber(w, 0), &w->main_sp);
}

void prepare(Worker* w, const CaLaunch* l, CaError* error) {
  w->launch = l;
  w->error = error;
  w->failed = false;
  w->threads = l->block[0] * l->block[1] * l->block[2];
  w->warps = (w->threads + 31) / 32;
  w->block.size = {l->block[0], l->block[1], l->block[2]};
  w->block.grid = {l->grid[0], l->grid[1], l->grid[2]};
  if (w->shared.size() < l->shared_bytes + 256) w->shared.resize(l->shared_bytes + 256);
  w->block.shared = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(w->shared.data()) + 127) & ~uintptr_t(127));
  memset(w->meetings, 0, sizeof w->meetings);
  memset(w->arrived, 0, sizeof w->arrived);
  memset(w->barrier_wait, 0, sizeof w->barrier_wait);
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
  std::atomic<uint64_t> generation{0};
  std::atomic<int> busy{0};
  std::atomic<uint64_t> next{0};
  std::atomic<bool> stop{false};
  CaLaunch launch;
  CaError error;
  uint64_t total;
  int helpers;
};
Pool* pool = new Pool;
std::mutex launching;

// The child of a fork has no worker threads: it starts over with an empty pool.
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] {
  pool = new Pool;
  new (&launching) std::mutex;
});

void work(bool main) {
  if (!worker) worker = new Worker;
  CaError error{};
  prepare(worker, &pool->launch, &error);
  timespec start, now;
  clock_gettime(CLOCK_MONOTONIC, &start);
  while (!pool->stop.load(std::memory_order_relaxed)) {
    const uint64_t b = pool->next.fetch_add(1, std::memory_order_relaxed);
    if (b >= pool->total) break;
    run_block(worker, b);
    if (worker->failed) {
      std::lock_guard<std::mutex> hold(pool->mutex);
      if (!pool->stop) pool->error = error;
      pool->stop = true;
      delete worker;
      worker = nullptr;
      return;
    }
    if (main) {
      clock_gettime(CLOCK_MONOTONIC, &now);
      if ((now.tv_sec - start.tv_sec) * 1000 + (now.tv_nsec - start.tv_nsec) / 1000000 > 100) return;
    }
  }
}

void loop(int id, uint64_t seen) {
  for (;;) {
    for (int spin = 0; spin < 2000 && pool->generation.load(std::memory_order_acquire) == seen; ++spin) __builtin_ia32_pause();
    if (pool->generation.load(std::memory_order_acquire) == seen) {
      std::unique_lock<std::mutex> hold(pool->mutex);
      pool->wake.wait(hold, [&] { return pool->generation.load() != seen; });
    }
    seen = pool->generation.load();
    if (id < pool->helpers) {
      work(false);
      pool->busy.fetch_sub(1, std::memory_order_release);
    }
  }
}

int finish(CaError* error) {
  work(true);
  if (!pool->stop && pool->next.load() < pool->total) return 2;
  while (pool->busy.load(std::memory_order_acquire)) __builtin_ia32_pause();
  const int code = pool->stop ? 1 : 0;
  if (code) *error = pool->error;
  launching.unlock();
  return code;
}
}  // namespace

CA_API int ca_launch(const CaLaunch* l, CaError* error) {
  const uint64_t threads = uint64_t(l->block[0]) * l->block[1] * l->block[2];
  if (threads == 0 || threads > MAX_THREADS) {
    error->kind = CA_BAD_LAUNCH;
    snprintf(error->message, sizeof error->message, "a block has 1 to 1024 threads, got %llu", (unsigned long long)threads);
    return 1;
  }
  launching.lock();
  pool->launch = *l;
  pool->total = uint64_t(l->grid[0]) * l->grid[1] * l->grid[2];
  pool->next = 0;
  pool->stop = false;
  const int helpers = pool->total < 2 ? 0 : int(std::min<uint64_t>(l->workers - 1, pool->total - 1));
  while (int(pool->threads.size()) < helpers) {
    pool->threads.emplace_back(loop, int(pool->threads.size()), pool->generation.load());
    pool->threads.back().detach();
  }
  pool->helpers = helpers;
  if (helpers) {
    pool->busy = helpers;
    {
      std::lock_guard<std::mutex> hold(pool->mutex);
      pool->generation.fetch_add(1, std::memory_order_release);
    }
    pool->wake.notify_all();
  }
  return finish(error);
}

CA_API int ca_resume(CaError* error) { return finish(error); }
CA_API void ca_abandon(void) {
  pool->stop = true;
  while (pool->busy.load(std::memory_order_acquire)) __builtin_ia32_pause();
  launching.unlock();
}
CA_API int ca_api_version(void) { return 1; }

CA_API void ca_collective(uint32_t mask, ca::Meet meet, void* operand) {
  Worker* w = worker;
  Fiber* f = static_cast<Fiber*>(ca_self);
  const int n = w->threads - f->warp * 32;
  if (n < 32) mask &= (1u << n) - 1;
  Meeting* m = nullptr;
  for (Meeting& each : w->meetings[f->warp]) {
    if (each.arrived && each.mask == mask) { m = &each; break; }
    if (!each.arrived && !m) m = &each;
  }
  if (!m->arrived) {
    m->mask = mask;
    memset(m->operands, 0, sizeof m->operands);
  }
  m->arrived |= 1u << f->lane;
  m->operands[f->lane] = operand;
  if (m->arrived != mask) {
    block_fiber(w, f, MEETING);
    return;
  }
  meet(m->operands, mask);
  m->arrived = 0;
  w->runnable[f->warp] |= mask;
}

CA_API void ca_barrier(int id, uint32_t threads, int) {
  Worker* w = worker;
  Fiber* f = static_cast<Fiber*>(ca_self);
  if (++w->arrived[id] == (threads ? threads : uint32_t(w->live))) {
    release(w, id);
    return;
  }
  w->barrier_wait[id][f->warp] |= 1u << f->lane;
  block_fiber(w, f, BARRIER);
}
