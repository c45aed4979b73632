// SPDX-License-Identifier: Apache-2.0
// broken.cu - does not compile: the error message is what the test reads.
#include "prelude.cuh"
#include "params.h"

CA_KERNEL void broken(const __grid_constant__ RmsNormArgs args) { undeclared_name(args.rows); }
