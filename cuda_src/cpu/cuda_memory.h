// SPDX-License-Identifier: Apache-2.0
// cuda_memory.h - atomics, fences and cached loads and stores under CUDA's names. Included by cuda_cpu.h.
#ifndef CUPYATTN_CPU_CUDA_MEMORY_H
#define CUPYATTN_CPU_CUDA_MEMORY_H

namespace ca {

template <int BYTES>
struct Word;
template <>
struct Word<4> { using type = uint32_t; };
template <>
struct Word<8> { using type = uint64_t; };

template <typename To, typename From>
CA_HOST_INLINE To reinterpret_bits(const From& x) {
  To out;
  static_assert(sizeof(To) == sizeof(From), "reinterpret_bits: sizes differ");
  __builtin_memcpy(&out, &x, sizeof(out));
  return out;
}

// *address = update(*address), atomically over all OS threads; the old value.
template <typename T, typename Update>
CA_HOST_INLINE T atomic_update(T* address, const Update& update) {
  using W = typename Word<sizeof(T)>::type;
  W* word = reinterpret_cast<W*>(address);
  W seen = __atomic_load_n(word, __ATOMIC_RELAXED);
  for (;;) {
    const T old = reinterpret_bits<T>(seen);
    const W next = reinterpret_bits<W>(static_cast<T>(update(old)));
    if (__atomic_compare_exchange_n(word, &seen, next, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) return old;
  }
}

}  // namespace ca

// The templates below take any 4- or 8-byte arithmetic type; the second argument converts, as in CUDA's overloads.
template <typename T>
struct CaSame { using type = T; };

#define CA_ATOMIC(name, expression)                                                    \
  template <typename T>                                                                \
  CA_HOST_INLINE T name(T* address, typename CaSame<T>::type value) {                  \
    return ca::atomic_update(address, [&](T old) { return expression; });              \
  }
CA_ATOMIC(atomicMin, value < old ? value : old)
CA_ATOMIC(atomicMax, value > old ? value : old)
CA_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
CA_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef CA_ATOMIC

template <typename T>
CA_HOST_INLINE T atomicAdd(T* address, typename CaSame<T>::type value) {
  return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
}
template <typename T>
CA_HOST_INLINE T atomicSub(T* address, typename CaSame<T>::type value) {
  return __atomic_fetch_sub(address, value, __ATOMIC_ACQ_REL);
}
template <typename T>
CA_HOST_INLINE T atomicAnd(T* address, typename CaSame<T>::type value) {
  return __atomic_fetch_and(address, value, __ATOMIC_ACQ_REL);
}
template <typename T>
CA_HOST_INLINE T atomicOr(T* address, typename CaSame<T>::type value) {
  return __atomic_fetch_or(address, value, __ATOMIC_ACQ_REL);
}
template <typename T>
CA_HOST_INLINE T atomicXor(T* address, typename CaSame<T>::type value) {
  return __atomic_fetch_xor(address, value, __ATOMIC_ACQ_REL);
}
CA_HOST_INLINE float atomicAdd(float* address, float value) {
  return ca::atomic_update(address, [&](float old) { return old + value; });
}
CA_HOST_INLINE double atomicAdd(double* address, double value) {
  return ca::atomic_update(address, [&](double old) { return old + value; });
}
template <typename T>
CA_HOST_INLINE T atomicExch(T* address, typename CaSame<T>::type value) {
  using W = typename ca::Word<sizeof(T)>::type;
  return ca::reinterpret_bits<T>(__atomic_exchange_n(reinterpret_cast<W*>(address), ca::reinterpret_bits<W>(value),
                                                     __ATOMIC_ACQ_REL));
}
template <typename T>
CA_HOST_INLINE T atomicCAS(T* address, typename CaSame<T>::type compare, typename CaSame<T>::type value) {
  __atomic_compare_exchange_n(address, &compare, value, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  return compare;
}

// A checked launch has one OS thread: there a fence only says what it orders.
CA_HOST_INLINE void __threadfence() {
#if CA_CHECK
  ca::ca_fence();
#else
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}
CA_HOST_INLINE void __threadfence_system() { __threadfence(); }
CA_HOST_INLINE void __threadfence_block() { __atomic_signal_fence(__ATOMIC_SEQ_CST); }

#define CA_CACHED_LOAD(name) \
  template <typename T>      \
  CA_HOST_INLINE T name(const T* address) { return ca::load(address); }
CA_CACHED_LOAD(__ldg)
CA_CACHED_LOAD(__ldca)
CA_CACHED_LOAD(__ldcg)
CA_CACHED_LOAD(__ldcs)
CA_CACHED_LOAD(__ldcv)
CA_CACHED_LOAD(__ldlu)
#undef CA_CACHED_LOAD
#define CA_CACHED_STORE(name) \
  template <typename T>       \
  CA_HOST_INLINE void name(T* address, typename CaSame<T>::type value) { ca::store<T>(address, value); }
CA_CACHED_STORE(__stcg)
CA_CACHED_STORE(__stcs)
CA_CACHED_STORE(__stwb)
CA_CACHED_STORE(__stwt)
#undef CA_CACHED_STORE

#endif  // CUPYATTN_CPU_CUDA_MEMORY_H
