// SPDX-License-Identifier: Apache-2.0
// ordering.cpp - which accesses of a block come before which: vector clocks, counted anew in each epoch.
#include <algorithm>

#include "checker.h"

namespace ca {
namespace {

std::vector<uint32_t>& current(Checker* c, Clocks& k) {
  if (k.epoch != c->epoch) {
    k.epoch = c->epoch;
    k.seen.assign(c->threads, 0);
  }
  return k.seen;
}

void join(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], from[i]);
}

}  // namespace

// Publishes to `place` all that `thread` has done and knows.
void release_to(Checker* c, Clocks& place, int thread) {
  std::vector<uint32_t>& seen = current(c, place);
  join(seen, current(c, c->known[thread]));
  seen[thread] = c->clock[thread]++;
  c->crossed_epoch = c->epoch;
}

void acquire_from(Checker* c, Clocks& place, int thread) { join(current(c, c->known[thread]), current(c, place)); }

bool ordered_before(Checker* c, const Mark& m, int thread) {
  return m.epoch < c->epoch || static_cast<int>(m.thread) == thread ||
         current(c, c->known[thread])[m.thread] >= m.clock;
}

Mark mark_now(Checker* c, int thread, const void* pc) {
  Mark m;
  m.epoch = c->epoch;
  m.thread = thread;
  m.clock = c->clock[thread];
  m.pc = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(pc) - c->library.low);
  return m;
}

void check_arrive(Worker* w, const Fiber& fiber, int id) {
  Checker* c = w->checker;
  const BarrierState& b = w->barriers[id];
  if (id == 0 && b.expected == static_cast<uint32_t>(c->threads)) {
    if (b.arrived + 1 == b.expected) ++c->epoch;
  } else {
    if (b.arrived == 0) c->barriers[id].epoch = 0;
    release_to(c, c->barriers[id], fiber.number);
  }
  if (c->launch->counters) ++c->launch->counters->barriers;
}

void check_release(Worker* w, const Fiber& fiber, int id) {
  Checker* c = w->checker;
  if (id == 0 && w->barriers[id].expected == static_cast<uint32_t>(c->threads)) return;
  acquire_from(c, c->barriers[id], fiber.number);
}

void check_meeting(Worker* w, uint32_t warp, uint32_t mask) {
  Checker* c = w->checker;
  // As long as nothing has passed between warps in this epoch, a warp knows of itself only.
  const bool crossed = c->crossed_epoch == c->epoch;
  const int first = crossed ? 0 : warp * WARP;
  const int end = crossed ? c->threads : std::min<int>(first + WARP, c->threads);
  uint32_t all[MAX_THREADS] = {};
  for (uint32_t left = mask; left; left &= left - 1) {
    const int thread = warp * WARP + __builtin_ctz(left);
    const std::vector<uint32_t>& seen = current(c, c->known[thread]);
    for (int i = first; i < end; ++i) all[i] = std::max(all[i], seen[i]);
    all[thread] = std::max(all[thread], c->clock[thread]++);
  }
  for (uint32_t left = mask; left; left &= left - 1) {
    std::vector<uint32_t>& seen = c->known[warp * WARP + __builtin_ctz(left)].seen;
    std::copy(all + first, all + end, seen.begin() + first);
  }
  if (c->launch->counters) ++c->launch->counters->collectives;
}

}  // namespace ca
