// SPDX-License-Identifier: Apache-2.0
// checker.cpp - the checking mode: every memory access of a kernel is judged.
//
// An access must lie in an argument's buffer, in shared memory, on the thread's stack or in the library's own data.
// Two accesses of one byte, one of them a write, must be ordered or both be atomic. Within a block a block barrier
// orders everything (it starts a new epoch); between two of those, collectives, named barriers and atomics hand on
// what each thread knows of the others' clocks. Between blocks only fences with global atomics order.
#include "checker.h"

#include <link.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>

extern "C" void* __tls_get_addr(void* module_and_offset);

namespace ca {
namespace {

constexpr size_t STACK_RESERVE = 16 * 1024;  // left over when a stack overflow is reported

const void* place_of(const Checker* c, const Mark& m) { return reinterpret_cast<const void*>(c->library.low + m.pc); }

// ---- shared memory ---------------------------------------------------------------------------------------

[[noreturn]] void fail_shared_race(Worker* w, size_t offset, const Mark& earlier, bool after_write, bool write,
                                   const void* pc) {
  blame(w, &w->fibers[earlier.thread], place_of(w->checker, earlier));
  w->error.shared_offset = static_cast<int32_t>(offset);
  fail(w, CA_RACE, pc, "%s of byte %zu of shared memory, not ordered with a %s by another thread; a barrier is missing",
       write ? "write" : "read", offset, after_write ? "write" : "read");
}

[[noreturn]] void fail_uninitialised(Worker* w, const SharedByte& s, size_t offset, bool dynamic, const void* pc) {
  const bool pending = s.pending && s.write.epoch >= w->checker->block_epoch;
  if (pending) blame(w, &w->fibers[s.write.thread], place_of(w->checker, s.write));
  w->error.shared_offset = static_cast<int32_t>(offset);
  fail(w, CA_UNINITIALISED_SHARED, pc, "byte %zu of %s shared memory is read before %s", offset,
       dynamic ? "dynamic" : "static", pending ? "its asynchronous copy was waited for" : "it was written");
}

// Two reads are kept: a thread's newest, and one of another warp, or else of another thread.
void remember_read(SharedByte& s, const Mark& now) {
  if (s.read.epoch != now.epoch) {
    s.other_read.epoch = 0;
  } else if (s.read.thread != now.thread) {
    const bool keep = s.other_read.epoch == now.epoch && s.other_read.thread != now.thread &&
                      s.read.thread / WARP == now.thread / WARP;
    if (!keep) s.other_read = s.read;
  }
  s.read = now;
}

void on_shared(Worker* w, std::vector<SharedByte>& shadow, size_t offset, size_t bytes, bool write, bool atomic,
               const void* pc) {
  Checker* c = w->checker;
  const int thread = self()->number;
  const Mark now = mark_now(c, thread, pc);
  for (size_t i = offset; i < offset + bytes; ++i) {
    SharedByte& s = shadow[i];
    const bool written = s.write.epoch >= c->block_epoch;
    if (!write && (!written || s.pending)) fail_uninitialised(w, s, i, &shadow == &c->dynamic_shared, pc);
    if (written && !(atomic && s.atomic) && !ordered_before(c, s.write, thread)) {
      fail_shared_race(w, i, s.write, true, write, pc);
    }
    if (write) {
      for (const Mark& read : {s.read, s.other_read}) {
        if (!ordered_before(c, read, thread)) fail_shared_race(w, i, read, false, true, pc);
      }
      s.write = now;
      s.atomic = atomic;
      s.pending = false;
    } else if (!atomic) {
      remember_read(s, now);
    }
  }
}

// ---- buffers ---------------------------------------------------------------------------------------------

[[noreturn]] void fail_global_race(Worker* w, int buffer, size_t byte, uint64_t block, const Mark& earlier,
                                   bool after_write, bool write, const void* pc) {
  const uint32_t* grid = w->job->launch.grid;
  CaError& e = w->error;
  blame(w, &w->fibers[earlier.thread], place_of(w->checker, earlier));
  e.other_block[0] = block % grid[0];
  e.other_block[1] = block / grid[0] % grid[1];
  e.other_block[2] = static_cast<uint32_t>(block / grid[0] / grid[1]);
  e.argument = w->job->launch.buffers[buffer].argument;
  const uint32_t *b = e.other_block, *t = e.other_thread;
  const bool own = block == w->block_number;
  fail(w, own ? CA_RACE : CA_GLOBAL_RACE, pc,
       "byte %zu is %s after a %s by block (%u, %u, %u), thread (%u, %u, %u), and nothing orders the two%s", byte,
       write ? "written" : "read", after_write ? "write" : "read", b[0], b[1], b[2], t[0], t[1], t[2],
       own ? "" : ": between blocks only __threadfence, atomics on one address and __threadfence do");
}

bool global_ordered(Checker* c, uint32_t block, const Mark& m, int thread) {
  if (!block) return true;
  return block + 1 == c->blocks.size() ? ordered_before(c, m, thread) : visible_from_block(c, block, m, thread);
}

void on_global(Worker* w, int buffer, uintptr_t address, size_t bytes, bool write, bool atomic, const void* pc) {
  Checker* c = w->checker;
  GlobalByte* shadow = c->global[buffer];
  if (!shadow) return;
  const int thread = self()->number;
  const Mark now = mark_now(c, thread, pc);
  const uint32_t block = static_cast<uint32_t>(c->blocks.size()) - 1;
  const size_t first = address - c->launch->buffers[buffer].base;
  for (size_t i = first; i < first + bytes; ++i) {
    GlobalByte& g = shadow[i];
    if (!(atomic && g.atomic) && !global_ordered(c, g.write_block, g.write, thread)) {
      fail_global_race(w, buffer, i, c->blocks[g.write_block], g.write, true, write, pc);
    }
    if (write) {
      if (!global_ordered(c, g.read_block, g.read, thread)) {
        fail_global_race(w, buffer, i, c->blocks[g.read_block], g.read, false, true, pc);
      }
      if (g.atomic && !atomic) c->places.erase(c->launch->buffers[buffer].base + i);  // ends what atomics passed on
      g.write = now;
      g.write_block = block;
      g.atomic = atomic;
    } else if (!atomic) {
      g.read = now;
      g.read_block = block;
    }
  }
}

// The buffer an access lies in; of overlapping ones, one that may be written. -1: none.
int find_buffer(Checker* c, uintptr_t address, size_t bytes) {
  const CaBuffer* buffers = c->launch->buffers;
  const auto inside = [&](const CaBuffer& b) { return address >= b.base && address + bytes <= b.base + b.bytes; };
  if (!c->by_base.empty() && !c->overlaps[c->last_buffer] && inside(buffers[c->last_buffer])) return c->last_buffer;
  const auto after = std::upper_bound(c->by_base.begin(), c->by_base.end(), address,
                                      [&](uintptr_t a, int i) { return a < buffers[i].base; });
  int found = -1;
  for (size_t k = after - c->by_base.begin(); k-- > 0 && c->reach[k] >= address + bytes;) {
    const int i = c->by_base[k];
    if (inside(buffers[i]) && (found < 0 || !buffers[found].writeable)) found = i;
  }
  if (found >= 0) c->last_buffer = found;
  return found;
}

[[noreturn]] void fail_bounds(Worker* w, uintptr_t address, size_t bytes, bool write, const void* pc) {
  const CaLaunch* l = w->checker->launch;
  const char* access = write ? "write" : "read";
  w->error.address = address;
  w->error.bytes = bytes;
  const uintptr_t shared = reinterpret_cast<uintptr_t>(w->block.shared);
  if (shared && address >= shared && address < shared + l->shared_bytes + PAGE) {
    w->error.shared_offset = static_cast<int32_t>(address - shared);
    fail(w, CA_OUT_OF_BOUNDS, pc, "%zu-byte %s at byte %zu of dynamic shared memory, which has %u bytes", bytes, access,
         static_cast<size_t>(address - shared), l->shared_bytes);
  }
  uint64_t nearest = UINT64_MAX;
  const CaBuffer* near = nullptr;
  for (int i = 0; i < l->num_buffers; ++i) {
    const CaBuffer& b = l->buffers[i];
    const uint64_t end = b.base + b.bytes;
    const uint64_t away = address < b.base ? b.base - address : address >= end ? address - end : 0;
    if (away < nearest) nearest = away, near = &b;
  }
  if (!near || nearest >= 1u << 20) {
    fail(w, CA_OUT_OF_BOUNDS, pc, "%zu-byte %s at address 0x%zx, far from every argument", bytes, access,
         static_cast<size_t>(address));
  }
  w->error.argument = near->argument;
  const bool before = address < near->base;
  fail(w, CA_OUT_OF_BOUNDS, pc, "%zu-byte %s %llu bytes %s a buffer of %llu bytes", bytes, access,
       static_cast<unsigned long long>(nearest),
       before ? "before" : nearest || address == near->base + near->bytes ? "past the end of" : "across the end of",
       static_cast<unsigned long long>(near->bytes));
}

// ---- a launch and its blocks -----------------------------------------------------------------------------

// Finds the kernel's library and, on this OS thread, its thread-local (static shared) memory.
int visit_library(dl_phdr_info* info, size_t, void* data) {
  Checker* c = static_cast<Checker*>(data);
  Range r{UINTPTR_MAX, 0};
  size_t tls = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& part = info->dlpi_phdr[i];
    if (part.p_type == PT_LOAD) {
      r.low = std::min<uintptr_t>(r.low, info->dlpi_addr + part.p_vaddr);
      r.high = std::max<uintptr_t>(r.high, info->dlpi_addr + part.p_vaddr + part.p_memsz);
    } else if (part.p_type == PT_TLS) {
      tls = part.p_memsz;
    }
  }
  if (!r.holds(reinterpret_cast<uintptr_t>(c->launch->entry), 1)) return 0;
  c->library = r;
  if (tls) {
    size_t module_and_offset[2] = {info->dlpi_tls_modid, 0};  // makes this OS thread's copy if there is none
    c->static_range.low = reinterpret_cast<uintptr_t>(__tls_get_addr(module_and_offset));
    c->static_range.high = c->static_range.low + tls;
    c->static_shared.resize(tls);
  }
  return 1;
}

void sort_buffers(Checker* c) {
  const CaBuffer* buffers = c->launch->buffers;
  const int n = c->launch->num_buffers;
  for (int i = 0; i < n; ++i) c->by_base.push_back(i);
  std::sort(c->by_base.begin(), c->by_base.end(), [&](int a, int b) { return buffers[a].base < buffers[b].base; });
  c->overlaps.resize(n);
  uint64_t reach = 0;
  for (int k = 0, widest = 0; k < n; ++k) {
    const int i = c->by_base[k];
    const uint64_t end = buffers[i].base + buffers[i].bytes;
    if (buffers[i].bytes && buffers[i].base < reach) c->overlaps[i] = c->overlaps[widest] = true;
    if (end > reach) reach = end, widest = i;
    c->reach.push_back(reach);
  }
}

bool on_a_stack(const Worker* w, uintptr_t address) {
  return address - reinterpret_cast<uintptr_t>(w->stacks) < MAX_THREADS * STACK_STRIDE;
}

// What kernels only read: their argument struct, indices and constants.
bool readable_elsewhere(const Worker* w, uintptr_t a, size_t bytes) {
  const uintptr_t worker = reinterpret_cast<uintptr_t>(w);
  return w->checker->args.holds(a, bytes) || w->checker->library.holds(a, bytes) ||
         Range{worker, worker + sizeof(Worker)}.holds(a, bytes) || a == reinterpret_cast<uintptr_t>(&ca_self);
}

}  // namespace

void on_access(const void* pointer, size_t bytes, CaAccess access, bool atomic, const void* pc) {
  if (!ca_self) return;
  const bool write = access == CA_WRITE || access == CA_CP_ASYNC;
  Worker* w = self()->worker;
  Checker* c = w->checker;
  const uintptr_t a = reinterpret_cast<uintptr_t>(pointer);
  if (!c || c->unseen || bytes == 0 || on_a_stack(w, a)) return;
  const uintptr_t shared = reinterpret_cast<uintptr_t>(w->block.shared);
  int buffer = -1;
  if (Range{shared, shared + c->launch->shared_bytes}.holds(a, bytes)) {
    on_shared(w, c->dynamic_shared, a - shared, bytes, write, atomic, pc);
  } else if (c->static_range.holds(a, bytes)) {
    on_shared(w, c->static_shared, a - c->static_range.low, bytes, write, atomic, pc);
  } else if ((buffer = find_buffer(c, a, bytes)) >= 0) {
    if (write && !c->launch->buffers[buffer].writeable) {
      w->error.argument = c->launch->buffers[buffer].argument;
      fail(w, CA_READ_ONLY_WRITE, pc, "%zu-byte write to a buffer the argument struct declares const", bytes);
    }
    on_global(w, buffer, a, bytes, write, atomic, pc);
  } else if (!write && readable_elsewhere(w, a, bytes)) {
    return;
  } else {
    fail_bounds(w, a, bytes, write, pc);
  }
  if (c->launch->counters) note_request(w, buffer, a, bytes, access, pc);
}

void on_atomic(const void* pointer, size_t bytes, const void* pc) {
  if (!ca_self || !self()->worker->checker) return;
  Worker* w = self()->worker;
  Checker* c = w->checker;
  const uintptr_t a = reinterpret_cast<uintptr_t>(pointer);
  const uintptr_t shared = reinterpret_cast<uintptr_t>(w->block.shared);
  on_access(pointer, bytes, false, true, pc);
  on_access(pointer, bytes, true, true, pc);
  if (!Range{shared, shared + c->launch->shared_bytes}.holds(a, bytes) && !c->static_range.holds(a, bytes)) {
    pass_global_atomic(c, a, self()->number);
  }
  Clocks& place = c->atomics[a];
  acquire_from(c, place, self()->number);
  release_to(c, place, self()->number);
}

void on_function_entry(const void* frame, const void* pc) {
  if (!ca_self) return;
  Fiber* f = self();
  const char* lowest = f->worker->stacks + f->stack * STACK_STRIDE + PAGE;
  if (static_cast<const char*>(frame) - lowest < static_cast<ptrdiff_t>(STACK_RESERVE)) {
    fail(f->worker, CA_STACK_OVERFLOW, pc, "the thread needs more than %zu KiB of stack",
         (STACK_BYTES - STACK_RESERVE) / 1024);
  }
}

Checker* new_checker(const Job* job) {
  Checker* c = new Checker();
  const CaLaunch* l = c->launch = &job->launch;
  c->threads = l->block[0] * l->block[1] * l->block[2];
  c->args.low = reinterpret_cast<uintptr_t>(job->args);
  c->args.high = c->args.low + l->args_bytes;
  sort_buffers(c);
  for (int i = 0; i < l->num_buffers; ++i) {
    const CaBuffer& b = l->buffers[i];
    const bool shadowed = b.writeable && b.bytes;
    c->global.push_back(static_cast<GlobalByte*>(shadowed ? map_memory(b.bytes * sizeof(GlobalByte)) : nullptr));
    if (shadowed && !c->global.back()) {
      delete_checker(c);
      return nullptr;
    }
  }
  c->dynamic_shared.resize(l->shared_bytes);
  c->known.resize(c->threads);
  dl_iterate_phdr(visit_library, c);
  return c;
}

void delete_checker(Checker* c) {
  if (c->launch->counters) report_requests(c);
  for (size_t i = 0; i < c->global.size(); ++i) {
    if (c->global[i]) munmap(c->global[i], c->launch->buffers[i].bytes * sizeof(GlobalByte));
  }
  delete c;
}

void check_block_start(Worker* w) {
  Checker* c = w->checker;
  c->block_epoch = ++c->epoch;
  c->clock.assign(c->threads, 1);
  c->epoch_clock.assign(c->threads, 0);
  c->atomics.clear();
  c->blocks.push_back(w->block_number);
  c->fences.clear();
  c->settled = {};
  c->acquires.clear();
  c->acquired.clear();
  c->last_release = 0;
  c->unseen = false;
}

void check_block_end(Worker* w) {
  CaCounters* total = w->checker->launch->counters;
  if (!total) return;
  ++total->blocks;
  total->threads += w->threads;
  total->switches += w->switches;
  w->switches = 0;
  finish_requests(w->checker);
}

void check_meet_body(Worker* w, bool running) { w->checker->unseen = running; }

void check_async_issue(Worker* w, const AsyncCopy& copy, const void* pc) {
  Checker* c = w->checker;
  const uint32_t bytes = copy.bytes;
  if (reinterpret_cast<uintptr_t>(copy.to) % bytes ||
      (copy.valid_bytes && reinterpret_cast<uintptr_t>(copy.from) % bytes)) {
    fail(w, CA_MISALIGNED, pc, "cp.async of %u bytes needs addresses that are multiples of %u", bytes, bytes);
  }
  on_access(copy.from, copy.valid_bytes, false, false, pc);
  on_access(copy.to, bytes, CA_CP_ASYNC, false, pc);
  const uintptr_t offset = reinterpret_cast<uintptr_t>(copy.to) - reinterpret_cast<uintptr_t>(w->block.shared);
  if (offset < c->launch->shared_bytes) {
    for (uint32_t i = 0; i < bytes; ++i) c->dynamic_shared[offset + i].pending = true;
  }
  if (c->launch->counters) c->launch->counters->cp_async_bytes += copy.valid_bytes;
}

void check_async_land(Worker* w, const AsyncCopy& copy) {
  Checker* c = w->checker;
  const uintptr_t offset = reinterpret_cast<uintptr_t>(copy.to) - reinterpret_cast<uintptr_t>(w->block.shared);
  if (offset >= c->launch->shared_bytes) return;
  const int thread = self()->number;
  for (uint32_t i = 0; i < copy.bytes; ++i) {
    SharedByte& s = c->dynamic_shared[offset + i];
    s.pending = false;
    s.write.epoch = c->epoch;
    s.write.thread = thread;
    s.write.clock = c->clock[thread];
  }
}

void check_count(Worker* w, int event, uint64_t amount) {
  CaCounters* total = w->checker->launch->counters;
  if (!total) return;
  (event == COUNT_MMA ? total->mma : event == COUNT_LDMATRIX ? total->ldmatrix : total->shuffles) += amount;
}

}  // namespace ca
