// SPDX-License-Identifier: Apache-2.0
// kv_format.cu - every way to read a row of a KV cache, and every form of the Hadamard rotation.
#include "prelude.cuh"
#include "params.h"
#include "hadamard.cuh"
#include "kv_format.cuh"

struct KvFormatArgs {
  const void* row;   // codes of one row, or float32 [rows, stride] to rotate
  float* out;        // float32 [head_dim], or [3, rows, stride] one for each form
  int32_t format;    // index of the tag
  int32_t aligned;   // whether eight<true> may read the row
  int32_t head_dim;  // dims of a row
  int32_t rows;      // rows to rotate
};
static_assert(sizeof(KvFormatArgs) == CA_SIZEOF_ARGS, "kv_format: Python and CUDA disagree on KvFormatArgs");

template <typename F>
__device__ __forceinline__ void read(const KvFormatArgs& args) {
  const auto* row = static_cast<const typename F::Code*>(args.row);
  for (int d = threadIdx.x * 8; d < args.head_dim; d += blockDim.x * 8) {
    const EightFloats x = args.aligned ? F::template eight<true>(row, args.head_dim, d)
                                       : F::template eight<false>(row, args.head_dim, d);
    x.store(args.out + d);
  }
}

CA_KERNEL __launch_bounds__(32) void read_row(const __grid_constant__ KvFormatArgs args) {
  switch (args.format) {
    case 0: return read<KvInt8<__half>>(args);
    case 1: return read<KvInt4<float>>(args);
    case 2: return read<KvInt8Sym>(args);
    case 3: return read<KvInt8Channel>(args);
    case 4: return read<KvE4M3>(args);
    case 5: return read<KvE5M2>(args);
    case 6: return read<KvHadamard8>(args);
    case 7: return read<KvHadamard6>(args);
    case 8: return read<KvHadamard4>(args);
    case 9: return read<KvPlain<__half>>(args);
    case 10: return read<KvPlain<__nv_bfloat16>>(args);
    default: return read<KvPlain<float>>(args);
  }
}

CA_KERNEL __launch_bounds__(32) void rotate(const __grid_constant__ KvFormatArgs args) {
  CA_DYN_SMEM(float, rows);
  const int lane = threadIdx.x, stride = args.head_dim + 4, size = args.rows * stride;
  const float* x = static_cast<const float*>(args.row);
  for (int i = lane; i < size; i += 32) rows[i] = x[i];
  __syncwarp();
  hadamard32_rows(rows, args.rows, stride, args.head_dim, lane);
  __syncwarp();
  for (int i = lane; i < size; i += 32) args.out[i] = rows[i];
  for (int r = 0; r < args.rows; ++r) {
    for (int first = 0; first < args.head_dim; first += 256) {  // 8 numbers per lane
      const int d = first + lane * 8;
      const bool inside = d < args.head_dim;
      EightFloats mine = inside ? EightFloats::load(x + r * stride + d) : EightFloats::all(0.0f);
      hadamard32(mine);
      if (inside) mine.store(args.out + size + r * stride + d);
    }
    for (int d = lane * 32; d < args.head_dim; d += 32 * 32) {  // 32 numbers per lane
      EightFloats mine[4];
      for (int i = 0; i < 4; ++i) mine[i] = EightFloats::load(x + r * stride + d + 8 * i);
      hadamard32(mine);
      for (int i = 0; i < 4; ++i) mine[i].store(args.out + 2 * size + r * stride + d + 8 * i);
    }
  }
}
