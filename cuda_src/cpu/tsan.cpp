// SPDX-License-Identifier: Apache-2.0
// tsan.cpp - what instrumented code calls. Compiled with -fsanitize=thread a kernel calls __tsan_readN or __tsan_writeN
// at each memory access; these are ours, libtsan is not linked. PC is the return address: the place in the kernel.
#include <stdint.h>
#include <string.h>

#include "checker.h"

using ca::on_access;
using ca::on_atomic;
#define PC __builtin_return_address(0)

static void check_alignment(const void* address, uint32_t bytes, uint32_t alignment, bool write, const void* pc) {
  if (!ca::ca_self || reinterpret_cast<uintptr_t>(address) % alignment == 0) return;
  ca::Worker* w = ca::self()->worker;
  w->error.address = reinterpret_cast<uintptr_t>(address);
  ca::fail(w, CA_MISALIGNED, pc, "%u-byte %s at an address that is no multiple of %u", bytes, write ? "write" : "read",
           alignment);
}

// Compilers that know an address to be less aligned than its type call the unaligned form.
static inline void plain(const void* p, uint32_t bytes, bool write, const void* pc) {
  check_alignment(p, bytes, bytes < 8 ? bytes : 8, write, pc);
  on_access(p, bytes, write, false, pc);
}

#define PLAIN(n)                                                                                    \
  CA_API void __tsan_read##n(void* p) { plain(p, n, false, PC); }                                   \
  CA_API void __tsan_write##n(void* p) { plain(p, n, true, PC); }                                   \
  CA_API void __tsan_read_write##n(void* p) { plain(p, n, false, PC), plain(p, n, true, PC); }      \
  CA_API void __tsan_volatile_read##n(void* p) { plain(p, n, false, PC); }                          \
  CA_API void __tsan_volatile_write##n(void* p) { plain(p, n, true, PC); }                          \
  CA_API void __tsan_unaligned_read##n(void* p) { on_access(p, n, false, false, PC); }              \
  CA_API void __tsan_unaligned_write##n(void* p) { on_access(p, n, true, false, PC); }              \
  CA_API void __tsan_unaligned_read_write##n(void* p) {                                             \
    on_access(p, n, false, false, PC), on_access(p, n, true, false, PC);                            \
  }                                                                                                 \
  CA_API void __tsan_unaligned_volatile_read##n(void* p) { on_access(p, n, false, false, PC); }     \
  CA_API void __tsan_unaligned_volatile_write##n(void* p) { on_access(p, n, true, false, PC); }
PLAIN(1) PLAIN(2) PLAIN(4) PLAIN(8) PLAIN(16)
#undef PLAIN

CA_API void ca::ca_access(const void* address, uint32_t bytes, uint32_t alignment, CaAccess access) {
  check_alignment(address, bytes, alignment, access == CA_WRITE, PC);
  on_access(address, bytes, access, false, PC);
}

CA_API void __tsan_init() {}
CA_API void __tsan_func_entry(void*) { ca::on_function_entry(__builtin_frame_address(0), PC); }
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
