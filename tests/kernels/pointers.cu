// SPDX-License-Identifier: Apache-2.0
// pointers.cu - to[b][i] = from[b][i] + 1 for arrays known by their addresses only; block b, thread i.
#include "prelude.cuh"
#include "params.h"

struct PointersArgs {
  const int64_t* from_ptrs;  // uint64 [blocks] addresses of float32 [threads]
  const int64_t* to_ptrs;    // uint64 [blocks] likewise
};
static_assert(sizeof(PointersArgs) == CA_SIZEOF_ARGS, "pointers: Python and CUDA disagree on PointersArgs");

CA_KERNEL void pointers(const __grid_constant__ PointersArgs args) {
  const float* from = reinterpret_cast<const float*>(args.from_ptrs[blockIdx.x]);
  float* to = reinterpret_cast<float*>(args.to_ptrs[blockIdx.x]);
  to[threadIdx.x] = from[threadIdx.x] + 1.0f;
}
