# SPDX-License-Identifier: Apache-2.0
"""Each warp-level wrapper against a NumPy model of the PTX manual's layouts.

On NumPy every kernel runs fused, instruction by instruction, and in the checking mode under two schedules; on a GPU
the same bodies compare the hardware with the models, and so with the executor.

Then what the compiler makes of quant_gemm's main loops for sm_90a: instructions per weight, bytes on their way.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import nvrtc
import pytest
from compare import assert_close, assert_same_bits, dtype_of

from cupyattn.attn import plans as attention_plans
from cupyattn.matmul import plans as matmul_plans
from cupyattn.ops import (
    attention,
    causal_conv1d,
    dequantize,
    embedding,
    kv_append,
    kv_flatten,
    layer_norm,
    lightning_attention,
    page_move,
    paged_decode,
    rms_norm,
    rope,
    selective_state_update,
    silu_mul,
    split_reduce,
)
from cupyattn.quant.layout import Form
from cupyattn.runtime import Plan, Specialisation, arch_of, cuda, launch, make_args
from cupyattn.runtime.cpu import counters, settings

SOURCE = str(Path(__file__).parent / "kernels" / "instructions.cu")
LANE = np.arange(32)
MODES = [dict(fused=True), dict(fused=False), dict(check=True, schedule="reverse"),
         dict(check=True, schedule="random", seed=4)]


def _launch(xp, kernel, x, results, threads, dtype):
    sm_80 = kernel in ("integer_reductions", "mma_16", "mma_s8")
    spec = Specialisation(SOURCE, kernel, "InstructionsArgs", {"T": dtype, "SM_80": int(sm_80)},
                          min_sm=80 if sm_80 else 75)
    plan = Plan(spec, arch_of(xp.module), (1,), (threads,), shared_bytes=64 * threads)
    out = xp.array(np.full((results, threads), 0x7F7F7F7F, np.uint32))
    launch(plan, make_args(plan, x=xp.array(x), out=out))
    return xp.numpy(out)


def _run(xp, kernel, x, results, threads=32, dtype="float16", modes=MODES):
    """uint32 [results, threads]; on NumPy in all modes, which must agree bit for bit."""
    if xp.name != "numpy":
        return _launch(xp, kernel, x, results, threads, dtype)
    outs = []
    for mode in modes:
        with settings(**mode):
            outs.append(_launch(xp, kernel, x, results, threads, dtype))
    for out in outs[1:]:
        assert_same_bits(out, outs[0])
    return outs[0]


def test_shuffles(xp):
    x = np.random.default_rng(1).integers(0, 1 << 30, 32, dtype=np.uint32)
    got = _run(xp, "shuffles", x, 16)

    def up_to(width, source, allowed):
        """A lane whose source is not allowed keeps its own value."""
        return np.where(allowed, x[np.clip(source, 0, 31)], x)

    first, first16, first8 = 0 * LANE, LANE // 16 * 16, LANE // 8 * 8
    want = [x[(7 * LANE + 3) % 32], x[first8 + (7 * LANE + 3) % 8], *(x[LANE ^ d] for d in (1, 2, 4, 8, 16)),
            x[LANE ^ 5], up_to(8, LANE ^ 12, (LANE ^ 12) < first8 + 8), up_to(32, LANE - 3, LANE - 3 >= first),
            up_to(16, LANE - 3, LANE - 3 >= first16), up_to(32, LANE + 5, LANE + 5 < 32),
            up_to(8, LANE + 5, LANE + 5 < first8 + 8), (LANE ^ 9).astype(np.uint32), x[LANE ^ 9], x[LANE ^ 1]]
    for k, row in enumerate(want):
        np.testing.assert_array_equal(got[k], row, f"result {k}")


def test_votes(xp):
    x = np.random.default_rng(2).integers(1, 60, 32, dtype=np.uint32)
    x[13] = 77
    got = _run(xp, "votes", x, 6)

    def ballot(p, lanes=LANE):
        return sum(1 << int(lane) for lane in lanes if p[lane])

    low, high = ballot(x & 2, LANE[:16]), ballot(x & 8, LANE[16:])
    for k, want in enumerate([ballot(x & 4), 1, 0, 1, 0, np.where(LANE < 16, low, high)]):
        np.testing.assert_array_equal(got[k], np.broadcast_to(want, 32), f"result {k}")


def test_integer_reductions(xp):
    x = np.random.default_rng(10).integers(0, 1 << 32, 32, dtype=np.uint32)
    got = _run(xp, "integer_reductions", x, 9)
    signed = x.view(np.int32)
    part = np.where(LANE % 4 == 1, x[1::4].sum(dtype=np.uint32), x[LANE % 4 != 1].sum(dtype=np.uint32))
    want = [x.sum(dtype=np.uint32), x.min(), x.max(), np.bitwise_and.reduce(x | 12),
            np.bitwise_or.reduce(x & 0xFF00FF), np.bitwise_xor.reduce(x), signed.min(), signed.max()]
    for k, value in enumerate(want):
        np.testing.assert_array_equal(got[k], np.full(32, value).astype(np.uint32), f"result {k}")
    np.testing.assert_array_equal(got[8], part)


def _butterfly(x, width, op):
    x, distance = x.copy(), width // 2
    while distance:
        x, distance = op(x, x[LANE ^ distance]), distance // 2
    return x


def test_reductions_have_the_butterflys_bits(xp):
    x = np.random.default_rng(3).standard_normal((32, 5)).astype(np.float32)
    x[:, 1] *= 10.0 ** np.arange(-16, 16)
    x[7, 3], x[20, 4] = np.inf, -np.inf
    got = _run(xp, "reductions", x, 19).view(np.float32)
    tops = [_butterfly(x[:, i], 32, np.maximum) for i in range(5)]
    sums = [_butterfly(x[:, i], 32, np.add) for i in range(5)]
    want = [sums[0], tops[1], _butterfly(x[:, 2], 8, np.add), _butterfly(x[:, 3], 4, np.maximum), *sums, *tops,
            *(_butterfly(x[:, i], 4, np.add) for i in range(3)),
            *(_butterfly(x[:, i], 16, np.maximum) for i in (3, 4))]
    for k, row in enumerate(want):
        np.testing.assert_array_equal(got[k], row, f"result {k}")


@pytest.mark.parametrize("threads", [32, 128, 1024])
def test_block_sum(xp, threads):
    x = np.random.default_rng(4).standard_normal(threads).astype(np.float32)
    for same_build in MODES[:2], MODES[2:]:        # a compiler may order the sum over warps as it likes
        got = _run(xp, "block_sums", x, 1, threads, modes=same_build).view(np.float32)[0]
        assert (got == got[0]).all()
        assert_close(got[0], x.astype(np.float64).sum(), atol=2.0**-22 * np.abs(x).sum(), rtol=0)


def _registers(matrix):
    """What the lanes hold of an 8x8 matrix of 16-bit elements: two neighbours of a row, the first one low."""
    pairs = matrix[LANE // 4, 2 * (LANE % 4)].astype(np.uint32)
    return pairs | matrix[LANE // 4, 2 * (LANE % 4) + 1].astype(np.uint32) << 16


def test_ldmatrix_and_movmatrix(xp):
    x = np.random.default_rng(5).permutation(256).astype(np.uint16).reshape(32, 8)
    got = _run(xp, "matrices", x, 15)
    m = x[5 * LANE % 32].reshape(4, 8, 8)
    plain, trans = [_registers(i) for i in m], [_registers(i.T) for i in m]
    want = [plain[0], trans[0], *plain[:2], *trans[:2], *plain, trans[2], *trans]
    for k, row in enumerate(want):
        np.testing.assert_array_equal(got[k], row, f"result {k}")


def _fragments(a, b, d):
    """Registers [32, 10] of the lanes for A [16, K], B [K, 8] and D [16, 8]; K elements fill 8 words."""
    words_a = np.ascontiguousarray(a).view(np.uint32)            # [16, 8]
    words_b = np.ascontiguousarray(b.T).view(np.uint32)          # [8, 8]
    words_d = np.ascontiguousarray(d).view(np.uint32)            # [16, 8]
    g, t = LANE // 4, LANE % 4
    columns = [words_a[g, t], words_a[g + 8, t], words_a[g, t + 4], words_a[g + 8, t + 4], words_b[g, t],
               words_b[g, t + 4], words_d[g, 2 * t], words_d[g, 2 * t + 1], words_d[g + 8, 2 * t],
               words_d[g + 8, 2 * t + 1]]
    return np.stack(columns, 1)


def _tile(results, dtype):
    """D [16, 8] from four result rows."""
    g, t = LANE // 4, LANE % 4
    d = np.empty((16, 8), dtype)
    for i, (row, column) in enumerate([(g, 2 * t), (g, 2 * t + 1), (g + 8, 2 * t), (g + 8, 2 * t + 1)]):
        d[row, column] = results[i].view(dtype)
    return d


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mma_m16n8k16(xp, dtype):
    rng, kind = np.random.default_rng(6), dtype_of(dtype)
    a, b = rng.standard_normal((16, 16)).astype(kind), rng.standard_normal((16, 8)).astype(kind)
    d = rng.standard_normal((16, 8)).astype(np.float32)
    got = _tile(_run(xp, "mma_16", _fragments(a, b, d), 4, dtype=dtype), np.float32)
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    # sixteen additions in float32, on a GPU truncated ones, of terms this large altogether
    bound = (np.abs(wide_a) @ np.abs(wide_b) + np.abs(d)).max()
    assert_close(got, wide_a @ wide_b + d, atol=2.0**-20 * bound, rtol=0)

    a, b = rng.integers(-8, 9, (16, 16)).astype(kind), rng.integers(-8, 9, (16, 8)).astype(kind)
    d = rng.integers(-99, 99, (16, 8)).astype(np.float32)
    got = _tile(_run(xp, "mma_16", _fragments(a, b, d), 4, dtype=dtype), np.float32)
    np.testing.assert_array_equal(got, a.astype(np.float32) @ b.astype(np.float32) + d)


def test_mma_keeps_small_and_large_halves(xp):
    a, b, d = np.zeros((16, 16), np.float16), np.eye(16, 8, dtype=np.float16), np.zeros((16, 8), np.float32)
    a[:, :8] = np.array([6e-8, -6e-8, 65504, -65504, 6.1e-5, np.inf, -np.inf, 1.0], np.float16)
    a[3, 2] = np.nan
    b[5:7] = 0                            # infinity times nothing is NaN in every column of its row
    a[8:, 5:7] = 0
    got = _tile(_run(xp, "mma_16", _fragments(a, b, d), 4), np.float32)
    with np.errstate(invalid="ignore"):
        assert_close(got, a.astype(np.float64) @ b.astype(np.float64), 0, 0)


def test_mma_m16n8k32_s8(xp):
    rng = np.random.default_rng(7)
    a, b = (rng.integers(-128, 128, shape, dtype=np.int8) for shape in ((16, 32), (32, 8)))
    a[2], b[:, 5] = -128, -128
    d = rng.integers(-1 << 20, 1 << 20, (16, 8), dtype=np.int32)
    d[2, 5] = (1 << 31) - 5               # wraps
    got = _tile(_run(xp, "mma_s8", _fragments(a, b, d), 4), np.int32)
    want = (a.astype(np.int64) @ b.astype(np.int64) + d).astype(np.int32)
    np.testing.assert_array_equal(got, want)


def test_async_copies(xp):
    threads = 64
    x = np.random.default_rng(8).integers(0, 1 << 32, (4, threads, 4), dtype=np.uint32)
    got = _run(xp, "async_copies", x, 8, threads)
    i, other = np.arange(threads), np.arange(threads) ^ 33
    x[3, i % 2 == 1, 2] = 0
    for group in range(3):
        x[group, (i + group) % 3 == 0] = 0
    want = [x[0, other, 0], x[0, other, 3], x[1, other, 1], x[2, other, 2], *(x[3, other, w] for w in range(4))]
    for k, row in enumerate(want):
        np.testing.assert_array_equal(got[k], row, f"result {k}")


def test_named_barriers(xp):
    x = np.random.default_rng(9).integers(0, 1 << 32, (4, 64), dtype=np.uint32)
    got = _run(xp, "named_barriers", x, 4, 128)
    assert not got[:, :64].any()
    for k in range(4):
        np.testing.assert_array_equal(got[k, 64:], x[k, (np.arange(64) + 7 * k) % 64], f"round {k}")


def test_tensor_core_instructions_are_counted():
    from conftest import NumpyArrays

    with settings(check=True), counters() as launches:
        _launch(NumpyArrays(), "mma_16", np.zeros((32, 10), np.uint32), 4, 32, "float16")
        _launch(NumpyArrays(), "matrices", np.zeros((32, 8), np.uint16), 15, 32, "float16")
    assert launches[0].counts["mma"] == 1 and launches[1].counts["ldmatrix"] == 6


PLAIN = {"KvPlain<__half>", "KvPlain<__nv_bfloat16>", "KvPlain<float>"}


def _accesses(spec):
    """Counter of {"STG.E.128": n, "LDG.E": n, ...} in the SASS for sm_90a, of accesses to global or unknown memory."""
    compiled = nvrtc.compile_code(cuda.code(spec), cuda.options(spec, "sm_90a"), "sm_90a")
    names = (nvrtc.mnemonic(line) for line in nvrtc.instructions(compiled.cubin, spec.kernel))
    return Counter(name for name in names if name.split(".")[0] in ("LDG", "LD", "STG", "ST"))


def _is_wide(spec):
    constants = dict(spec.constants)
    if constants.get("WIDE") == 1:
        return {constants["K"], constants["V"]} <= PLAIN
    return constants.get("VEC", 1) > 1 or constants.get("ALIGNED") == 1


@pytest.mark.parametrize("spec", [
    s for module in (rope, kv_append, rms_norm, layer_norm, silu_mul, kv_flatten, page_move) for s in module.CORE
    if _is_wide(s)], ids=str)
def test_wide_rows_are_stored_whole(spec):
    """The compiler would make a 2-byte store of each of the eight, or ask where the cache's pages are."""
    found = _accesses(spec)
    stores = {name for name in found if name.startswith("ST")}
    assert stores and stores <= {"STG.E.128", "STG.E.64"}, found
    assert spec.kernel != "kv_append" or not any(name.startswith("LD.") for name in found), found


# stores of 2 bytes that are meant: single results of a lane, NaN, zeros, columns in another order
@pytest.mark.parametrize("module, allowed", [
    (attention, {}), (paged_decode, {}), (split_reduce, {}), (causal_conv1d, {}), (selective_state_update, 8),
    (dequantize, 32), (embedding, 33),
    (lightning_attention, {"lightning_attention": 3, "lightning_attention_prefill": 1, "lightning_attention_mma": 1})],
    ids=lambda value: value.__name__.rpartition(".")[2] if hasattr(value, "__name__") else "")
def test_vectors_are_not_stored_by_element(module, allowed):
    by_kernel = {}
    for spec in module.CORE:
        constants = dict(spec.constants)
        if _is_wide(spec) and constants.get("CHANNEL_VECTORS") != 0:
            by_kernel.setdefault(spec.kernel, []).append(spec)
    for kernel, specs in by_kernel.items():
        most = allowed if isinstance(allowed, int) else allowed.get(kernel, 0)
        for spec in specs[:3]:
            found = _accesses(spec)
            assert sum(n for name, n in found.items() if name in ("STG.E.U16", "ST.E.U16")) <= most, (spec, found)


# instructions of paged_decode_mma per token and KV head: what was reached, rounded up
@pytest.mark.parametrize("tag, head_dim, allowed", [
    ("KvPlain<__half>", 128, 22), ("KvInt8<__half>", 128, 26), ("KvInt8Sym", 128, 27), ("KvE4M3", 128, 22),
    ("KvInt4<__half>", 128, 26), ("KvHadamard4", 128, 29), ("KvPlain<__half>", 64, 12)])
def test_decode_takes_few_instructions_per_token(tag, head_dim, allowed):
    spec = attention_plans._mma_spec("paged_decode", "float16", tag, tag, 16, head_dim, False)
    compiled = nvrtc.compile_code(cuda.code(spec), cuda.options(spec, "sm_90a"), "sm_90a")
    found = nvrtc.loop_instructions(compiled.cubin, spec.kernel, "HMMA")
    tokens = 16 * sum("HMMA" in text for text in found) / (head_dim // 4)   # 16 take that many products, K's and V's
    assert tokens == (16 if tag.startswith("KvPlain") and head_dim == 128 else 32)
    assert len(found) <= allowed * tokens, f"{len(found)} instructions for {tokens:g} tokens"
    copies = sum("LDGSTS" in text for text in found)
    waits = sum("@!PT LDS RZ" in text for text in found)   # ahead of a copy that follows a load from shared memory
    assert copies * 512 >= tokens * attention_plans._row_bytes(tag, head_dim) * 2 and waits <= copies


# ---- instructions of quant_gemm's main loops -----------------------------------------------------------------

def _stream(form, x, unit, out):
    """(SASS of the loop over columns, instructions per weight of a lane, resources) for up to 8 tokens."""
    row_tiles, warps, stages, _ = matmul_plans.shape_of(form, 8)
    spec = matmul_plans.mma_spec(form, x, out, "float32", 8, unit, row_tiles, warps, stages)
    compiled = nvrtc.compile_code(cuda.code(spec), cuda.options(spec, "sm_90a"), "sm_90a")
    loop = next(body for body in nvrtc.loops(compiled.cubin, spec.kernel) if any("HMMA" in line for line in body))
    tiles = 2 if form.groups == 1 else 1
    return loop, len(loop) / (32 * tiles * row_tiles), nvrtc.resources(compiled, spec.kernel)


# per weight: what was reached, rounded up
@pytest.mark.parametrize("name, form, unit, x, allowed", [
    ("int4", Form(4, "int", 8, "float16"), 2, "float16", 1.8),
    ("int4 by 32", Form(4, "int", 8, "float16", "PLAIN", 2), 1, "float16", 2.1),
    ("int4 zero", Form(4, "int", 8, "float16", "ZERO"), 2, "float16", 1.95),
    ("int4 zero", Form(4, "int", 8, "float16", "ZERO"), 2, "bfloat16", 1.85),
    ("int8", Form(8, "int", 128, "float16"), 2, "float16", 1.95),
    ("int2 zero", Form(2, "int", 2, "float16", "ZERO"), 2, "float16", 1.9),
    ("Q4_K", Form(4, "int", 0, "int8", "MINIMUM", 2, "float16"), 1, "float16", 2.75),
    ("Q4_K", Form(4, "int", 0, "int8", "MINIMUM", 2, "float16"), 1, "bfloat16", 2.8),
    ("Q6_K", Form(6, "int", 32, "int8", "PLAIN", 4, "float16"), 1, "float16", 3.75),
    ("IQ4_XS", Form(4, "iq4", 0, "int8", "PLAIN", 2, "float16"), 1, "float16", 3.85),
    ("MXFP4", Form(4, "e2m1", 0, "float8_e8m0fnu", "PLAIN", 2), 1, "float16", 2.75),
    ("MXFP4", Form(4, "e2m1", 0, "float8_e8m0fnu", "PLAIN", 2), 1, "bfloat16", 3.4),
    ("NVFP4", Form(4, "e2m1", 0, "float8_e4m3fn", "PLAIN", 4, "float32"), 1, "float16", 3.3),
    ("NF4", Form(4, "nf4", 0, "float32"), 1, "float16", 3.9),
    ("FP4", Form(4, "fp4", 0, "float32"), 1, "float16", 2.4),
    ("fp8", Form(8, "e4m3", 0, "float32"), 2, "float16", 1.4),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_stream_spends_few_instructions_on_a_weight(name, form, unit, x, allowed):
    loop, per_weight, resources = _stream(form, x, unit, x)
    assert per_weight <= allowed
    names = [nvrtc.mnemonic(line) for line in loop]
    copies = [name for name in names if name.startswith("LDGSTS")]
    assert copies and all(name.endswith(".128") for name in copies)
    assert not any(name.startswith(("LDG.", "LDL", "STL", "BAR")) for name in names)
    assert resources.spill_bytes == 0 and resources.registers <= 128    # two blocks of 256 threads


@pytest.mark.parametrize("form", [
    *(Form(bits, "int", scale="float16") for bits in (2, 3, 4, 5, 6, 8)), Form(16, "float16"),
    Form(2, "int", 0, "int8", "MINIMUM", 4, "float16"), Form(4, "int", 0, "int8", "MINIMUM", 2, "float16"),
    Form(5, "int", 0, "int8", "MINIMUM", 2, "float16"), Form(6, "int", 32, "int8", "PLAIN", 4, "float16"),
    Form(4, "e2m1", 0, "float8_e4m3fn", "PLAIN", 4, "float32")], ids=lambda form: form.trait)
def test_a_stream_keeps_48_KiB_on_their_way(form):
    row_tiles, warps, stages, shared = matmul_plans.shape_of(form, 8)
    assert 2 * warps * (stages - 1) * row_tiles * form.tile_bytes >= 48 * 1024
    assert 2 * (shared + 1024) <= 228 * 1024
