// SPDX-License-Identifier: Apache-2.0
// type_constants.cu - what a constant that is a C++ type turned into.
#include "prelude.cuh"
#include "params.h"

struct TypeConstantsArgs {
  int32_t* out;  // int32 [3]
};
static_assert(sizeof(TypeConstantsArgs) == CA_SIZEOF_ARGS, "type_constants: Python and CUDA disagree on the struct");

namespace formats {
template <typename S, int GROUP = 1>
struct Int8 {
  static constexpr int ID = 8, SIZE = sizeof(S), WIDTH = GROUP;
};
}  // namespace formats
template <typename T>
struct Plain {
  static constexpr int ID = 1, SIZE = sizeof(T), WIDTH = 0;
};

using FORMAT = CA_FORMAT;

CA_KERNEL void type_constants(const __grid_constant__ TypeConstantsArgs args) {
  args.out[0] = FORMAT::ID;
  args.out[1] = FORMAT::SIZE;
  args.out[2] = FORMAT::WIDTH;
}
