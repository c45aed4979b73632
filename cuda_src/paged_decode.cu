// SPDX-License-Identifier: Apache-2.0
// paged_decode.cu - attention of the newest tokens of each sequence over its cached keys, cut into work items by a
// planner.
//
//   query i of sequence b stands at token  n = seqlen - q_len + i  and sees tokens t as attention_work.cuh says:
//     s[t] = softcap(softmax_scale * q[i,h] . k[t,g]) + bias,  g = h / heads_per_kv
//     out[i,h] = sum_t exp(s[t]) v[t,g] / (sum_t exp(s[t]) + exp(sinks[h])),  lse = log(sum_t exp(s[t]))
//   Scores, softmax and sums in float32; one rounding on store (tensor cores also round exp(s) to T before P.V).
//
// Two versions: CUDA cores (attention_cores.cuh, the same body as attention.cu's; any types, any alignment, sm_75) and
// tensor cores (paged_decode_mma.cuh; T of 16 bits, 16-byte rows, sm_80).
//
// launch     grid (workers), block and dynamic shared memory: see the version's header; block w runs the work items
//            worker_items[w] to worker_items[w + 1]
// aliasing   out == q is allowed: a block reads its query rows before it writes them, and nobody else does
// traffic    every visible key and value row once per tile of ROWS query rows
#include "attention_constants.cuh"

#if CA_TENSOR_CORES
#include "paged_decode_mma.cuh"

CA_KERNEL __launch_bounds__(32 * WARPS, 2) void paged_decode_mma(const __grid_constant__ AttentionArgs args) {
  decode_on_tensor_cores(args);
}

#else
#include "attention_cores.cuh"

// The second bound keeps ptxas from spilling a few bytes for one more resident block.
CA_KERNEL __launch_bounds__(128, ROWS > 4 ? 2 : 3) void paged_decode(const __grid_constant__ AttentionArgs args) {
  attend_on_cores(args);
}

#endif  // CA_TENSOR_CORES
