// SPDX-License-Identifier: Apache-2.0
// api.h - the C API between cupyattn/runtime/cpu.py and the executor.
#ifndef CUPYATTN_CPU_API_H
#define CUPYATTN_CPU_API_H

#include <stdint.h>

#define CA_API extern "C" __attribute__((visibility("default")))

typedef void (*CaEntry)(const void* args);  // one CUDA thread: runs the kernel with a copy of its argument struct

struct CaBuffer {  // memory the kernel may touch: [base, base + bytes)
  uint64_t base, bytes;
  int32_t writeable;
  int32_t argument;  // index known to Python
};

struct CaBufferCounters {
  uint64_t bytes_read, bytes_written, sectors_read, sectors_written;
};

enum CaAccess { CA_READ, CA_WRITE, CA_LDMATRIX, CA_CP_ASYNC };  // the latter as it meets shared memory

struct CaSharedCounters {  // of one instruction in the kernel's code
  uint64_t pc;
  int32_t access, reserved;
  uint64_t requests, conflicts, max_ways;
};

struct CaCounters {
  uint64_t blocks, threads, switches, barriers, collectives, mma, ldmatrix, shuffles, cp_async_bytes;
  CaBufferCounters* per_buffer;
  CaSharedCounters* shared;  // in no order
  uint64_t num_shared;       // in: room; out: instructions, perhaps more than there is room for
};

struct CaLaunch {
  CaEntry entry;
  const void* args;
  uint64_t args_bytes;
  uint32_t grid[3], block[3];
  uint32_t shared_bytes;
  int32_t workers;    // OS threads, the caller included
  int32_t schedule;   // 0 forward, 1 reverse, 2 random
  uint64_t seed;
  int32_t check;
  int32_t late_async;
  int32_t num_buffers;
  const CaBuffer* buffers;
  CaCounters* counters;
};

enum CaErrorKind {
  CA_OK, CA_OUT_OF_BOUNDS, CA_READ_ONLY_WRITE, CA_UNINITIALISED_SHARED, CA_RACE, CA_DIVERGENT_BARRIER, CA_DEADLOCK,
  CA_COLLECTIVE_MISMATCH, CA_STACK_OVERFLOW, CA_GLOBAL_RACE, CA_BAD_LAUNCH, CA_MISALIGNED
};

struct CaError {
  int32_t kind;
  int32_t argument;
  uint64_t pc, other_pc, address, bytes;
  uint32_t block[3], thread[3], other_block[3], other_thread[3];
  int32_t shared_offset;
  char message[512];
};

CA_API int ca_launch(const CaLaunch*, CaError*);  // 0 done, 1 error, 2 time slice over: call ca_resume
CA_API int ca_resume(CaError*);
CA_API void ca_abandon(void);
CA_API int ca_api_version(void);
CA_API const char* ca_build_info(void);

#endif
