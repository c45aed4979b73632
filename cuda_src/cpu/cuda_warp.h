// SPDX-License-Identifier: Apache-2.0
// cuda_warp.h - barriers, shuffles, votes and warp reductions under CUDA's names. Included by cuda_cpu.h.
#ifndef CUPYATTN_CPU_CUDA_WARP_H
#define CUPYATTN_CPU_CUDA_WARP_H

#define CA_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

CA_HOST_INLINE void __syncthreads(CA_SITE) { ca::ca_barrier(0, 0, 0, file, line); }

namespace ca {

struct Empty {};
inline void meet_syncwarp(Empty* const*, uint32_t) {}

// A lane whose source takes no part gets bits all ones, which no test overlooks.
template <typename T>
struct Shuffle {
  T value, result;
  int source;
};
template <typename T>
inline void meet_shuffle(Shuffle<T>* const* all, uint32_t mask) {
#if CA_CHECK
  ca_count(COUNT_SHUFFLE, 1);
#endif
  for (; mask; mask &= mask - 1) {
    Shuffle<T>* own = all[__builtin_ctz(mask)];
    const Shuffle<T>* from = all[own->source];
    if (from) {
      own->result = from->value;
    } else {
      __builtin_memset(static_cast<void*>(&own->result), 0xff, sizeof(T));
    }
  }
}
template <typename T>
CA_HOST_INLINE T shuffle(uint32_t mask, T value, int source, const char* file, int line) {
  Shuffle<T> operand{value, value, source};
  collective<Shuffle<T>, meet_shuffle<T>>(mask, operand, file, line);
  return operand.result;
}

inline void meet_ballot(uint32_t* const* all, uint32_t mask) {
  uint32_t votes = 0;
  for (uint32_t left = mask; left; left &= left - 1) {
    votes |= *all[__builtin_ctz(left)] << __builtin_ctz(left);
  }
  for (uint32_t left = mask; left; left &= left - 1) *all[__builtin_ctz(left)] = votes;
}

template <typename T>
struct Match {
  T value;
  uint32_t lanes;
};
template <typename T>
inline void meet_match(Match<T>* const* all, uint32_t mask) {
  for (uint32_t left = mask; left; left &= left - 1) {
    Match<T>* own = all[__builtin_ctz(left)];
    own->lanes = 0;
    for (uint32_t other = mask; other; other &= other - 1) {
      const int l = __builtin_ctz(other);
      if (__builtin_memcmp(&all[l]->value, &own->value, sizeof(T)) == 0) own->lanes |= 1u << l;
    }
  }
}

template <typename T, T (*OP)(T, T)>
inline void meet_reduce_word(T* const* all, uint32_t mask) {
  T total = *all[__builtin_ctz(mask)];
  for (uint32_t left = mask & (mask - 1); left; left &= left - 1) total = OP(total, *all[__builtin_ctz(left)]);
  for (uint32_t left = mask; left; left &= left - 1) *all[__builtin_ctz(left)] = total;
}
template <typename T>
inline T word_add(T a, T b) { return static_cast<T>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b)); }
template <typename T>
inline T word_min(T a, T b) { return b < a ? b : a; }
template <typename T>
inline T word_max(T a, T b) { return a < b ? b : a; }
template <typename T>
inline T word_and(T a, T b) { return a & b; }
template <typename T>
inline T word_or(T a, T b) { return a | b; }
template <typename T>
inline T word_xor(T a, T b) { return a ^ b; }

}  // namespace ca

CA_HOST_INLINE void __syncwarp(uint32_t mask = 0xffffffffu, CA_SITE) {
  ca::Empty nothing;
  ca::collective<ca::Empty, ca::meet_syncwarp>(mask, nothing, file, line);
}

// ---- shuffles: `width` splits the warp into segments, a source outside the own segment means the own value

template <typename T>
CA_HOST_INLINE T __shfl_sync(uint32_t mask, T value, int source, int width = 32, CA_SITE) {
  const int lane = ca::ca_self->lane;
  return ca::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), file, line);
}
template <typename T>
CA_HOST_INLINE T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, CA_SITE) {
  const int lane = ca::ca_self->lane, source = lane - static_cast<int>(delta);
  return ca::shuffle(mask, value, source < (lane & ~(width - 1)) ? lane : source, file, line);
}
template <typename T>
CA_HOST_INLINE T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, CA_SITE) {
  const int lane = ca::ca_self->lane, source = lane + static_cast<int>(delta);
  return ca::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, file, line);
}
template <typename T>
CA_HOST_INLINE T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32, CA_SITE) {
  const int lane = ca::ca_self->lane, source = lane ^ (lane_mask & 31);
  return ca::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, file, line);
}

// ---- votes -----------------------------------------------------------------------------------------------

CA_HOST_INLINE uint32_t __ballot_sync(uint32_t mask, int predicate, CA_SITE) {
  uint32_t vote = predicate != 0;
  ca::collective<uint32_t, ca::meet_ballot>(mask, vote, file, line);
  return vote;
}
CA_HOST_INLINE int __any_sync(uint32_t mask, int predicate, CA_SITE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
CA_HOST_INLINE int __all_sync(uint32_t mask, int predicate, CA_SITE) {
  return __ballot_sync(mask, !predicate, file, line) == 0;
}
// Any answer that holds the own lane is a legal one; this one never lies.
CA_HOST_INLINE uint32_t __activemask() { return 1u << ca::ca_self->lane; }

template <typename T>
CA_HOST_INLINE uint32_t __match_any_sync(uint32_t mask, T value, CA_SITE) {
  ca::Match<T> operand{value, 0};
  ca::collective<ca::Match<T>, ca::meet_match<T>>(mask, operand, file, line);
  return operand.lanes;
}

#define CA_REDUCE_SYNC(name, T)                                                                             \
  CA_HOST_INLINE T __reduce_##name##_sync(uint32_t mask, T value, CA_SITE) {                                \
    ca::collective<T, ca::meet_reduce_word<T, ca::word_##name<T>>>(mask, value, file, line); \
    return value;                                                                                           \
  }
CA_REDUCE_SYNC(add, int)
CA_REDUCE_SYNC(add, unsigned)
CA_REDUCE_SYNC(min, int)
CA_REDUCE_SYNC(min, unsigned)
CA_REDUCE_SYNC(max, int)
CA_REDUCE_SYNC(max, unsigned)
CA_REDUCE_SYNC(and, unsigned)
CA_REDUCE_SYNC(or, unsigned)
CA_REDUCE_SYNC(xor, unsigned)
#undef CA_REDUCE_SYNC

CA_HOST_INLINE void __nanosleep(unsigned) { ca::ca_yield(); }

#endif  // CUPYATTN_CPU_CUDA_WARP_H
