// SPDX-License-Identifier: Apache-2.0
// pool.cpp - the C API: a launch spread over a persistent pool of OS threads, in time slices.
//
// The caller is worker 0 and never waits for helpers to wake up: blocks are handed out one by one, so a launch that
// is over before a helper has looked costs no more than the wake-up call.
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "executor.h"

namespace ca {
namespace {

constexpr int MAX_WORKERS = 256;
constexpr uint64_t SLICE_NS = 100'000'000;
constexpr uint64_t SPIN_NS = 50'000;  // a helper looks this long for the next launch before it sleeps

struct Pool {
  pthread_mutex_t launching = PTHREAD_MUTEX_INITIALIZER;
  std::atomic<pthread_t> owner{};        // of the launch in progress
  std::atomic<uint32_t> generation{0};   // futex: counts launches
  std::atomic<uint32_t> sleepers{0};
  std::atomic<uint32_t> active{0};       // futex: helpers that may be looking at `job`
  std::atomic<Job*> job{nullptr};
  std::atomic<int> helpers_wanted{0};
  int threads = 0;                       // helpers started
  Worker* workers[MAX_WORKERS] = {};
  Job current;
  bool suspended = false;                // worker 0 is inside a block
};
Pool pool;

void futex_wait(std::atomic<uint32_t>* word, uint32_t seen, uint64_t timeout_ns) {
  const timespec timeout{static_cast<time_t>(timeout_ns / 1'000'000'000),
                         static_cast<long>(timeout_ns % 1'000'000'000)};
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, timeout_ns ? &timeout : nullptr, nullptr, 0);
}
void futex_wake(std::atomic<uint32_t>* word, int count) {
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
}

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  asm volatile("yield");
#endif
}

// Spins until `done` holds or `ns` have passed; whether it holds.
template <typename Done>
bool spin_until(const Done& done, uint64_t ns) {
  const uint64_t end = now_ns() + ns;
  do {
    for (int i = 0; i < 32; ++i) {
      if (done()) return true;
      pause_briefly();
    }
  } while (now_ns() < end);
  return done();
}

// Blocks until none are left, the launch fails, or (deadline set) the time slice is over.
Outcome run_blocks(Worker* w, Job* job) {
  for (uint32_t count = 0; !job->stop.load(std::memory_order_relaxed); ++count) {
    if (w->deadline_ns && (count & 7) == 7 && now_ns() > w->deadline_ns) return Outcome::SUSPENDED;
    const uint64_t i = job->next.fetch_add(1, std::memory_order_relaxed);
    if (i >= job->blocks) return Outcome::DONE;
    const Outcome outcome =
        run_block(w, static_cast<uint64_t>((static_cast<unsigned __int128>(i) * job->factor +
                                            job->offset) % job->blocks));
    if (outcome != Outcome::DONE) return outcome;
  }
  return Outcome::ABANDONED;
}

void* helper(void* argument) {
  const int number = static_cast<int>(reinterpret_cast<intptr_t>(argument));
  Worker* w = pool.workers[number];
  uint32_t seen = 0;
  bool first = true;
  for (;;) {
    const auto changed = [&] { return pool.generation.load(std::memory_order_acquire) != seen; };
    while (!first && !spin_until(changed, SPIN_NS)) {
      pool.sleepers.fetch_add(1);
      futex_wait(&pool.generation, seen, 0);
      pool.sleepers.fetch_sub(1);
    }
    first = false;
    seen = pool.generation.load();
    pool.active.fetch_add(1);
    Job* job = pool.job.load();
    if (job && number <= pool.helpers_wanted.load()) {
      prepare(w, job);
      run_blocks(w, job);
    }
    if (pool.active.fetch_sub(1) == 1 && !pool.job.load()) futex_wake(&pool.active, 1);
  }
  return nullptr;
}

// Starts helpers up to `wanted`; fewer if the system gives no more threads.
void start_helpers(int wanted) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // signals belong to Python's threads
  while (pool.threads < wanted) {
    const int number = pool.threads + 1;
    if (!pool.workers[number] && !(pool.workers[number] = new_worker())) break;
    pthread_t thread;
    if (pthread_create(&thread, nullptr, helper, reinterpret_cast<void*>(static_cast<intptr_t>(number)))) break;
    pthread_detach(thread);
    ++pool.threads;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

int refuse(CaError* error, const char* rule, uint64_t found) {
  *error = CaError();
  error->kind = CA_BAD_LAUNCH;
  error->argument = error->shared_offset = -1;
  snprintf(error->message, sizeof(error->message), "%s, got %llu", rule, static_cast<unsigned long long>(found));
  return 1;
}

uint64_t gcd(uint64_t a, uint64_t b) { return b ? gcd(b, a % b) : a; }

// The order of the blocks follows the schedule: forward, backward, or some order that visits each once.
void set_order(Job* job) {
  job->factor = 1;
  job->offset = 0;
  if (job->launch.schedule == 1) {
    job->factor = job->offset = job->blocks - 1;
    if (job->blocks == 1) job->factor = 1;
  } else if (job->launch.schedule == 2) {
    uint64_t factor = (job->launch.seed * 0x9e3779b97f4a7c15u + 0x7f4a7c15u) % job->blocks | 1;
    while (gcd(factor, job->blocks) != 1) factor += 2;
    job->factor = factor;
    job->offset = job->launch.seed % job->blocks;
  }
}

void set_up(Job* job, const CaLaunch& launch, uint64_t blocks) {
  job->launch = launch;
  job->blocks = blocks;
  job->storage.resize(launch.args_bytes + 128);
  uintptr_t aligned = (reinterpret_cast<uintptr_t>(job->storage.data()) + 63) & ~uintptr_t(63);
  memcpy(reinterpret_cast<void*>(aligned), launch.args, launch.args_bytes);
  job->args = reinterpret_cast<void*>(aligned);
  set_order(job);
  job->next = 0;
  job->stop = false;
  job->failed = false;
}

void end_launch() {
  if (pool.current.checker) delete_checker(pool.current.checker);
  pool.current.checker = nullptr;
  pool.owner = pthread_t();
  pthread_mutex_unlock(&pool.launching);
}

// Whether all helpers are out of the launch before the deadline. No helper can enter it once `job` is null.
bool join_helpers(uint64_t deadline_ns) {
  pool.job.store(nullptr);
  const auto gone = [] { return pool.active.load() == 0; };
  if (spin_until(gone, SPIN_NS)) return true;
  for (;;) {
    const uint32_t active = pool.active.load();
    if (active == 0) return true;
    const uint64_t now = now_ns();
    if (now >= deadline_ns) return false;
    futex_wait(&pool.active, active, deadline_ns - now);
  }
}

// One time slice of the caller's share.
int drive(CaError* error) {
  Worker* w = pool.workers[0];
  Job* job = &pool.current;
  w->deadline_ns = now_ns() + SLICE_NS;
  Outcome outcome = Outcome::DONE;
  if (pool.suspended) outcome = resume_block(w);
  if (outcome == Outcome::DONE) outcome = run_blocks(w, job);
  pool.suspended = outcome == Outcome::SUSPENDED && w->suspended;
  if (outcome == Outcome::SUSPENDED || !join_helpers(w->deadline_ns)) return 2;
  const bool failed = job->failed.load();
  if (failed) *error = job->error;
  end_launch();
  return failed ? 1 : 0;
}

// The child of a fork has one thread: it starts over with an empty pool. What the helpers owned is lost.
void after_fork() {
  Worker* first = pool.workers[0];
  memset(static_cast<void*>(pool.workers), 0, sizeof(pool.workers));
  pool.workers[0] = first;
  if (first) first->dirty = true;
  pthread_mutex_init(&pool.launching, nullptr);
  pool.owner = pthread_t();
  pool.sleepers = pool.active = 0;
  pool.job = nullptr;
  pool.threads = 0;
  pool.suspended = false;
}

__attribute__((constructor)) void register_fork_handler() { pthread_atfork(nullptr, nullptr, after_fork); }

}  // namespace
}  // namespace ca

using namespace ca;

CA_API int ca_launch(const CaLaunch* launch, CaError* error) {
  const uint64_t threads = static_cast<uint64_t>(launch->block[0]) * launch->block[1] * launch->block[2];
  const unsigned __int128 grid = static_cast<unsigned __int128>(launch->grid[0]) * launch->grid[1] * launch->grid[2];
  const uint64_t blocks = static_cast<uint64_t>(grid);
  if (threads == 0 || threads > MAX_THREADS) return refuse(error, "a block must have 1 to 1024 threads", threads);
  if (grid == 0 || grid >> 62) return refuse(error, "a grid must have 1 to 2^62 blocks", blocks);
  if (launch->shared_bytes > MAX_DYNAMIC_SHARED) {
    return refuse(error, "a block must have at most 232448 bytes of dynamic shared memory", launch->shared_bytes);
  }
  if (pool.owner.load() == pthread_self()) {
    return refuse(error, "a launch cannot start inside a launch of the same thread (a signal handler?)", 2);
  }
  pthread_mutex_lock(&pool.launching);
  pool.owner = pthread_self();
  if (!pool.workers[0] && !(pool.workers[0] = new_worker())) {
    end_launch();
    return refuse(error, "a worker needs memory for its stacks", 0);
  }
  Job* job = &pool.current;
  set_up(job, *launch, blocks);
  job->checker = launch->check ? new_checker(job) : nullptr;
  if (launch->check && !job->checker) {
    end_launch();
    return refuse(error, "the checking mode needs address space, 36 bytes for each byte that may be written", 0);
  }
  // one worker when checking: the shadow of global memory has no locks
  int workers = launch->check || launch->workers < 1 ? 1 : launch->workers;
  if (workers > MAX_WORKERS) workers = MAX_WORKERS;
  const int helpers = static_cast<uint64_t>(workers) < blocks ? workers - 1 : static_cast<int>(blocks) - 1;
  if (helpers > pool.threads) start_helpers(helpers);
  prepare(pool.workers[0], job);
  if (helpers > 0) {
    pool.helpers_wanted = helpers;
    pool.job = job;
    pool.generation.fetch_add(1);
    if (pool.sleepers.load()) futex_wake(&pool.generation, INT_MAX);
  }
  return drive(error);
}

CA_API int ca_resume(CaError* error) { return drive(error); }

CA_API void ca_abandon(void) {
  if (pool.owner.load() != pthread_self()) return;  // interrupted before it began or after it ended
  pool.current.stop = true;
  pool.workers[0]->dirty = true;
  while (!join_helpers(now_ns() + SLICE_NS)) {
  }
  pool.suspended = false;
  end_launch();
}

CA_API int ca_api_version(void) { return 1; }

CA_API const char* ca_build_info(void) {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}
