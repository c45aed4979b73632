// SPDX-License-Identifier: Apache-2.0
// requests.cpp - a warp's accesses put together again: 32-byte sectors per request and shared-memory bank conflicts.
#include <algorithm>

#include "checker.h"

namespace ca {
namespace {

// 32 banks of 4 bytes. Accesses wider than 4 bytes are served in 2 or 4 parts of 128 bytes.
void count_shared(Checker* c, const Request& r, const void* pc) {
  CaSharedCounters& total = c->shared[reinterpret_cast<uint64_t>(pc) * 4 + r.access];
  total.pc = reinterpret_cast<uint64_t>(pc);
  total.access = r.access;
  const int group = r.bytes <= 4 ? 32 : r.bytes <= 8 ? 16 : 8;
  for (int first = 0; first < WARP; first += group) {
    std::vector<uintptr_t> words;
    for (int l = first; l < first + group; ++l) {
      if (!(r.lanes >> l & 1)) continue;
      for (uintptr_t word = r.address[l] / 4; word <= (r.address[l] + r.bytes - 1) / 4; ++word) words.push_back(word);
    }
    if (words.empty()) continue;
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    uint64_t per_bank[32] = {};
    for (uintptr_t word : words) ++per_bank[word % 32];
    const uint64_t ways = *std::max_element(per_bank, per_bank + 32);
    ++total.requests;
    total.conflicts += ways - 1;
    total.max_ways = std::max(total.max_ways, ways);
  }
}

void count_global(CaBufferCounters& total, const Request& r) {
  std::vector<uintptr_t> sectors;
  for (int l = 0; l < WARP; ++l) {
    if (!(r.lanes >> l & 1)) continue;
    for (uintptr_t s = r.address[l] / 32; s <= (r.address[l] + r.bytes - 1) / 32; ++s) sectors.push_back(s);
  }
  std::sort(sectors.begin(), sectors.end());
  const uint64_t distinct = std::unique(sectors.begin(), sectors.end()) - sectors.begin();
  const uint64_t bytes = uint64_t{r.bytes} * __builtin_popcount(r.lanes);
  const bool write = r.access == CA_WRITE;
  (write ? total.bytes_written : total.bytes_read) += bytes;
  (write ? total.sectors_written : total.sectors_read) += distinct;
}

void count(Checker* c, const Request& r, const void* pc) {
  if (r.buffer < 0) {
    count_shared(c, r, pc);
  } else {
    count_global(c->launch->counters->per_buffer[r.buffer], r);
  }
}

void count_open(Checker* c, const Instruction& in) {
  for (const Request& r : in.open) {
    if (r.lanes) count(c, r, in.pc);
  }
}

}  // namespace

// The n-th time since all lanes met that each lane runs an instruction belongs to the warp's n-th request of it.
void note_request(Worker* w, int buffer, uintptr_t address, size_t bytes, CaAccess access, const void* pc) {
  Checker* c = w->checker;
  const uint32_t lane = ca_self->lane;
  Instruction& in = c->instructions[(reinterpret_cast<uint64_t>(pc) * 4 + access) * MAX_WARPS + ca_self->warp];
  if (in.meeting != c->meetings[ca_self->warp]) {
    count_open(c, in);
    in = Instruction();
    in.meeting = c->meetings[ca_self->warp];
  }
  in.pc = pc;
  const uint64_t number = in.times[lane]++ - in.first;
  if (in.open.size() <= number) in.open.resize(number + 1);
  Request& r = in.open[number];
  r.lanes |= 1u << lane;
  r.bytes = static_cast<uint32_t>(bytes);
  r.access = access;
  r.buffer = buffer;
  r.address[lane] = address;
  while (!in.open.empty() && in.open.front().lanes == w->existing[ca_self->warp]) {
    count(c, in.open.front(), pc);
    in.open.pop_front();
    ++in.first;
  }
}

void finish_requests(Checker* c) {
  for (const auto& [key, in] : c->instructions) count_open(c, in);
  c->instructions.clear();
}

void report_requests(Checker* c) {
  CaCounters& out = *c->launch->counters;
  uint64_t n = 0;
  for (const auto& [key, found] : c->shared) {
    if (n < out.num_shared) out.shared[n] = found;
    ++n;
  }
  out.num_shared = n;
}

}  // namespace ca
