// SPDX-License-Identifier: Apache-2.0
// primitives.cpp - barriers, warp collectives and asynchronous copies: where threads of a block meet.
#include <string.h>

#include "executor.h"

namespace ca {
namespace {

bool at_place(const Site& site, const char* file, int line) {
  return site.line == line && (site.file == file || strcmp(site.file, file) == 0);
}

void release(Worker* w, int id) {
  BarrierState& b = w->barriers[id];
  for (int k = 0; k < w->warps; ++k) {
    if (w->checker) {
      for (uint32_t left = b.waiting[k]; left; left &= left - 1) {
        check_release(w, w->fibers[k * WARP + __builtin_ctz(left)], id);
      }
    }
    make_runnable(w, k, b.waiting[k]);
    b.waiting[k] = 0;
  }
  b.arrived = 0;
  w->idle_yields = 0;
}

[[noreturn]] void fail_divergence(Worker* w, const BarrierState& b, const char* file, int line, const void* pc) {
  blame(w, &w->fibers[b.first], b.site.pc);
  fail(w, CA_DIVERGENT_BARRIER, pc, "this thread is at the barrier of %s:%d while others wait at that of %s:%d", file,
       line, b.site.file, b.site.line);
}

[[noreturn]] void fail_mismatch(Worker* w, const Meeting& m, Meet meet, const char* file, int line, const void* pc) {
  blame(w, &w->fibers[ca_self->warp * WARP + __builtin_ctz(m.arrived)], m.site.pc);
  fail(w, CA_COLLECTIVE_MISMATCH, pc, "lanes of mask 0x%08x meet %s, at %s:%d and at %s:%d", m.mask,
       m.meet != meet ? "with different instructions" : "from different places", file, line, m.site.file, m.site.line);
}

void run_meeting(Worker* w, int warp, uint32_t mask, Meet meet) {
  void** operands = w->operands[warp];
  if (mask == ~0u) {
    meet(operands, mask);
    return;
  }
  void* present[WARP] = {};
  for (uint32_t left = mask; left; left &= left - 1) present[__builtin_ctz(left)] = operands[__builtin_ctz(left)];
  meet(present, mask);
}

void land(Worker* w, const AsyncCopy& copy) {
  memcpy(copy.to, copy.from, copy.valid_bytes);
  memset(copy.to + copy.valid_bytes, 0, copy.bytes - copy.valid_bytes);
  if (w->checker) check_async_land(w, copy);
}

}  // namespace
}  // namespace ca

using namespace ca;

CA_API void ca::ca_barrier(int id, uint32_t threads, int arrive_only, const char* file, int line) {
  Fiber* f = self();
  Worker* w = f->worker;
  const void* pc = __builtin_return_address(0);
  const uint32_t expected = threads ? threads : w->threads;
  if (__builtin_expect(static_cast<unsigned>(id) >= BARRIERS || expected > static_cast<uint32_t>(w->threads), 0)) {
    fail(w, CA_DEADLOCK, pc, "barrier %d of %u threads in a block of %d; ids are 0 to 15", id, expected, w->threads);
  }
  BarrierState& b = w->barriers[id];
  if (b.arrived == 0) {
    b.expected = expected;
    b.site = {file, line, pc};
    b.first = f->number;
  } else if (b.expected != expected || (w->checker && id == 0 && !at_place(b.site, file, line))) {
    fail_divergence(w, b, file, line, pc);
  }
  if (w->checker) check_arrive(w, *f, id);
  if (++b.arrived == expected) {
    release(w, id);
    if (w->checker && !arrive_only) check_release(w, *f, id);
  } else if (!arrive_only) {
    b.waiting[f->warp] |= 1u << f->lane;
    wait_as(f, State::AT_BARRIER, id);
  }
}

CA_API void ca::ca_collective(uint32_t mask, Meet meet, void* operand, const char* file, int line) {
  Fiber* f = self();
  Worker* w = f->worker;
  const uint32_t warp = f->warp, lane = f->lane, bit = 1u << lane;
  mask &= w->existing[warp];
  if (__builtin_expect(!(mask & bit), 0)) {
    fail(w, CA_COLLECTIVE_MISMATCH, __builtin_return_address(0), "lane %u at %s:%d is not in its own mask 0x%08x", lane,
         file, line, mask);
  }
  Meeting* m = find_meeting(w, warp, mask);
  if (!m) {
    const int slot = __builtin_ctz(~w->open_meetings[warp]);
    w->open_meetings[warp] |= 1u << slot;
    m = &w->meetings[warp][slot];
    *m = {mask, 0, meet, {file, line, __builtin_return_address(0)}};
  } else if (m->meet != meet || (w->checker && !at_place(m->site, file, line))) {
    fail_mismatch(w, *m, meet, file, line, __builtin_return_address(0));
  }
  w->operands[warp][lane] = operand;
  m->arrived |= bit;
  if (m->arrived != mask) return wait_as(f, State::IN_COLLECTIVE, mask);
  w->open_meetings[warp] &= ~(1u << (m - w->meetings[warp]));
  w->idle_yields = 0;
  if (__builtin_expect(w->checker != nullptr, 0)) {
    check_meeting(w, warp, mask);
    check_meet_body(w, true);
    run_meeting(w, warp, mask, meet);
    check_meet_body(w, false);
  } else {
    run_meeting(w, warp, mask, meet);
  }
  make_runnable(w, warp, mask & ~bit);
}

CA_API void ca::ca_cp_async(void* to, const void* from, uint32_t bytes, int valid) {
  Fiber* f = self();
  Worker* w = f->worker;
  AsyncQueue& q = w->async[f->number];
  const AsyncCopy copy{static_cast<char*>(to), static_cast<const char*>(from), bytes, valid ? bytes : 0, q.group};
  if (w->checker) check_async_issue(w, copy, __builtin_return_address(0));
  if (w->job->launch.late_async) {
    memset(to, 0xff, bytes);  // NaN until the wait
    q.copies.push_back(copy);
  } else {
    land(w, copy);
  }
}

CA_API void ca::ca_cp_async_commit(void) { ++self()->worker->async[self()->number].group; }

CA_API void ca::ca_cp_async_wait(uint32_t pending) {
  Worker* w = self()->worker;
  AsyncQueue& q = w->async[self()->number];
  size_t landed = 0;
  while (landed < q.copies.size() && q.copies[landed].group + pending < q.group) land(w, q.copies[landed++]);
  q.copies.erase(q.copies.begin(), q.copies.begin() + landed);
}

CA_API void ca::ca_count(int event, uint64_t amount) {
  Worker* w = self()->worker;
  if (w->checker) check_count(w, event, amount);
}

CA_API void ca::ca_fence(void) {
  Worker* w = self()->worker;
  if (w->checker) check_fence(w);
}

CA_API void ca::ca_copy_unseen(void* to, const void* from, uint32_t bytes) { memcpy(to, from, bytes); }
