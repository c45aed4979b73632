# SPDX-License-Identifier: Apache-2.0
"""Which attention kernel a call takes: tensor cores or CUDA cores, rows of a tile, blocks, and the Plan of a launch."""

import functools
import itertools
from typing import NamedTuple

import numpy as np

from ..kv.quantized import FORMATS
from ..runtime import Plan, Specialisation
from ..runtime.plan import CUDA_TYPES

CORES_ROWS = (1, 2, 4, 8)        # query rows of a unit on CUDA cores
CPU_PREFILL_ROWS = 16            # of a prefill unit on the CPU: one AVX-512 register
MMA_HEAD_DIMS = (64, 128, 256)   # what tensor cores pad head dims to
_BITS = {kind.tag.partition("<")[0]: kind.bits for kind in FORMATS.values()}   # of an element in a format


class Facts(NamedTuple):
    """What the choice of a kernel depends on, and its Plan."""

    q: str             # dtype name
    k: str             # format tags
    v: str
    align: int         # bytes, common to k, v and out
    num_kv_heads: int
    heads_per_kv: int
    head_dim: int
    head_dim_v: int
    bias: bool         # a mask, a tree mask or ALiBi
    arch: str


class Tiling(NamedTuple):
    """Packed query rows of a unit, and blocks per launch; a sequence with at most decode_rows rows is decoded."""

    decode_rows: int
    prefill_rows: int
    decode_workers: int
    prefill_workers: int


@functools.lru_cache(maxsize=4096)
def version(facts):
    """("mma" or "cores", why): the version of the kernels that fits."""
    if facts.arch == "cpu":
        return "cores", "CUDA cores: an mma costs the executor more than it saves"
    plain = {tag for tag in (facts.k, facts.v) if tag.startswith("KvPlain")}
    if facts.q == "float32" or plain - {f"KvPlain<{CUDA_TYPES[facts.q]}>"}:
        return "cores", f"CUDA cores: q {facts.q}, k {facts.k}, v {facts.v}"
    if facts.align < 16:
        return "cores", f"CUDA cores: alignment {facts.align}"
    if int(facts.arch[3:].rstrip("af")) < 80:
        return "cores", f"CUDA cores: {facts.arch} has no cp.async"
    return "mma", "tensor cores"


def tiling(facts, max_packed, sm_count):
    """Tiling for sequences of at most `max_packed` packed rows on `sm_count` multiprocessors.

    A CPU has none to fill: 16 blocks whatever its number of cores, so that results do not depend on it.
    """
    padded = max(facts.head_dim, facts.head_dim_v)
    if version(facts)[0] == "mma":
        prefill_rows = 64 if max_packed <= 64 or padded > 128 else 128
        return Tiling(16, prefill_rows, 2 * sm_count, _prefill_mma_blocks(facts, prefill_rows) * sm_count)
    decode_rows = next((rows for rows in CORES_ROWS if rows >= min(max_packed, facts.heads_per_kv)), CORES_ROWS[-1])
    if facts.arch == "cpu":
        return Tiling(decode_rows, CPU_PREFILL_ROWS, 16, 16)
    return Tiling(decode_rows, CORES_ROWS[-1], 4 * sm_count, 4 * sm_count)


def legal_rows(facts):
    """(rows of a unit to decode, rows of a unit of prefill, why) that kernels have, for work lists made elsewhere."""
    name, note = version(facts)
    if name == "cores":
        return CORES_ROWS, (*CORES_ROWS, CPU_PREFILL_ROWS), note
    return (16,), (64,) if max(facts.head_dim, facts.head_dim_v) > 128 else (64, 128), note


def sm_count(xp):
    """Multiprocessors of the current device; 1 for NumPy."""
    return 1 if xp is np else _sm_count(xp.cuda.runtime.getDevice())


@functools.lru_cache(maxsize=64)
def _sm_count(device):
    import cupy

    return cupy.cuda.runtime.deviceGetAttribute(cupy.cuda.runtime.cudaDevAttrMultiProcessorCount, device)


# ---- CUDA cores: cuda_src/include/attention_cores.cuh ----------------------------------------------------


def _cores_spec(stem, q, k, v, rows, aligned, bias):
    return Specialisation(stem, stem, "AttentionArgs", {
        "T": q, "KF": k, "VF": v, "ROWS": rows, "ALIGNED": int(aligned), "BIAS": int(bias), "TENSOR_CORES": 0,
        "HEAD_DIM": 0},
        spill_bytes=128 if rows == CPU_PREFILL_ROWS else 0)   # no GPU is given these


def _row_bytes(tag, head_dim):
    """Bytes of `head_dim` elements of a row in the format of `tag`."""
    name = tag.partition("<")[0]
    return head_dim * (4 if tag == "KvPlain<float>" else 2) if name == "KvPlain" else head_dim * _BITS[name] // 8


def _cores_launch(facts, rows):
    """(threads, dynamic shared memory) of a block on CUDA cores: struct Layout of attention_cores.cuh."""
    plain = facts.k.startswith("KvPlain")
    slice_dims = 128 // _row_bytes(facts.k, 8) * 8 if plain else 256
    key_bytes = (-(-_row_bytes(facts.k, min(facts.head_dim, slice_dims)) // 16) | 1) * 16
    groups = 32 // (facts.head_dim_v // 8)
    warp = max(2 * 64 * key_bytes, groups * facts.head_dim_v * rows * 4)   # slices of keys, or outputs
    warp += 3 * 64 * sum(8 if tag.startswith("KvPlain") or "Channel" in tag else 16 for tag in (facts.k, facts.v))
    warp += 64 * (rows if rows <= 4 else rows + 4) * 4 + 2 * rows * 4      # probabilities, state
    block = rows * facts.head_dim * 4 + (32 * rows if facts.bias else 0) + 2 * 4 * rows
    # On the CPU an idle warp costs 32 fibers; on a GPU blocks stay below 48 KiB where they can.
    warps = 1 if facts.arch == "cpu" else max(1, min(4, (48 * 1024 - block) // warp))
    return 32 * warps, warps * warp + block


# ---- tensor cores ----------------------------------------------------------------------------------------


def _mma_spec(stem, q, k, v, rows, head_dim, bias):
    constants = {"T": q, "KF": k, "VF": v, "ROWS": rows, "ALIGNED": 1, "BIAS": int(bias), "TENSOR_CORES": 1,
                 "HEAD_DIM": head_dim}
    # the versions whose registers do not suffice
    spilled = 384 if stem == "paged_decode" and head_dim == 256 and bias and "KvHadamard6" in (k, v) else 0
    if stem == "attention":
        # head_dim 128 on sm_100a: two numbers per row of a tile, once in 128 mma
        plain = head_dim == 128 and k == v and k.startswith("KvPlain") and not bias
        spilled = 64 if plain or bias and "KvHadamard" in k + v else 0
        launch = _prefill_mma_launch(k, v, rows, head_dim, bias)
        constants |= {"THREADS": launch.threads, "SHARED_BYTES": launch.shared_bytes, "MIN_BLOCKS": launch.min_blocks}
    else:
        constants["SHARED_BYTES"] = _decode_mma_launch(k, v, head_dim)[1]
    return Specialisation(stem, f"{stem}_mma", "AttentionArgs", constants, min_sm=80,
                          expects=("HMMA", "LDSM", "LDGSTS"), spill_bytes=spilled)


def _scale_bytes(tag, head_dim):
    """Bytes of a token's scales in shared memory: SCALE_BYTES of KvTile."""
    return 0 if "Plain" in tag or "Channel" in tag else head_dim // 8 if "Hadamard" in tag else 8


def _decode_mma_launch(k, v, head_dim):
    """(threads, dynamic shared memory) of paged_decode_mma.cuh for format tags and a padded head_dim."""
    warps = 2 if head_dim > 128 else 4
    token = _row_bytes(k, head_dim) + _row_bytes(v, head_dim)
    with_scales = token + _scale_bytes(k, head_dim) + _scale_bytes(v, head_dim)
    tile = 32 if head_dim <= 128 and with_scales <= 272 else 16
    stage = tile * with_scales
    beside = (32 * head_dim if head_dim > 128 else 0) + warps * (16 * tile + 128) + 256
    stages = min((99 * 1024 - beside) // (warps * stage), 1 + -(-96 * 1024 // (2 * warps * tile * token)))
    return 32 * warps, warps * stages * stage + beside


class _PrefillMmaLaunch(NamedTuple):
    """What attention_mma.cuh computes too; it does not compile if the two differ."""

    threads: int
    shared_bytes: int   # dynamic ones, of a block
    min_blocks: int     # per multiprocessor that registers are given for


def _prefill_mma_launch(k, v, rows, head_dim, bias):
    """Launch of attention_mma.cuh for format tags and a padded head_dim."""
    token_scales = _scale_bytes(k, head_dim) + _scale_bytes(v, head_dim)
    two_tiles = not bias and (head_dim == 64 or head_dim == 128 and token_scales == 0)
    m_tiles = 2 if rows == 128 and two_tiles else 1
    at_once = 32 if head_dim > 128 or two_tiles and (head_dim == 128 or "Hadamard" in k + v) else 64
    token = _row_bytes(k, head_dim) + _row_bytes(v, head_dim)
    keys = at_once if token > 256 else 64
    ring, queries = 2 * keys * token, 2 * rows * head_dim
    padding = 8 if "Plain" in v else 16 if _row_bytes(v, 64) == 64 else 4
    outputs = 4 * rows * (head_dim + padding)
    held = "Plain" in k and m_tiles * head_dim <= 128   # queries, in registers
    in_ring = held and ring + queries > outputs and queries <= ring // 2
    factors = 0 if "Plain" in k else 8 * rows
    shared = (max(ring + (0 if in_ring else queries), outputs) + 2 * keys * token_scales + 32 * keys + 8 * rows + 64 +
              factors)
    threads = 2 * rows // m_tiles
    roomy = m_tiles == 1 and not bias and head_dim <= 128 and token_scales == 0
    return _PrefillMmaLaunch(threads, shared, 1 if threads > 128 else 3 if roomy else 2)


# KiB of shared memory of a multiprocessor, where it is less than Hopper's; a block takes one more than it asks for
_SHARED_KIB = {"sm_80": 164, "sm_86": 100, "sm_87": 164, "sm_89": 100, "sm_120": 100, "sm_121": 100}


def _prefill_mma_blocks(facts, rows):
    """Blocks of attention_mma.cuh that fill a multiprocessor."""
    launch = _prefill_mma_launch(facts.k, facts.v, rows, _mma_head_dim(facts), facts.bias)
    shared = 1024 * _SHARED_KIB.get(facts.arch.rstrip("af"), 228)
    return min(launch.min_blocks, shared // (launch.shared_bytes + 1024))


def _mma_head_dim(facts):
    """What tensor cores pad both head dims to."""
    return next(d for d in MMA_HEAD_DIMS if d >= max(facts.head_dim, facts.head_dim_v))


# ---- plans -----------------------------------------------------------------------------------------------


def plan_decode(facts, rows, workers):
    """Plan of the decode kernel, ``cuda_src/paged_decode.cu``, for the rows of a unit and the blocks of the launch."""
    return _plan("paged_decode", facts, rows, workers, *version(facts))


def plan_prefill(facts, rows, workers):
    """Plan of the prefill kernel, ``cuda_src/attention.cu``, for the rows of a unit and the blocks of the launch."""
    return _plan("attention", facts, rows, workers, *version(facts))


@functools.lru_cache(maxsize=4096)
def _plan(stem, facts, rows, workers, name, note):
    if name == "mma":
        head_dim = _mma_head_dim(facts)
        spec = _mma_spec(stem, facts.q, facts.k, facts.v, rows, head_dim, facts.bias)
        is_decode = stem == "paged_decode"
        threads, shared = (_decode_mma_launch(facts.k, facts.v, head_dim) if is_decode else
                           _prefill_mma_launch(facts.k, facts.v, rows, head_dim, facts.bias)[:2])
    else:
        spec = _cores_spec(stem, facts.q, facts.k, facts.v, rows, facts.align == 16, facts.bias)
        threads, shared = _cores_launch(facts, rows)
    return Plan(spec, facts.arch, (workers,), (threads,), shared_bytes=shared, note=f"{note}; tiles of {rows} rows")


# ---- specialisations -------------------------------------------------------------------------------------


def _formats(q):
    """Tags of what caches may hold for queries of dtype `q`, other plain dtypes aside."""
    c = CUDA_TYPES[q]
    return (f"KvPlain<{c}>", f"KvInt8<{c}>", f"KvInt4<{c}>", "KvInt8Sym", "KvInt8Channel", "KvE4M3", "KvE5M2",
            "KvHadamard8", "KvHadamard6", "KvHadamard4")


_HALF, _BF16, _FLOAT = (f"KvPlain<{CUDA_TYPES[q]}>" for q in ("float16", "bfloat16", "float32"))
_MIXED = (("float16", _BF16, _BF16), ("bfloat16", _FLOAT, _FLOAT), ("float32", _HALF, _HALF),
          ("float16", "KvHadamard8", "KvHadamard4"), ("float16", "KvInt8<__half>", "KvInt4<__half>"))
_SAME = tuple((q, tag, tag) for q in ("float16", "bfloat16", "float32") for tag in _formats(q))
# (rows, aligned, bias) of the decode kernel
_DECODE = ((1, True, False), (2, True, True), (4, True, False), (8, True, True), (1, False, True), (4, False, False))

# every format on either side, every head dim with both dtypes of q
_DECODE_MMA_CORE = [_mma_spec("paged_decode", q, k, v, 16, head_dim, bias) for q, k, v, head_dim, bias in (
    ("float16", _HALF, _HALF, 128, False), ("bfloat16", _BF16, _BF16, 64, True), ("bfloat16", _BF16, _BF16, 256, False),
    ("float16", "KvInt8<__half>", "KvInt4<__half>", 128, False),
    ("bfloat16", "KvInt4<__nv_bfloat16>", "KvInt8<__nv_bfloat16>", 64, False),
    ("bfloat16", "KvInt8Sym", "KvInt8Channel", 128, True), ("float16", "KvInt8Channel", "KvInt8Sym", 256, False),
    ("float16", "KvE4M3", "KvE5M2", 64, True), ("bfloat16", "KvE5M2", "KvE4M3", 128, False),
    ("float16", "KvHadamard8", "KvHadamard4", 128, True), ("bfloat16", "KvHadamard4", "KvHadamard8", 256, False),
    ("float16", "KvHadamard6", "KvHadamard6", 128, False))]
DECODE_CORE = _DECODE_MMA_CORE + [_cores_spec("paged_decode", *case) for case in (
    ("float16", _HALF, _HALF, 4, True, False), ("bfloat16", _BF16, _BF16, 4, False, True),
    ("float32", _FLOAT, _FLOAT, 4, True, False), ("float16", _BF16, _BF16, 1, False, False),
    ("float32", _HALF, _HALF, 2, True, True), ("float16", "KvInt8<__half>", "KvInt4<__half>", 8, True, True),
    ("bfloat16", "KvInt4<__nv_bfloat16>", "KvInt8<__nv_bfloat16>", 1, True, False),
    ("float32", "KvInt8Sym", "KvInt8Channel", 2, False, False), ("float16", "KvE4M3", "KvE5M2", 4, False, False),
    ("bfloat16", "KvHadamard8", "KvHadamard4", 8, False, False),
    ("float16", "KvHadamard6", "KvHadamard6", 2, True, True),
    ("float32", "KvInt8Channel", "KvE4M3", 8, True, False))]
_PREFILL_MMA_CORE = [_mma_spec("attention", q, k, v, rows, head_dim, bias) for q, k, v, rows, head_dim, bias in (
    ("float16", _HALF, _HALF, 128, 128, False), ("bfloat16", _BF16, _BF16, 128, 64, False),
    ("bfloat16", _BF16, _BF16, 64, 256, True), ("float16", "KvInt8<__half>", "KvInt4<__half>", 128, 64, False),
    ("bfloat16", "KvInt4<__nv_bfloat16>", "KvInt8<__nv_bfloat16>", 64, 128, False),
    ("bfloat16", "KvInt8Sym", "KvInt8Channel", 128, 128, True),
    ("float16", "KvInt8Channel", "KvInt8Sym", 64, 256, False), ("float16", "KvE4M3", "KvE5M2", 64, 64, False),
    ("bfloat16", "KvE5M2", "KvE4M3", 128, 128, False), ("float16", "KvHadamard8", "KvHadamard4", 128, 64, True),
    ("bfloat16", "KvHadamard4", "KvHadamard8", 64, 256, False),
    ("float16", "KvHadamard6", "KvHadamard6", 64, 128, False))]

PREFILL_CORE = _PREFILL_MMA_CORE + [_cores_spec("attention", *case) for case in (
    ("float16", _HALF, _HALF, 16, True, False), ("bfloat16", _BF16, _BF16, 16, True, True),
    ("float32", _FLOAT, _FLOAT, 16, True, False), ("float32", _FLOAT, _FLOAT, 8, False, True),
    ("float16", "KvInt8<__half>", "KvInt8<__half>", 16, True, False),
    ("bfloat16", "KvInt8Sym", "KvE4M3", 8, False, False), ("float32", "KvHadamard4", "KvHadamard8", 16, True, True),
    ("float16", "KvInt8Channel", "KvInt4<__half>", 8, False, True))]


def decode_specs():
    """What the full compile tests build beside DECODE_CORE."""
    for kinds, head_dim, bias in itertools.product(_SAME, MMA_HEAD_DIMS, (False, True)):
        if kinds[0] != "float32":
            yield _mma_spec("paged_decode", *kinds, 16, head_dim, bias)
    for kinds, case in itertools.product(_SAME + _MIXED, _DECODE):
        yield _cores_spec("paged_decode", *kinds, *case)


def prefill_specs():
    """What the full compile tests build beside PREFILL_CORE."""
    for kinds, head_dim, rows, bias in itertools.product(_SAME, MMA_HEAD_DIMS, (64, 128), (False, True)):
        if kinds[0] != "float32" and (rows == 64 or head_dim <= 128):
            yield _mma_spec("attention", *kinds, rows, head_dim, bias)
    for kinds, rows, aligned, bias in itertools.product(_SAME + _MIXED, (8, CPU_PREFILL_ROWS), (True, False),
                                                        (False, True)):
        yield _cores_spec("attention", *kinds, rows, aligned, bias)
