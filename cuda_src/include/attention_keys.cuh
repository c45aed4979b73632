// SPDX-License-Identifier: Apache-2.0
// attention_keys.cuh - the keys and values of a tile: where their rows are, and how keys pass through shared memory.
// Included by attention_cores.cuh, of which it uses TILE.
#ifndef CUPYATTN_ATTENTION_KEYS_CUH
#define CUPYATTN_ATTENTION_KEYS_CUH

#include "cp_async.cuh"
#include "eight_floats.cuh"
#include "kv_format.cuh"
#include "page_table.cuh"

// Dims of a slice of keys: 128 bytes of plain numbers, a whole row of codes.
constexpr int SLICE = KF::HAS_SCALE ? 256 : 128 / static_cast<int>(sizeof(typename KF::Code));

// ---- where the rows of a tile are ----------------------------------------------------------------------

// Of the keys or values of a tile, in shared memory: row pointers, null for keys in no page or out of sight, and the
// rows' scales, or where those of groups of dims start.
template <typename F>
struct Places {
  using Code = typename F::Code;
  using Scale = typename F::Scale;
  static constexpr bool ROW_SCALE = F::HAS_SCALE && F::GROUP == 0, GROUP_SCALE = F::HAS_SCALE && F::GROUP == 32;
  static constexpr int BYTES = (ROW_SCALE || GROUP_SCALE ? 16 : 8) * TILE;
  char* memory;

  __device__ __forceinline__ const Code*& row(int t) const { return reinterpret_cast<const Code**>(memory)[t]; }
  __device__ __forceinline__ RowScale& scale(int t) const { return reinterpret_cast<RowScale*>(memory + 8 * TILE)[t]; }
  __device__ __forceinline__ const Scale*& groups(int t) const {
    return reinterpret_cast<const Scale**>(memory + 8 * TILE)[t];
  }
  __device__ __forceinline__ void look_up(const KvView& view, const KvScale& scales, const PageTable& table,
                                          TokenSlot at, int head, int t) const {
    row(t) = kv_row<const Code>(view, table, at, head);
    if constexpr (ROW_SCALE) scale(t) = at.page < 0 ? RowScale{0.0f, 0.0f} : load_row_scale<F>(scales, table, at, head);
    if constexpr (GROUP_SCALE) groups(t) = at.page < 0 ? nullptr : kv_scale<const Scale>(scales, table, at, head, 0);
  }
  // Dims d to d + 7 of row t, which starts at `from`.
  template <bool IS_ALIGNED>
  __device__ __forceinline__ EightFloats eight(const Code* from, int t, const KvScale& scales, int head_dim,
                                               int d) const {
    EightFloats x = F::template eight<IS_ALIGNED>(from, head_dim, d);
    if constexpr (ROW_SCALE) apply_scale<F>(x, scale(t));
    if constexpr (GROUP_SCALE) apply_scale<F>(x, {to_float(in_global(groups(t))[d / 32 * scales.stride_group]), 0.0f});
    return x;
  }
};

struct TilePlaces {
  static constexpr int BYTES = Places<KF>::BYTES + Places<VF>::BYTES;
  Places<KF> keys;
  Places<VF> values;
  __device__ __forceinline__ explicit TilePlaces(char* memory) : keys{memory}, values{memory + Places<KF>::BYTES} {}
};

// ---- slices of keys ------------------------------------------------------------------------------------

// Dims of up to TILE keys of one warp, SLICE at a time, two slices in turn. A lane that read its own key from global
// memory would leave most of every sector unused, so the warp copies whole rows to shared memory. The fused host body
// has no sectors: keys are read where they are.
struct KeySlices {
  using Code = typename KF::Code;
#if CA_CPU && CA_FUSED
  static constexpr bool READS_ALIGNED = ALIGNED;
#else
  static constexpr bool READS_ALIGNED = true;
#endif
  char* memory;
  int key_bytes;  // of a key in shared memory: an odd number of 16-byte pieces, so lanes reading keys do not conflict

  static __device__ __forceinline__ int bytes_of_key(int head_dim) {
    const int bytes = KF::row_codes(min(head_dim, SLICE)) * static_cast<int>(sizeof(Code));
    return (ceil_div(bytes, 16) | 1) * 16;
  }
  // Starts copying dims from `from` on.
  __device__ __forceinline__ void fetch(const Places<KF>& keys, int head_dim, int from, int turn, int lane) const {
#if !(CA_CPU && CA_FUSED)
    const int codes = KF::row_codes(min(SLICE, head_dim - from));
    char* to = memory + turn * TILE * key_bytes;
    if constexpr (ALIGNED) {
      const int bytes = codes * static_cast<int>(sizeof(Code));
      const int piece = min(bytes & -bytes, 16);  // 16, or 8 or 4 in short rows of codes: 32 pieces at most
      const int pieces = bytes / piece;
      const int at_once = 32 / pieces;
      const int group = lane / pieces;
      const int at = (lane - group * pieces) * piece;
      int first = group < at_once ? group : TILE;
      if (pieces == 2 || pieces == 4) {  // 8 lanes then write 4 or 2 rows: those `pieces` apart lie in different banks
        const int rows = 8 / pieces;
        first = (group & ~7) + group % rows * pieces + (group & 7) / rows;
      }
      for (int t = first; t < TILE; t += at_once) {
        if (keys.row(t) == nullptr) continue;
        const char* row = reinterpret_cast<const char*>(keys.row(t) + from) + at;
        char* copy = to + t * key_bytes + at;
        if (piece == 16) cp_async16(copy, row);
        else if (piece == 8) cp_async8(copy, row);
        else cp_async4(copy, row);
      }
    } else {
      for (int t = 0; t < TILE; ++t) {
        if (keys.row(t) == nullptr) continue;
        for (int i = lane; i < codes; i += 32)
          reinterpret_cast<Code*>(to + t * key_bytes)[i] = keys.row(t)[from + i];
      }
    }
    cp_async_commit();
#endif
  }
  // The slice fetched last is there and that of the other turn no longer in use.
  __device__ __forceinline__ void wait() const {
#if !(CA_CPU && CA_FUSED)
    cp_async_wait<0>();
    __syncwarp();
#endif
  }
  // Row t of the slice of dims from `from` on; the first of those is at 0.
  __device__ __forceinline__ const Code* row(const Places<KF>& keys, int t, int from, int turn) const {
#if CA_CPU && CA_FUSED
    return keys.row(t) + from;
#else
    return reinterpret_cast<const Code*>(memory + (turn * TILE + t) * key_bytes);
#endif
  }
};

#endif  // CUPYATTN_ATTENTION_KEYS_CUH
