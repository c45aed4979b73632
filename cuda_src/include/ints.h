// SPDX-License-Identifier: Apache-2.0
// ints.h - the fixed-width integer names. NVRTC has no <stdint.h>; every other compiler keeps its own.
#ifndef CUPYATTN_INTS_H
#define CUPYATTN_INTS_H

#if defined(__CUDACC_RTC__)
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#else
#include <stdint.h>
#endif

#endif  // CUPYATTN_INTS_H
