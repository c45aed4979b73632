// SPDX-License-Identifier: Apache-2.0
// ordering.cpp - which accesses come before which. Within a block: vector clocks, counted anew in each epoch; between
// blocks: fences and atomics.
#include <algorithm>
#include <iterator>

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
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

void unite(Releases& into, const Releases& from) {
  if (from.empty() || into == from) return;
  Releases all;
  std::set_union(into.begin(), into.end(), from.begin(), from.end(), std::back_inserter(all));
  into = std::move(all);
}

void add(Fence& to, const Fence& from) {
  join(to.clocks, from.clocks);
  unite(to.releases, from.releases);
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
    if (b.arrived + 1 == b.expected) begin_epoch(c);
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
  if (mask == w->existing[warp]) ++c->meetings[warp];
  if (c->launch->counters) ++c->launch->counters->collectives;
}

// ---- between blocks --------------------------------------------------------------------------------------

// All threads of the block have met: each knows what any of them knew.
void begin_epoch(Checker* c) {
  ++c->epoch;
  for (uint64_t& n : c->meetings) ++n;
  for (int i = 0; i < c->threads; ++i) c->epoch_clock[i] = c->clock[i]++;
  for (const Fence& f : c->fences) add(c->settled, f);
  for (const Acquire& a : c->acquires) unite(c->acquired, a.releases);
  c->fences.clear();
  c->acquires.clear();
}

void check_fence(Worker* w) {
  Checker* c = w->checker;
  const int thread = self()->number;
  Fence f{mark_now(c, thread, nullptr), c->epoch_clock, c->acquired};
  join(f.clocks, current(c, c->known[thread]));
  f.clocks[thread] = c->clock[thread]++;
  for (const Acquire& a : c->acquires) {
    if (ordered_before(c, a.at, thread)) unite(f.releases, a.releases);
  }
  c->fences.push_back(std::move(f));
}

void pass_global_atomic(Checker* c, uintptr_t address, int thread) {
  const auto found = c->places.find(address);
  if (found != c->places.end()) c->acquires.push_back({mark_now(c, thread, nullptr), found->second});
  Fence before = c->settled;
  for (const Fence& f : c->fences) {
    if (ordered_before(c, f.at, thread)) add(before, f);
  }
  if (before.clocks.empty()) return;  // nothing was fenced
  const uint32_t block = static_cast<uint32_t>(c->blocks.size()) - 1;
  if (c->releases.empty() || c->releases.back().block != block || c->releases.back().clocks != before.clocks) {
    c->releases.push_back({block, before.clocks});
  }
  Releases& place = c->places[address];
  unite(place, before.releases);
  unite(place, {static_cast<uint32_t>(c->releases.size()) - 1});
}

bool visible_from_block(Checker* c, uint32_t block, const Mark& m, int thread) {
  const auto covers = [&](uint32_t r) {
    return c->releases[r].block == block && c->releases[r].clocks[m.thread] >= m.clock;
  };
  if (c->last_release && covers(c->last_release - 1)) return true;
  for (uint32_t r : c->settled.releases) {
    if (!covers(r)) continue;
    c->last_release = r + 1;
    return true;
  }
  for (const Fence& f : c->fences) {
    if (ordered_before(c, f.at, thread) && std::any_of(f.releases.begin(), f.releases.end(), covers)) return true;
  }
  return false;
}

}  // namespace ca
