# SPDX-License-Identifier: Apache-2.0
"""Bugs that ExLlamaV2 and its relatives have had: where each would be seen here, and tests of those seen nowhere else.

Numbers are those of reports in the trackers of exllama, exllamav2 (v2) and exllamav3 (v3).
"""

import ast
from pathlib import Path

import numpy as np
import pytest
from attention_layers import Layer, contiguous
from compare import assert_same_bits
from conftest import NumpyArrays

from cupyattn import InProcessCommunicator, PagedCache, PagedParams, Params, QAttn, TPAttn, TPContext
from cupyattn.graphs import capture

HERE = "test_known_bugs"
SEEN = {   # bug: (module, test), ...
    "the same prompt gives other text elsewhere in a batch or the next time; atomics (v2 232, exllama 153)": [
        ("test_q_attn", "test_the_same_prompt_everywhere_in_a_batch"),
        ("test_paged_decode", "test_a_sequence_does_not_see_its_batch"),
        ("test_quant_gemm", "test_a_row_has_the_same_bits_whatever_stands_around_it"),
        ("test_quant_gemm_families", "test_the_same_bits_a_hundred_times")],
    "q . k in float16 overflows; Qwen2 is garbage (v2 493)": [
        ("test_q_attn", "test_scores_past_float16"), ("test_paged_decode", "test_huge_scores"),
        ("test_attention", "test_huge_scores"), ("test_paged_decode", "test_tensor_cores_huge_scores")],
    "keys with large channels in a 4-bit cache (v2 493, v2 621, v3 1)": [(HERE, "test_keys_of_more_bits_than_values")],
    "short prompts of a left-padded batch suffer (v2 200, v2 606)": [
        ("test_q_attn", "test_left_padding_equals_single_runs")],
    "tensor parallel without flash-attn crashes (v2 598)": [
        ("test_tp_attn", "test_ranks_in_one_process"), ("test_tp_attn_functions", "test_what_one_rank_gives")],
    "tensor parallel ignores norms of heads; odd numbers of GPUs (v3 141, v3 130)": [
        ("test_tp_attn", "test_uneven_heads"), ("test_tp_attn_functions", "test_every_keyword"),
        ("test_tp_attn", "test_ranks_over_mpi"), (HERE, "test_a_norm_over_all_heads_is_refused")],
    "near the end of the cache; drafts beyond it; 257 pages needed, 256 available (v2 105, v2 274, v3 145)": [
        ("test_q_attn", "test_the_last_token_fits_and_no_other"), (HERE, "test_drafts_past_the_end"),
        ("test_params", "test_a_short_table_says_what_is_missing"),
        ("test_pages", "test_capacity"), ("test_page_sequences", "test_shortage_names_the_numbers"),
        ("test_page_sequences", "test_drafts_are_taken_back")],
    "paged attention needs an Ampere GPU (v2 364, v3 44, v3 81, v3 162)": [(HERE, "test_kernels_for_turing")],
    "Gemma's four norms, softcap and alternating window (v2 539, v2 749)": [("test_q_attn", "test_gemma")],
    "AWQ weights (v2 63, v2 193)": [("test_formats_integer", "test_awq"), ("test_hugging_face", "test_every_format")],
    "weights have no stable form on disk (v3 5)": [("test_safetensors", "test_save_and_load")],
    "LoRA of the head and the embedding (v2 271)": [("test_lora", "test_modules_beside_attention")],
    "two pages with the same hash": [
        ("test_page_sequences", "test_a_page_that_becomes_full_gives_way_to_one_with_the_same")],
    "partial reuse of a page leaves out the draft model's cache": [
        ("test_paged_cache", "test_other_caches_of_the_same_pages")],
    "prefixes found in the wrong pages": [
        ("test_page_sequences", "test_a_beginning_is_found_page_by_page_and_the_rest_of_it_in_part"),
        ("test_paged_cache", "test_shared_pages_hold_what_separate_ones_would"),
        ("test_llama", "test_sharing_prefixes_changes_no_bit")],
    "shape of unpaged keys and values of a batch": [(HERE, "test_halves_of_a_batch")],
    "scratch too small where heads are wider than the hidden state": [
        ("test_q_attn", "test_wide_attention_outgrows_no_scratch")],
    "broadcast buffers of tensor parallel that a rank still reads": [
        ("test_tp_attn_functions_refused", "test_refused"), ("test_communicators", "test_memory_of_two_ranks"),
        ("test_tp_attn_functions", "test_threads_with_adapters_of_their_own")],
    "a graph goes on with the norm and the tables of its capture": [
        (HERE, "test_a_replay_sees_other_norms"), ("test_q_attn_steps", "test_replays_see_what_changes")],
    "float32 residual over pages": [("test_q_attn", "test_float32_residual_over_pages")],
    "defragmentation of a quantized cache": [
        ("test_paged_cache", "test_defragmentation_keeps_every_bit_of_attention"),
        ("test_page_move", "test_attention_gives_the_same_bits")],
    "a causal prefill without a fused kernel sees the future and no mask": [
        ("test_q_attn", "test_masks"), ("test_q_attn", "test_switches"),
        (HERE, "test_a_prefill_does_not_see_its_future")],
}


@pytest.mark.parametrize("bug", SEEN)
def test_is_there(bug):
    for module, test in SEEN[bug]:
        tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text())
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{module}.{test}"


def test_keys_of_more_bits_than_values():
    """A channel of the keys is far larger than the others, as a bias makes it in Qwen: 8 bits for keys suffice, 4 do
    not, whatever values have."""
    layer = Layer(NumpyArrays(), dtype="float16", biases=True, rope_style="none")
    layer.vectors["k_bias"][5] = layer.vectors["k_bias"][40] = 30
    attn = QAttn(**{f"q_{n}_proj": m for n, m in layer.matrices.items()}, hidden_size=64, num_heads=4, num_kv_heads=2,
                 head_dim=32, rope_style="none", **layer.vectors)
    x, found = layer.inputs(1, 24), {}
    for formats in ((None, None), ("int8", "int4"), ("hadamard8", "hadamard4"), ("int4", "int8"), ("int4", "int4")):
        got = x.copy()
        cache = contiguous(layer, 1, k_format=formats[0], v_format=formats[1])
        attn.forward(got, Params(1, 24, 0), cache)
        found[formats] = got.astype(np.float64)
    plain = found.pop((None, None))
    errors = {formats: np.sqrt(((y - plain)**2).mean()) for formats, y in found.items()}
    assert errors["hadamard8", "hadamard4"] < 0.2 and errors["int8", "int4"] < 0.2, errors
    assert errors["int4", "int8"] > 1.5 * errors["int8", "int4"], errors


def test_a_norm_over_all_heads_is_refused():
    """One gain for all heads together is another norm than one of each head."""
    layer = Layer(NumpyArrays(), dtype="float16")
    arguments = {f"q_{n}_proj": m for n, m in layer.matrices.items()}
    sizes = {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
    context = TPContext(InProcessCommunicator(2), **{n: sizes[n] for n in ("num_heads", "num_kv_heads", "head_dim",
                                                                           "hidden_size")})
    for name, heads in (("q_norm", 4), ("k_norm", 2)):
        gain = {name: np.ones(32 * heads, np.float32)}
        with pytest.raises(ValueError, match=rf"QAttn: {name} must be \[32\] or \[{heads}, 32\], got \[{32 * heads}\]"):
            QAttn(**arguments, **sizes, **gain)
        with pytest.raises(ValueError, match=rf"QAttn: {name} must be \[32\] or \[{heads // 2}, 32\], got"):
            TPAttn.from_layer(context, **arguments, **gain)


def test_drafts_past_the_end():
    """A draft that fills the cache to its last token is a step like others; one more is refused, nothing is written."""
    layer = Layer(NumpyArrays())
    table = np.int32([[2, 0]])
    paged, whole = PagedCache(1, 3, 8, 2, 32, dtype="float32"), contiguous(layer, 1, max_seq_len=16)
    x, draft = layer.inputs(1, 12), layer.inputs(1, 4)
    _, keys, values = layer.expected(x, layer.no_past(1), layer.no_past(1))
    want, _, _ = layer.expected(draft, keys, values)
    for cache, params in ((paged, lambda past, q_len: PagedParams(1, table, [past], past, 8, q_len)),
                          (whole, lambda past, q_len: Params(1, q_len, past))):
        layer.attn.forward(x.copy(), params(0, 12), cache, **layer.tables)
        got = draft.copy()
        layer.attn.forward(got, params(12, 4), cache, **layer.tables)
        layer.check(got, want)
        before = [pool.copy() for pool in (*cache.k, *cache.v)]
        with pytest.raises(ValueError, match="must have 3 pages of 8 for 17 tokens|at most the 16 tokens of the cache, "
                                             r"got 17 \(past_len"):
            layer.attn.forward(layer.inputs(1, 4), params(13, 4), cache, **layer.tables)
        for pool, kept in zip((*cache.k, *cache.v), before, strict=True):
            assert_same_bits(pool, kept)


def test_kernels_for_turing():
    """All that a layer launches has a version for sm_75, which test_compile compiles."""
    from cupyattn.ops import attention, kv_append, paged_decode, quant_gemm, rms_norm, schedule, split_reduce

    for op in (attention, kv_append, paged_decode, quant_gemm, rms_norm, schedule, split_reduce):
        assert any(spec.min_sm <= 75 for spec in op.CORE), op.__name__


def test_halves_of_a_batch():
    """forward_1 gives keys and values [batch, tokens, heads, head_dim], those of each sequence alone."""
    layer = Layer(NumpyArrays())
    x = layer.inputs(3, 5)
    _, k, v = layer.attn.forward_1(x, 3, 5, 0, [4, 0, 2], **layer.tables)
    assert k.shape == v.shape == (3, 5, 2, 32)
    for b, past in enumerate((4, 0, 2)):
        _, mine, other = layer.attn.forward_1(x[b:b + 1], 1, 5, past, **layer.tables)
        layer.check(k[b], mine[0].astype(np.float64), what="keys")
        layer.check(v[b], other[0].astype(np.float64), what="values")


def test_a_replay_sees_other_norms(xp):
    """Gains that change in place between replays; input and residual are those of the replay."""
    layer = Layer(xp, dtype="float16", post=True, head_norm="heads")
    x, params = xp.array(layer.inputs(2, 3)), Params(2, 3)
    graph = capture(lambda: layer.attn.forward(x, params, **layer.tables), xp=xp.module)
    found = []
    for factor in (1, 2, 0.25):
        for gain in (layer.attn.layernorm, layer.attn.post_layernorm, layer.attn.q_norm, layer.attn.k_norm):
            gain[...] = xp.array(xp.numpy(gain) * np.float32(factor))
        rows = layer.inputs(2, 3)
        x[...] = xp.array(rows)
        graph.replay()
        assert_same_bits(xp.numpy(x), xp.numpy(layer.attn.forward(xp.array(rows), Params(2, 3), **layer.tables)))
        found.append(np.abs(xp.numpy(x).astype(np.float64) - rows).mean())
    assert found[1] > 1.5 * found[0] > 2 * found[2]


@pytest.mark.parametrize("mask", [None, np.ones((1, 6), bool), np.zeros((1, 6), np.float16)])
def test_a_prefill_does_not_see_its_future(mask):
    """With a mask that hides nothing, without one, and with keys past the end of the mask."""
    layer = Layer(NumpyArrays(), dtype="float16")
    x = layer.inputs(1, 9)
    other = x.copy()
    other[:, 5:] = layer.inputs(1, 4)
    found = [layer.attn.forward(rows.copy(), Params(1, 9, 0, mask), contiguous(layer, 1), **layer.tables)
             for rows in (x, other)]
    assert_same_bits(found[0][:, :5], found[1][:, :5])
