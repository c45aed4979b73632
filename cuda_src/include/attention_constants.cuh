// SPDX-License-Identifier: Apache-2.0
// attention_constants.cuh - what is fixed when an attention kernel is compiled, the same constants for all of them.
#ifndef CUPYATTN_ATTENTION_CONSTANTS_CUH
#define CUPYATTN_ATTENTION_CONSTANTS_CUH

#include "kv_format.cuh"
#include "params.h"
#include "prelude.cuh"

using T = CA_T;                        // q and out
using KF = CA_KF;                      // format of keys
using VF = CA_VF;                      // format of values
constexpr int ROWS = CA_ROWS;          // packed query rows of a work item
constexpr int HEAD_DIM = CA_HEAD_DIM;  // tensor cores: both head dims padded to this; CUDA cores: 0, any
constexpr bool ALIGNED = CA_ALIGNED;   // k, v and out rows start at multiples of 16 bytes
constexpr bool BIAS = CA_BIAS;         // with a mask, a tree mask or ALiBi
constexpr int STEP = 8;                // elements a thread handles at a time
static_assert(sizeof(AttentionArgs) == CA_SIZEOF_ARGS, "attention: Python and CUDA disagree on AttentionArgs");

#endif  // CUPYATTN_ATTENTION_CONSTANTS_CUH
