// SPDX-License-Identifier: Apache-2.0
// scale.cu - out[i] = factor * x[i], the smallest kernel the runtime's own tests can launch.
#include "prelude.cuh"
#include "params.h"

struct ScaleArgs {
  const float* x;   // float32 [n]
  float* out;       // float32 [n]
  int32_t n;        // elements
  float factor;     // multiplier
};

static_assert(sizeof(ScaleArgs) == CA_SIZEOF_ARGS, "scale: Python and CUDA disagree on ScaleArgs");

CA_KERNEL void scale(const __grid_constant__ ScaleArgs args) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < args.n) args.out[i] = args.factor * args.x[i];
}

// two arguments instead of one struct: the launcher must refuse it
CA_KERNEL void scale_two_arguments(const float* x, int n) {}

// a struct of another size
struct OtherArgs {
  const float* x;  // float32 [n]
};
CA_KERNEL void scale_other_struct(const __grid_constant__ OtherArgs args) {}

// runs for as long as `factor` says, in many short blocks
CA_KERNEL void scale_slowly(const __grid_constant__ ScaleArgs args) {
  float sum = 0.0f;
  for (int i = 0; i < static_cast<int>(args.factor); ++i) {
    sum = sum * 0.5f + args.x[i % args.n];
  }
  args.out[0] = sum;
}
