// SPDX-License-Identifier: Apache-2.0
// checker.cpp - the checking mode: every memory access of a kernel is seen and judged.
//
// The kernel library is compiled with -fsanitize=thread, which makes the compiler call __tsan_readN / __tsan_writeN at
// each access; those functions are ours, libtsan is not linked. An access must lie in an argument's buffer, in shared
// memory, on the fiber's stack or in the library's own data.
//
// Order of accesses: each thread has a vector clock (one counter per thread of the block). Barriers, collectives and
// atomics join clocks; two accesses of one byte, one of them a write, must be ordered by them or both be atomic.
// Shared memory keeps writer, reader and "initialised" per byte; writable buffers keep the last writer per byte,
// block included, so a block that reads or overwrites what another block of the same launch wrote is seen too.
#include <dlfcn.h>
#include <link.h>
#include <stdio.h>
#include <sys/mman.h>

#include <algorithm>
#include <deque>
#include <unordered_map>

#include "executor.h"

extern "C" void* __tls_get_addr(void* module_and_offset);

namespace ca {

namespace {

struct SharedByte {
  uint32_t block = 0;                 // serial number of the block that last touched it; others' marks are stale
  uint32_t write_clock = 0, read_clock = 0;
  uint16_t writer = 0, reader = 0;
  uint32_t write_pc = 0, read_pc = 0; // offsets from the library's base
  bool written = false, read = false, atomic = false, pending = false;
};

struct GlobalByte {                   // last write and last read of this launch; all zero: none
  uint32_t block;                     // that wrote, number + 1
  uint32_t clock : 21, thread : 10, atomic : 1;
  uint32_t reader, reader_thread;     // block that read, number + 1
};

struct Request {                      // the lanes of a warp at one instruction, one after another
  uint32_t lanes = 0;
  uint32_t bytes = 0;
  bool write = false;
  int buffer = -1;                    // -1: shared memory
  uintptr_t address[32];
};

struct Instruction {                  // per warp and code address
  uint32_t times[32] = {};            // executed by each lane
  uint64_t first = 0;                 // number of the oldest open request
  std::deque<Request> open;
};

}  // namespace

struct Checker {
  const CaLaunch* launch;
  std::vector<GlobalByte*> written;   // one shadow per buffer, null for read-only ones
  std::vector<uint32_t> clocks;       // [thread][thread]
  std::vector<uint32_t> barrier_clocks[BARRIERS];
  std::unordered_map<uintptr_t, std::vector<uint32_t>> atomic_clocks;
  std::vector<SharedByte> dynamic, fixed;  // shadows of dynamic and static shared memory
  uintptr_t fixed_low = 0, fixed_high = 0; // this OS thread's static shared memory
  uintptr_t library_low = 0, library_high = 0;
  uint32_t serial = 0;                // of the block
  bool acquired = false;              // the block has taken part in a global atomic
  bool busy = false;                  // inside the checker itself
  std::unordered_map<uint64_t, Instruction> instructions;
};

namespace {

uint32_t* clock_of(Checker* c, int threads, int thread) { return c->clocks.data() + size_t(thread) * threads; }

void join(std::vector<uint32_t>& into, const uint32_t* from) {
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], from[i]);
}

// Finds the library of the kernel and, on this OS thread, its thread-local (static shared) memory.
int visit_library(dl_phdr_info* info, size_t, void* data) {
  Checker* c = static_cast<Checker*>(data);
  const uintptr_t entry = reinterpret_cast<uintptr_t>(c->launch->entry);
  uintptr_t low = UINTPTR_MAX, high = 0, tls = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& part = info->dlpi_phdr[i];
    if (part.p_type == PT_LOAD) {
      low = std::min<uintptr_t>(low, info->dlpi_addr + part.p_vaddr);
      high = std::max<uintptr_t>(high, info->dlpi_addr + part.p_vaddr + part.p_memsz);
    } else if (part.p_type == PT_TLS) {
      tls = part.p_memsz;
    }
  }
  if (entry < low || entry >= high) return 0;
  c->library_low = low;
  c->library_high = high;
  if (tls) {
    // asks for this OS thread's copy, which is made at its first use
    size_t module_offset[2] = {info->dlpi_tls_modid, 0};
    c->fixed_low = reinterpret_cast<uintptr_t>(__tls_get_addr(module_offset));
    c->fixed_high = c->fixed_low + tls;
    c->fixed.resize(tls);
  }
  return 1;
}

[[noreturn]] void fail_race(Worker* w, Checker* c, const SharedByte& s, bool with_write, const void* pc, bool write) {
  const int other = with_write ? s.writer : s.reader;
  const uint3 t = w->fibers[other].index;
  w->error.other_pc = c->library_low + (with_write ? s.write_pc : s.read_pc);
  w->error.other_thread[0] = t.x, w->error.other_thread[1] = t.y, w->error.other_thread[2] = t.z;
  for (int i = 0; i < 3; ++i) w->error.other_block[i] = (&w->block.index.x)[i];
  fail(w, CA_RACE, pc, "%s of shared memory, not ordered with a %s by another thread; a barrier is missing",
       write ? "write" : "read", with_write ? "write" : "read");
}

void on_shared(Worker* w, Checker* c, std::vector<SharedByte>& shadow, size_t offset, size_t bytes, bool write,
               bool atomic, const void* pc) {
  const int self = ca::self()->number;
  const uint32_t* now = clock_of(c, w->threads, self);
  const uint32_t at = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(pc) - c->library_low);
  for (size_t i = offset; i < offset + bytes; ++i) {
    SharedByte& s = shadow[i];
    if (s.block != c->serial) {
      s = SharedByte{};
      s.block = c->serial;
    }
    if (!write && !s.written) {
      w->error.shared_offset = static_cast<int32_t>(i);
      fail(w, CA_UNINITIALISED_SHARED, pc, "byte %zu of %s shared memory is read before %s", i,
           &shadow == &c->dynamic ? "dynamic" : "static",
           s.pending ? "its asynchronous copy was waited for" : "it was written");
    }
    const bool both_atomic = atomic && s.atomic;
    if (s.written && s.writer != self && s.write_clock > now[s.writer] && !both_atomic) fail_race(w, c, s, true, pc, write);
    if (write) {
      if (s.read && s.reader != self && s.read_clock > now[s.reader]) fail_race(w, c, s, false, pc, true);
      s.written = true, s.pending = false, s.atomic = atomic;
      s.writer = self, s.write_clock = now[self], s.write_pc = at;
    } else if (!atomic) {
      s.read = true;
      s.reader = self, s.read_clock = now[self], s.read_pc = at;
    }
  }
}

[[noreturn]] void fail_global(Worker* w, Checker* c, int buffer, size_t byte, bool elsewhere, uint64_t block, uint32_t thread,
                              const char* order, const char* access, const void* pc) {
  const uint32_t* grid = c->launch->grid;
  CaError& e = w->error;
  e.argument = c->launch->buffers[buffer].argument;
  e.other_block[0] = block % grid[0], e.other_block[1] = block / grid[0] % grid[1];
  e.other_block[2] = static_cast<uint32_t>(block / grid[0] / grid[1]);
  const uint3 t = w->fibers[thread].index;
  e.other_thread[0] = t.x, e.other_thread[1] = t.y, e.other_thread[2] = t.z;
  const uint32_t* o = e.other_block;
  fail(w, elsewhere ? CA_GLOBAL_RACE : CA_RACE, pc,
       "byte %zu is %s a %s by block (%u, %u, %u), thread (%u, %u, %u), and nothing orders the two", byte, order, access,
       o[0], o[1], o[2], t.x, t.y, t.z);
}

void on_global(Worker* w, Checker* c, int buffer, uintptr_t address, size_t bytes, bool write, bool atomic,
               const void* pc) {
  GlobalByte* shadow = c->written[buffer];
  if (!shadow) return;
  const int self = ca::self()->number;
  const uint32_t* now = clock_of(c, w->threads, self);
  const uint32_t block = static_cast<uint32_t>(w->block_number) + 1;
  for (size_t i = address - c->launch->buffers[buffer].base, end = i + bytes; i < end; ++i) {
    GlobalByte& g = shadow[i];
    if (g.block && !(atomic && g.atomic)) {
      const bool elsewhere = g.block != block;
      if (elsewhere ? !c->acquired : g.thread != uint32_t(self) && g.clock > (now[g.thread] & 0x1fffff)) {
        fail_global(w, c, buffer, i, elsewhere, g.block - 1, g.thread, write ? "written after" : "read after", "write", pc);
      }
    }
    if (write && g.reader && g.reader != block && !atomic && !c->acquired) {
      fail_global(w, c, buffer, i, true, g.reader - 1, g.reader_thread, "written after", "read", pc);
    }
    if (write) {
      g.block = block, g.clock = now[self] & 0x1fffff, g.thread = static_cast<uint32_t>(self), g.atomic = atomic;
    } else if (!atomic) {
      g.reader = block, g.reader_thread = static_cast<uint32_t>(self);
    }
  }
}

[[noreturn]] void fail_bounds(Worker* w, Checker* c, uintptr_t address, size_t bytes, bool write, const void* pc) {
  const CaLaunch* l = c->launch;
  uint64_t best = UINT64_MAX;
  const CaBuffer* near = nullptr;
  for (int i = 0; i < l->num_buffers; ++i) {
    const CaBuffer& b = l->buffers[i];
    const uint64_t away = address < b.base ? b.base - address : address >= b.base + b.bytes ? address - (b.base + b.bytes) : 0;
    if (away < best) best = away, near = &b;
  }
  w->error.address = address;
  w->error.bytes = bytes;
  const uintptr_t shared = reinterpret_cast<uintptr_t>(w->block.shared);
  if (address >= shared && address < shared + l->shared_bytes + 4096) {
    fail(w, CA_OUT_OF_BOUNDS, pc, "%zu-byte %s at byte %zu of dynamic shared memory, which has %u bytes", bytes,
         write ? "write" : "read", size_t(address - shared), l->shared_bytes);
  }
  if (near && best < (1u << 20)) {
    w->error.argument = near->argument;
    const bool before = address < near->base;
    fail(w, CA_OUT_OF_BOUNDS, pc, "%zu-byte %s %llu bytes %s a buffer of %llu bytes", bytes, write ? "write" : "read",
         static_cast<unsigned long long>(before ? near->base - address : address - near->base - near->bytes),
         before ? "before" : "past the end of", static_cast<unsigned long long>(near->bytes));
  }
  fail(w, CA_OUT_OF_BOUNDS, pc, "%zu-byte %s at address 0x%zx, far from every argument", bytes, write ? "write" : "read",
       size_t(address));
}

int find_buffer(const CaLaunch* l, uintptr_t address, size_t bytes, bool write) {
  int found = -1;  // of overlapping buffers, one that may be written
  for (int i = 0; i < l->num_buffers; ++i) {
    const CaBuffer& b = l->buffers[i];
    if (address >= b.base && address + bytes <= b.base + b.bytes && (found < 0 || b.writeable)) found = i;
    if (found >= 0 && (l->buffers[found].writeable || !write)) break;
  }
  return found;
}

bool on_stack(const Worker* w, uintptr_t address) {
  return address - reinterpret_cast<uintptr_t>(w->stacks) < MAX_THREADS * STACK_STRIDE;
}

// ---- requests of a warp: sectors and bank conflicts ------------------------------------------------------

void account(Checker* c, const Request& r) {
  CaCounters& total = *c->launch->counters;
  if (r.buffer < 0) {
    // 32 banks of 4 bytes; wide accesses are served for 128 bytes at a time
    const int group = r.bytes <= 4 ? 32 : r.bytes <= 8 ? 16 : 8;
    for (int first = 0; first < 32; first += group) {
      std::vector<uintptr_t> words[32];
      bool any = false;
      for (int l = first; l < first + group; ++l) {
        if (!(r.lanes >> l & 1)) continue;
        any = true;
        for (uintptr_t word = r.address[l] / 4; word <= (r.address[l] + r.bytes - 1) / 4; ++word) {
          auto& bank = words[word % 32];
          if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
        }
      }
      size_t ways = 1;
      for (const auto& bank : words) ways = std::max(ways, bank.size());
      total.shared_requests += any;
      total.shared_conflicts += any ? ways - 1 : 0;
      total.max_conflict_ways = std::max<uint64_t>(total.max_conflict_ways, ways);
    }
    return;
  }
  std::vector<uintptr_t> sectors;
  for (int l = 0; l < 32; ++l) {
    if (!(r.lanes >> l & 1)) continue;
    for (uintptr_t s = r.address[l] / 32; s <= (r.address[l] + r.bytes - 1) / 32; ++s) sectors.push_back(s);
  }
  std::sort(sectors.begin(), sectors.end());
  const uint64_t distinct = std::unique(sectors.begin(), sectors.end()) - sectors.begin();
  CaBufferCounters& own = total.per_buffer[r.buffer];
  const uint64_t bytes = uint64_t{r.bytes} * __builtin_popcount(r.lanes);
  (r.write ? own.bytes_written : own.bytes_read) += bytes;
  (r.write ? own.sectors_written : own.sectors_read) += distinct;
}

void note_request(Worker* w, Checker* c, int buffer, uintptr_t address, size_t bytes, bool write, const void* pc) {
  const int self = ca::self()->number, lane = self % 32;
  Instruction& in = c->instructions[reinterpret_cast<uintptr_t>(pc) * MAX_WARPS + self / 32];
  const uint64_t number = in.times[lane]++ - in.first;
  if (in.open.size() <= number) in.open.resize(number + 1);
  Request& r = in.open[number];
  r.lanes |= 1u << lane;
  r.bytes = static_cast<uint32_t>(bytes);
  r.write = write;
  r.buffer = buffer;
  r.address[lane] = address;
  while (!in.open.empty() && in.open.front().lanes == 0xffffffffu) {
    account(c, in.open.front());
    in.open.pop_front();
    ++in.first;
  }
}

void on_access(const void* pointer, size_t bytes, bool write, bool atomic, const void* pc) {
  if (!ca_self) return;
  Worker* w = self()->worker;
  const uintptr_t a = reinterpret_cast<uintptr_t>(pointer);
  if (on_stack(w, a) || !w->checker || w->checker->busy || bytes == 0) return;
  Checker* c = w->checker;
  const bool counting = c->launch->counters != nullptr;
  const uintptr_t shared = reinterpret_cast<uintptr_t>(w->block.shared);
  if (a >= shared && a + bytes <= shared + c->launch->shared_bytes) {
    on_shared(w, c, c->dynamic, a - shared, bytes, write, atomic, pc);
    if (counting) note_request(w, c, -1, a, bytes, write, pc);
    return;
  }
  if (a >= c->fixed_low && a + bytes <= c->fixed_high) {
    on_shared(w, c, c->fixed, a - c->fixed_low, bytes, write, atomic, pc);
    if (counting) note_request(w, c, -1, a, bytes, write, pc);
    return;
  }
  const int buffer = find_buffer(c->launch, a, bytes, write);
  if (buffer >= 0) {
    if (write && !c->launch->buffers[buffer].writeable) {
      w->error.argument = c->launch->buffers[buffer].argument;
      fail(w, CA_READ_ONLY_WRITE, pc, "%zu-byte write to a buffer the argument struct declares const", bytes);
    }
    on_global(w, c, buffer, a, bytes, write, atomic, pc);
    if (counting) note_request(w, c, buffer, a, bytes, write, pc);
    return;
  }
  const uintptr_t indices = reinterpret_cast<uintptr_t>(w);  // threadIdx and its like
  if (!write && ((a >= indices && a + bytes <= indices + sizeof(Worker)) || pointer == &ca_self)) return;
  const uintptr_t args = reinterpret_cast<uintptr_t>(w->job->args);
  if (!write && a >= args && a + bytes <= args + c->launch->args_bytes) return;
  if (!write && a >= c->library_low && a + bytes <= c->library_high) return;
  fail_bounds(w, c, a, bytes, write, pc);
}

// An atomic orders the thread after every earlier atomic on the address.
void on_atomic(const void* pointer, size_t bytes, const void* pc) {
  if (!ca_self || !self()->worker->checker) return;
  Worker* w = self()->worker;
  Checker* c = w->checker;
  const uintptr_t a = reinterpret_cast<uintptr_t>(pointer);
  const uintptr_t shared = reinterpret_cast<uintptr_t>(w->block.shared);
  const bool in_shared = (a >= shared && a < shared + c->launch->shared_bytes) || (a >= c->fixed_low && a < c->fixed_high);
  if (!in_shared) c->acquired = true;
  on_access(pointer, bytes, false, true, pc);
  on_access(pointer, bytes, true, true, pc);
  const int self = ca::self()->number;
  uint32_t* own = clock_of(c, w->threads, self);
  std::vector<uint32_t>& all = c->atomic_clocks[a];
  all.resize(w->threads);
  join(all, own);
  std::copy(all.begin(), all.end(), own);
  ++own[self];
}

}  // namespace

// ---- called by the scheduler -----------------------------------------------------------------------------

Checker* new_checker(const Job* job) {
  const CaLaunch* launch = &job->launch;
  Checker* c = new Checker();
  c->launch = launch;
  for (int i = 0; i < launch->num_buffers; ++i) {
    void* shadow = nullptr;
    if (launch->buffers[i].writeable && launch->buffers[i].bytes) {
      shadow = mmap(nullptr, launch->buffers[i].bytes * sizeof(GlobalByte), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (shadow == MAP_FAILED) shadow = nullptr;
    }
    c->written.push_back(static_cast<GlobalByte*>(shadow));
  }
  c->dynamic.resize(launch->shared_bytes);
  dl_iterate_phdr(visit_library, c);
  return c;
}

void delete_checker(Checker* c) {
  for (size_t i = 0; i < c->written.size(); ++i) {
    if (c->written[i]) munmap(c->written[i], c->launch->buffers[i].bytes * sizeof(GlobalByte));
  }
  delete c;
}

void check_block_start(Worker* w) {
  Checker* c = w->checker;
  ++c->serial;
  c->acquired = false;
  c->atomic_clocks.clear();
  c->clocks.assign(size_t(w->threads) * w->threads, 0);
  for (int i = 0; i < w->threads; ++i) clock_of(c, w->threads, i)[i] = 1;
  for (auto& clocks : c->barrier_clocks) clocks.assign(w->threads, 0);
}

void check_block_end(Worker* w) {
  Checker* c = w->checker;
  CaCounters* total = c->launch->counters;
  if (!total) return;
  ++total->blocks;
  total->switches += w->switches;
  w->switches = 0;
  total->threads += w->threads;
  for (auto& [key, in] : c->instructions) {
    for (const Request& r : in.open) {
      if (r.lanes) account(c, r);
    }
  }
  c->instructions.clear();
}

void check_arrive(Worker* w, const Fiber& fiber, int barrier) {
  Checker* c = w->checker;
  uint32_t* own = clock_of(c, w->threads, fiber.number);
  join(c->barrier_clocks[barrier], own);
  ++own[fiber.number];
  if (c->launch->counters) ++c->launch->counters->barriers;
}

void check_release(Worker* w, const Fiber& fiber, int barrier) {
  Checker* c = w->checker;
  const int self = fiber.number;
  uint32_t* own = clock_of(c, w->threads, self);
  const std::vector<uint32_t>& all = c->barrier_clocks[barrier];
  for (int i = 0; i < w->threads; ++i) {
    if (i != self) own[i] = std::max(own[i], all[i]);
  }
}

void check_meeting(Worker* w, uint32_t warp, uint32_t mask) {
  Checker* c = w->checker;
  std::vector<uint32_t> all(w->threads, 0);
  for (uint32_t lanes = mask; lanes; lanes &= lanes - 1) join(all, clock_of(c, w->threads, warp * 32 + __builtin_ctz(lanes)));
  for (uint32_t lanes = mask; lanes; lanes &= lanes - 1) {
    const int thread = warp * 32 + __builtin_ctz(lanes);
    uint32_t* own = clock_of(c, w->threads, thread);
    const uint32_t mine = own[thread];
    std::copy(all.begin(), all.end(), own);
    own[thread] = mine + 1;
  }
  if (c->launch->counters) ++c->launch->counters->collectives;
}

void check_meet_body(Worker* w, bool running) { w->checker->busy = running; }

void check_async_issue(Worker* w, const AsyncCopy& copy, const void* pc) {
  Checker* c = w->checker;
  const uint32_t bytes = copy.bytes;
  if (reinterpret_cast<uintptr_t>(copy.to) % bytes || (copy.valid_bytes && reinterpret_cast<uintptr_t>(copy.from) % bytes)) {
    fail(w, CA_MISALIGNED, pc, "cp.async of %u bytes needs addresses that are multiples of %u", bytes, bytes);
  }
  on_access(copy.from, copy.valid_bytes, false, false, pc);
  on_access(copy.to, bytes, true, false, pc);
  const uintptr_t offset = reinterpret_cast<uintptr_t>(copy.to) - reinterpret_cast<uintptr_t>(w->block.shared);
  if (offset < c->launch->shared_bytes) {
    for (uint32_t i = 0; i < bytes; ++i) c->dynamic[offset + i].written = false, c->dynamic[offset + i].pending = true;
  }
  if (c->launch->counters) c->launch->counters->cp_async_bytes += bytes;
}

void check_async_land(Worker* w, const AsyncCopy& copy) {
  Checker* c = w->checker;
  const uintptr_t offset = reinterpret_cast<uintptr_t>(copy.to) - reinterpret_cast<uintptr_t>(w->block.shared);
  if (offset >= c->launch->shared_bytes) return;
  const int self = ca::self()->number;
  for (uint32_t i = 0; i < copy.bytes; ++i) {
    SharedByte& s = c->dynamic[offset + i];
    s.written = true, s.pending = false, s.atomic = false;
    s.writer = self, s.write_clock = clock_of(c, w->threads, self)[self];
  }
}

void check_count(Worker* w, int event, uint64_t amount) {
  CaCounters* total = w->checker->launch->counters;
  if (!total) return;
  (event == COUNT_MMA ? total->mma : event == COUNT_LDMATRIX ? total->ldmatrix : total->shuffles) += amount;
}

}  // namespace ca

// ---- called by instrumented code -------------------------------------------------------------------------

using ca::on_access;
using ca::on_atomic;
#define PC __builtin_return_address(0)
#define PLAIN(n)                                                                      \
  CA_API void __tsan_read##n(void* p) { on_access(p, n, false, false, PC); }          \
  CA_API void __tsan_write##n(void* p) { on_access(p, n, true, false, PC); }          \
  CA_API void __tsan_read_write##n(void* p) { on_access(p, n, false, false, PC), on_access(p, n, true, false, PC); } \
  CA_API void __tsan_unaligned_read##n(void* p) { on_access(p, n, false, false, PC); } \
  CA_API void __tsan_unaligned_write##n(void* p) { on_access(p, n, true, false, PC); } \
  CA_API void __tsan_volatile_read##n(void* p) { on_access(p, n, false, false, PC); } \
  CA_API void __tsan_volatile_write##n(void* p) { on_access(p, n, true, false, PC); }
PLAIN(1) PLAIN(2) PLAIN(4) PLAIN(8) PLAIN(16)
#undef PLAIN

CA_API void ca::ca_access(const void* address, uint32_t bytes, uint32_t alignment, int write) {
  if (ca_self && reinterpret_cast<uintptr_t>(address) % alignment) {
    fail(self()->worker, CA_MISALIGNED, PC, "%u-byte %s at an address that is no multiple of %u", bytes,
         write ? "write" : "read", alignment);
  }
  on_access(address, bytes, write, false, PC);
}

CA_API void __tsan_init() {}
CA_API void __tsan_func_entry(void*) {}
CA_API void __tsan_func_exit() {}
CA_API void __tsan_vptr_update(void**, void*) {}
CA_API void __tsan_vptr_read(void**) {}
CA_API void __tsan_read_range(void* p, size_t n) { on_access(p, n, false, false, PC); }
CA_API void __tsan_write_range(void* p, size_t n) { on_access(p, n, true, false, PC); }
CA_API void* __tsan_memcpy(void* to, const void* from, size_t n) {
  on_access(from, n, false, false, PC);
  on_access(to, n, true, false, PC);
  return memcpy(to, from, n);
}
CA_API void* __tsan_memmove(void* to, const void* from, size_t n) {
  on_access(from, n, false, false, PC);
  on_access(to, n, true, false, PC);
  return memmove(to, from, n);
}
CA_API void* __tsan_memset(void* to, int value, size_t n) {
  on_access(to, n, true, false, PC);
  return memset(to, value, n);
}

#define ATOMIC(bits, type)                                                                                      \
  CA_API type __tsan_atomic##bits##_load(const volatile type* p, int) {                                         \
    on_access(const_cast<type*>(p), sizeof(type), false, true, PC);                                             \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                                \
  }                                                                                                             \
  CA_API void __tsan_atomic##bits##_store(volatile type* p, type v, int) {                                      \
    on_access(const_cast<type*>(p), sizeof(type), true, true, PC);                                              \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                                   \
  }                                                                                                             \
  CA_API type __tsan_atomic##bits##_exchange(volatile type* p, type v, int) {                                   \
    on_atomic(const_cast<type*>(p), sizeof(type), PC);                                                          \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                                         \
  }                                                                                                             \
  CA_API int __tsan_atomic##bits##_compare_exchange_strong(volatile type* p, type* old, type v, int, int) {     \
    on_atomic(const_cast<type*>(p), sizeof(type), PC);                                                          \
    return __atomic_compare_exchange_n(p, old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                   \
  }                                                                                                             \
  CA_API int __tsan_atomic##bits##_compare_exchange_weak(volatile type* p, type* old, type v, int, int) {       \
    on_atomic(const_cast<type*>(p), sizeof(type), PC);                                                          \
    return __atomic_compare_exchange_n(p, old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                   \
  }                                                                                                             \
  CA_API type __tsan_atomic##bits##_compare_exchange_val(volatile type* p, type old, type v, int, int) {        \
    on_atomic(const_cast<type*>(p), sizeof(type), PC);                                                          \
    __atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                         \
    return old;                                                                                                 \
  }
#define ATOMIC_RMW(bits, type, name)                                             \
  CA_API type __tsan_atomic##bits##_##name(volatile type* p, type v, int) {      \
    on_atomic(const_cast<type*>(p), sizeof(type), PC);                           \
    return __atomic_##name(p, v, __ATOMIC_SEQ_CST);                              \
  }
#define ATOMICS(bits, type)                                                                                      \
  ATOMIC(bits, type) ATOMIC_RMW(bits, type, fetch_add) ATOMIC_RMW(bits, type, fetch_sub)                         \
  ATOMIC_RMW(bits, type, fetch_and) ATOMIC_RMW(bits, type, fetch_or) ATOMIC_RMW(bits, type, fetch_xor)           \
  ATOMIC_RMW(bits, type, fetch_nand)
ATOMICS(8, uint8_t) ATOMICS(16, uint16_t) ATOMICS(32, uint32_t) ATOMICS(64, uint64_t)
CA_API void __tsan_atomic_thread_fence(int) {}
CA_API void __tsan_atomic_signal_fence(int) {}
