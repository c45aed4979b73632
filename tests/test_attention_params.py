# SPDX-License-Identifier: Apache-2.0
"""TurboMind's parameters: what they check, where they find keys and values, and the C struct they fill."""

import math
import subprocess

import numpy as np
import nvrtc
import pytest
from conftest import NumpyArrays

from cupyattn import AttentionParams, BlockIteratorParams, LinearIteratorParams, QuantPolicy, RopeParams
from cupyattn import create_cache_iter_factory as cache_iter
from cupyattn.runtime import host_compiler
from cupyattn.runtime.structs import layout
from cupyattn.turbomind.cache_iterators import BlockCacheIter, LinearCacheIter
from cupyattn.turbomind.pod import fast_divmod

rng = np.random.default_rng(45)
HEADS, KV_HEADS, HEAD_DIM, BLOCK = 4, 2, 16, 8


def pool_of(blocks, nbytes):
    return np.zeros((blocks, nbytes), np.uint8)


def make(q_lens=(1, 1, 1), k_lens=(1, 20, 9), xp=None, dtype="float32", **changes):
    """Parameters of a small batch, with fields changed."""
    xp = xp or NumpyArrays()
    cu_q, cu_k = (np.concatenate([[0], np.cumsum(n)]).astype(np.int32) for n in (q_lens, k_lens))
    qkv = rng.standard_normal((cu_q[-1], (HEADS + 2 * KV_HEADS) * HEAD_DIM)).astype(dtype)
    fields = dict(num_heads=HEADS, num_kv_heads=KV_HEADS, cu_q_len=xp.array(cu_q), cu_k_len=xp.array(cu_k))
    if "block_iter_params" not in changes:
        blocks = [-(-n // BLOCK) for n in k_lens]
        table = np.zeros((len(blocks), max(blocks)), np.int32)
        table[np.arange(table.shape[1]) < np.array(blocks)[:, None]] = rng.permutation(20)[:sum(blocks)]
        fields["block_iter_params"] = BlockIteratorParams.from_pool(xp.array(pool_of(20, 1 << 13)), table, blocks,
                                                                    block_len=BLOCK)
    return AttentionParams.from_qkv(xp.array(changes.pop("qkv", qkv)), **fields | changes)


# ---- fields ------------------------------------------------------------------------------------------------


def test_what_follows_from_the_arrays(xp):
    params = make((3, 0, 2), (3, 5, 12), xp)
    assert (params.token_num, params.batch_size, params.max_q_len, params.max_k_len) == (5, 3, 3, 12)
    assert (params.num_heads, params.num_kv_heads, params.size_per_head) == (HEADS, KV_HEADS, HEAD_DIM)
    assert params.stride == (HEADS + 2 * KV_HEADS) * HEAD_DIM
    assert params.inv_sqrt_dh == params.softmax_scale == HEAD_DIM ** -0.5
    assert params.quant_policy is QuantPolicy.NONE and params.xp is xp.module
    assert xp.numpy(params.step.positions).tolist() == [0, 1, 2, 10, 11]
    assert xp.numpy(params.step.sequence).tolist() == [0, 0, 0, 2, 2]
    assert xp.numpy(params.step.cache_seqlens).tolist() == [3, 5, 12]


def test_rows_of_a_later_part_of_the_batch():
    """cu_q_len counts tokens of the whole buffer; the parts of a batch share it."""
    params = make((2, 1, 3), (2, 9, 8))
    tail = params.replace(cu_q_len=params.cu_q_len[1:], cu_k_len=params.cu_k_len[1:], block_iter_params=None)
    assert (tail.token_num, tail.batch_size, tail.rows) == (4, 2, slice(2, 6))
    assert tail.step.cu_seqlens_q.tolist() == [0, 1, 4] and tail.step.positions.tolist() == [8, 5, 6, 7]


def test_tokens_of_finished_sequences_and_other_ranks():
    step = make((2, 1), (5, 3), finished=np.array([False, True])).step
    assert step.positions.tolist() == [3, 4, -1] and step.unfinished_seqlens.tolist() == [5, 0]
    assert make((3, 2), (9, 2), cp_size=2, cp_rank=0).step.local_lens.tolist() == [5, 1]
    assert make((3, 2), (9, 2), cp_size=2, cp_rank=1).step.local_lens.tolist() == [4, 1]
    got = make((3, 2), (9, 2), cp_offsets=np.int32([5, 1]), cp_counts=np.int32([4, 1])).step
    assert got.slots.tolist() == [1, 2, 3, -1, 0] and got.local_lens.tolist() == [4, 1]


def test_replace_keeps_the_lengths():
    params = make(max_split_k=2).with_partials(5)
    assert params.partial_O.shape == (3, HEADS, 5, HEAD_DIM) and params.partial_ML.shape == (3, HEADS, 5, 2)
    assert params.max_split_k == 5 and params.split_cnt.tolist() == [0, 0, 0]
    other = params.replace(block_iter_params=params.block_iter_params.at_layer(1), window_size=7)
    assert other.step is params.step and other.block_iter_params.table is params.block_iter_params.table
    assert other.block_layer.k.offset == params.block_layer.nbytes
    assert params.replace(finished=np.zeros(3, bool)).step is not params.step
    with pytest.raises(ValueError, match="q must have the 3 tokens of cu_q_len, got 2"):
        params.replace(q=params.q[:2], k=params.k[:2], v=params.v[:2])
    with pytest.raises(ValueError, match="cu_q_len must lie within the 2 tokens of q"):
        params.replace(q=params.q[:2], k=params.k[:2], v=params.v[:2], cu_q_len=params.cu_q_len)


def test_base_two_scale():
    """log2(e) / sqrt(D), the number TurboMind's kernels hold, is the natural 1 / sqrt(D)."""
    params = make()
    twin = AttentionParams.from_base2(HEAD_DIM ** -0.5 * math.log2(math.e), **{
        name: getattr(params, name) for name in ("q", "k", "v", "cu_q_len", "cu_k_len")})
    assert twin.softmax_scale == pytest.approx(HEAD_DIM ** -0.5, rel=1e-15)
    assert twin.to_pod()["inv_sqrt_dh"][0] == pytest.approx(HEAD_DIM ** -0.5 * math.log2(math.e), rel=1e-7)


def test_rope_tables_of_a_step():
    rope = RopeParams(rotary_dim=16)
    cos, sin, rows = make((2, 1), (5, 3), rope_param=rope).step.rope_tables
    assert cos.shape == (1024, 8) and rows.tolist() == [3, 4, 2]
    np.testing.assert_array_equal(cos[:9], rope.tables(9)[0])
    assert make(rope_param=rope).step.rope_tables[0] is make(rope_param=rope).step.rope_tables[0]
    # a base of its own for every sequence
    cos, sin, rows = make((2, 1), (5, 3), rope_param=rope, rope_theta=np.float32([1e4, 1e6])).step.rope_tables
    assert rows.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(cos[:2], rope.tables(5)[0][3:])
    np.testing.assert_array_equal(sin[2], rope.tables(3, base=1e6)[1][2])
    dynamic = RopeParams(rotary_dim=16, scaling="dynamic", factor=2.0, original_max_position=4)
    cos, _, _ = make((2, 1), (5, 3), rope_param=dynamic, prompt_len=[9, 2]).step.rope_tables
    np.testing.assert_array_equal(cos[0], dynamic.tables(4, prompt_len=9)[0][3])
    np.testing.assert_array_equal(cos[2], dynamic.tables(3)[0][2])
    three = RopeParams(rotary_dim=16, mrope_section=(2, 3, 3))
    positions = np.int32([[5, 1, 2], [7, 1, 2], [9, 1, 2]])
    cos, _, _ = make((2, 1), (5, 3), rope_param=three, rope_positions=positions).step.rope_tables
    np.testing.assert_array_equal(cos, three.tables_for(positions)[0])


@pytest.mark.parametrize(("error", "field", "changes"), [
    (TypeError, "q", {"q": None, "qkv": np.zeros((3, 128), np.int32)}),
    (ValueError, "num_heads", {"num_heads": 0}),
    (ValueError, "qkv", {"num_heads": 3}),
    (ValueError, "cu_q_len", {"cu_q_len": None}),
    (TypeError, "cu_q_len", {"cu_q_len": np.array([0, 1, 2, 3])}),
    (ValueError, "cu_q_len", {"cu_q_len": np.int32([0, 2, 1, 3])}),
    (ValueError, "cu_q_len", {"cu_q_len": np.int32([0, 1, 2, 4])}),
    (ValueError, "cu_k_len", {"cu_k_len": np.int32([0, 1, 1, 30])}),
    (ValueError, "cu_k_len", {"cu_k_len": np.int32([0, 1])}),
    (TypeError, "finished", {"finished": np.zeros(3, np.uint8)}),
    (ValueError, "finished", {"finished": np.zeros(4, bool)}),
    (ValueError, "rope_theta", {"rope_theta": np.float32([1, 2, 3])}),
    (TypeError, "rope_theta", {"rope_param": RopeParams(rotary_dim=16), "rope_theta": np.int32([1, 2, 3])}),
    (ValueError, "base", {"rope_param": RopeParams(rotary_dim=16), "rope_theta": np.float32([1, 2, 3])}),
    (ValueError, "rope_param", {"rope_param": RopeParams(rotary_dim=32)}),
    (TypeError, "rope_param", {"rope_param": {"base": 1e4}}),
    (ValueError, "rope_positions", {"rope_param": RopeParams(rotary_dim=16), "rope_positions": np.zeros((3, 3), int)}),
    (ValueError, "prompt_len", {"rope_param": RopeParams(rotary_dim=16), "prompt_len": [1]}),
    (ValueError, "prompt_len", {"rope_param": RopeParams(rotary_dim=16), "prompt_len": [1, -1, 2]}),
    (TypeError, "prompt_len", {"rope_param": RopeParams(rotary_dim=16), "prompt_len": [1.5, 2.0, 3.0]}),
    (TypeError, "prompt_len", {"rope_param": RopeParams(rotary_dim=16), "prompt_len": "x"}),
    (ValueError, "prompt_len", {"prompt_len": [1, 2, 3]}),
    (TypeError, "size_per_head", {"size_per_head": "x"}),
    (ValueError, "size_per_head", {"size_per_head": -8}),
    (ValueError, "size_per_head", {"size_per_head": 12}),
    (ValueError, "size_per_head", {"qkv": np.zeros((3, 8 * 264), np.float32), "block_iter_params": None}),
    (TypeError, "stride", {"stride": "128"}),
    (TypeError, "stride", {"stride": True}),
    (TypeError, "sinks", {"sinks": np.zeros(4, np.int32)}),
    *((ValueError, rf"kv_scale\[{i}\]", {"quant_policy": 16, "kv_scale": scales})
      for i, scales in ((0, (np.float32([math.nan]), np.ones(1, np.float32))),
                        (1, (np.ones(1, np.float32), np.float32([1, math.inf]))))),
    (ValueError, "sinks", {"sinks": np.zeros(2, np.float32)}),
    (ValueError, "q_bias", {"q_bias": np.zeros((2, 16), np.float32)}),
    (TypeError, "k_bias", {"k_bias": np.zeros((2, 16), np.float16)}),
    (ValueError, "stride", {"stride": 100}),
    (ValueError, "token_num", {"token_num": 4}),
    (ValueError, "max_k_len", {"max_k_len": 19}),
    (TypeError, "inv_sqrt_dh", {"inv_sqrt_dh": "1"}),
    (ValueError, "inv_sqrt_dh", {"inv_sqrt_dh": math.inf}),
    (ValueError, "window_size", {"window_size": -1}),
    (TypeError, "causal", {"causal": 1}),
    (TypeError, "share_prefix", {"share_prefix": None}),
    (TypeError, "invariant", {"invariant": 1}),
    (ValueError, "invariant", {"invariant": True, "split_cnt": np.zeros(3, np.int32), "partial_O": np.zeros(
        (3, 4, 1, 16), np.float32), "partial_ML": np.zeros((3, 4, 1, 2), np.float32)}),
    (TypeError, "max_position_embeddings", {"use_logn_attn": True}),
    (ValueError, "max_position_embeddings", {"use_logn_attn": True, "max_position_embeddings": 1}),
    (ValueError, "quant_policy", {"quant_policy": 42}),
    (ValueError, "quant_policy", {"quant_policy": 12}),
    (ValueError, "kv_scale", {"quant_policy": 16}),
    (ValueError, "kv_scale", {"kv_scale": (np.ones(1, np.float32),) * 2}),
    (ValueError, r"kv_scale\[1\]", {"quant_policy": 17, "kv_scale": (np.ones(1, np.float32), np.ones(4, np.float32))}),
    (ValueError, "max_split_k", {"max_split_k": 0}),
    (ValueError, "num_splits", {"max_split_k": 2, "num_splits": 3}),
    (ValueError, "partial_O", {"split_cnt": np.zeros(3, np.int32)}),
    (ValueError, "partial_ML", {"split_cnt": np.zeros(3, np.int32), "partial_O": np.zeros((3, 4, 1, 16), np.float32),
                                "partial_ML": np.zeros((3, 4, 1), np.float32)}),
    (ValueError, "cp_rank", {"cp_rank": 1}),
    (ValueError, "cp_size", {"cp_size": 0}),
    (ValueError, "cp_offsets and cp_counts", {"cp_offsets": np.zeros(3, np.int32)}),
    (ValueError, "arch", {"arch": 80}),
    (TypeError, "stream", {"stream": object()}),
    (TypeError, "block_iter_params", {"block_iter_params": object()}),
    (TypeError, "linear_iter_params", {"linear_iter_params": object()}),
    (ValueError, r"LinearIteratorParams: kv_cache",
     {"linear_iter_params": LinearIteratorParams.empty(2, 29, 16, dtype=np.float32)}),
    (TypeError, "linear_iter_params.kv_cache",
     {"linear_iter_params": LinearIteratorParams.empty(2, 30, 16, dtype=np.float16)}),
])
def test_errors_name_the_field(error, field, changes):
    changes = {name: value for name, value in changes.items() if name != "q"}
    with pytest.raises(error, match=rf"^(AttentionParams: |RopeParams: |){field} must"):
        assert make(**changes).step.rope_tables


def test_stride_of_one_token():
    """It is looked at, too: the whole row's, whatever the row holds past the heads."""
    wide = rng.standard_normal((1, 200)).astype(np.float32)
    one = dict(q_lens=(1,), k_lens=(20,), qkv=wide, size_per_head=HEAD_DIM)
    assert make(**one).stride == make(**one, stride=200).stride == 200
    for stride in (128, 0, -200):
        with pytest.raises(ValueError, match=f"stride must be the 200 elements between tokens of q, got {stride}"):
            make(**one, stride=stride)


def test_words_of_errors():
    with pytest.raises(TypeError, match="^AttentionParams: sinks must be float32, got int32$"):
        make(sinks=np.zeros(4, np.int32))
    with pytest.raises(TypeError, match="^AttentionParams: sinks must be float32 or float16, got int32$"):
        make(dtype="float16", sinks=np.zeros(4, np.int32))
    with pytest.raises(TypeError, match="^AttentionParams: inv_sqrt_dh must not be given with scale_log2, got 0.25$"):
        AttentionParams.from_base2(0.5, inv_sqrt_dh=0.25)


def test_blocks_must_hold_the_context():
    params = make(k_lens=(1, 16, 9))
    with pytest.raises(ValueError, match="cu_block_nums must give sequence 1 the 3 blocks its 17 tokens need, got 2"):
        params.replace(cu_k_len=np.int32([0, 1, 18, 27]))


def test_q_only():
    """Attending alone needs neither k nor v, but the number of their heads."""
    q = np.zeros((3, HEADS, HEAD_DIM), np.float16)
    lengths = {"cu_q_len": np.int32([0, 3]), "cu_k_len": np.int32([0, 7])}
    assert AttentionParams(q=q, num_kv_heads=2, **lengths).num_kv_heads == 2
    with pytest.raises(ValueError, match="num_kv_heads must be given when k is not"):
        AttentionParams(q=q, **lengths)
    with pytest.raises(ValueError, match="num_heads must be a multiple of num_kv_heads, got 4 and 3"):
        AttentionParams(q=q, num_kv_heads=3, **lengths)
    with pytest.raises(ValueError, match="k and v must be given together"):
        AttentionParams(q=q, k=q, **lengths)


# ---- where keys and values are ------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "layer_bytes", "key", "value", "key_params", "value_params"), [
    (0, 262144, 99584, 115968, None, None),
    (8, 135168, 49792, 57984, 132628, 132884),
    (4, 69632, 24896, 28992, 67092, 67348),
    (16, 131072, 49792, 57984, None, None),   # the place of int8's codes, with the scales elsewhere
])
@pytest.mark.parametrize("layer_id", [0, 2])
def test_bytes_of_a_block(policy, layer_bytes, key, value, key_params, value_params, layer_id):
    """8 KV heads of 128, 64 tokens, float16: head 3, token 5 of every block."""
    pool = pool_of(4, 3 * layer_bytes)
    blocks = BlockIteratorParams.from_pool(pool, [[3, 1], [2, 0]], layer_id=layer_id)
    scale = (np.ones(1, np.float32),) * 2 if policy == 16 else None
    layer = blocks.layer(8, 128, quant_policy=policy, kv_scale=scale)
    assert layer.nbytes == layer_bytes
    found = BlockCacheIter(blocks, layer)
    first = pool.ctypes.data
    for sequence, token, block in ((0, 5, 3), (0, 69, 1), (1, 5, 2), (1, 69, 0)):
        start = first + block * 3 * layer_bytes + layer_id * layer_bytes
        assert found.key_address(sequence, 3, token) - start == key
        assert found.value_address(sequence, 3, token) - start == value
        if key_params is None:
            with pytest.raises(ValueError, match="quant_policy must keep parameters in the blocks"):
                found.key_params_address(sequence, 3, token)
        else:
            assert found.key_params_address(sequence, 3, token) - start == key_params
            assert found.value_params_address(sequence, 3, token) - start == value_params
    with pytest.raises(IndexError):
        found.key_address(0, 3, 128)
    shifted = blocks.at_layer(offset=96).layer(8, 128, quant_policy=policy, kv_scale=scale)
    assert shifted.k.offset == 96 and shifted.v.offset - shifted.k.offset == value - key


def test_policies_are_numbers_not_bits():
    assert [int(p) for p in QuantPolicy] == [0, 4, 8, 16, 17]
    assert QuantPolicy(8) != 42 and not QuantPolicy(8).is_fp8 and QuantPolicy.FP8_E5M2.is_fp8


def test_linear_addresses_and_views():
    kv = np.arange(2 * 2 * 30 * 16, dtype=np.float32).reshape(2, 2, 30, 16)
    linear = LinearIteratorParams.from_array(kv)
    assert (linear.stride_h, linear.key_to_val) == (960, 480)
    params = make(linear_iter_params=linear)
    found = cache_iter(params)
    assert isinstance(found, LinearCacheIter)
    k, v = linear.views(2, 30, 16)
    for sequence, head, token in ((0, 0, 0), (1, 1, 19), (2, 1, 8)):
        row = [0, 1, 21][sequence] + token
        assert found.key_address(sequence, head, token) - kv.ctypes.data == kv[head, 0, row, 0] * 4
        assert found.value_address(sequence, head, token) - kv.ctypes.data == kv[head, 1, row, 0] * 4
        np.testing.assert_array_equal(k[row, head], kv[head, 0, row])
        np.testing.assert_array_equal(v[row, head], kv[head, 1, row])
    shared = LinearIteratorParams.from_array(kv[:, :1].copy())
    assert shared.key_to_val == 0
    np.testing.assert_array_equal(*shared.views(2, 30, 16))


def test_iterator_of_the_blocks_and_of_none():
    params = make(dtype="float16", quant_policy=8)
    assert isinstance(cache_iter(params), BlockCacheIter) and params.block_layer.k.format == "int8"
    with pytest.raises(ValueError, match="linear_iter_params or block_iter_params"):
        cache_iter(params.replace(block_iter_params=None))


@pytest.mark.parametrize(("error", "text", "call"), [
    (ValueError, "^BlockIteratorParams: buffers must be given, or trusted_pointers=True",
     lambda ptrs, starts: BlockIteratorParams(ptrs, starts)),
    (ValueError, "block_ptrs must lie in the buffers",
     lambda ptrs, starts: BlockIteratorParams(ptrs, starts, buffers=[np.zeros(4)])),
    (TypeError, "BlockIteratorParams: block_ptrs must be uint64 or int64, got float64",
     lambda ptrs, starts: BlockIteratorParams(ptrs.astype(float), starts, trusted_pointers=True)),
    (ValueError, "BlockIteratorParams: cu_block_nums must not decrease",
     lambda ptrs, starts: BlockIteratorParams(ptrs, starts[::-1].copy(), trusted_pointers=True)),
    (ValueError, "BlockIteratorParams: block_len must be an int32 of at least 1, got 0",
     lambda ptrs, starts: BlockIteratorParams(ptrs, starts, block_len=0, trusted_pointers=True)),
    (ValueError, "BlockIteratorParams: layer_id must be an int32 of at least 0, got -1",
     lambda ptrs, starts: BlockIteratorParams(ptrs, starts, layer_id=-1, trusted_pointers=True)),
    (ValueError, "LinearIteratorParams: kv_cache must be contiguous",
     lambda ptrs, starts: LinearIteratorParams(np.zeros((4, 4), np.float32).T, 0, 0)),
    (TypeError, "LinearIteratorParams: stride_h must be an integer",
     lambda ptrs, starts: LinearIteratorParams(np.zeros((4, 4), np.float32), 1.0, 0)),
])
def test_errors_of_iterators(error, text, call):
    pool = pool_of(2, 64)
    with pytest.raises(error, match=text):
        call(np.uint64([pool.ctypes.data, pool.ctypes.data + 64]), np.int32([0, 1, 2]))


# ---- the C struct ------------------------------------------------------------------------------------------

SEED = """
enum class RopeType : int { kNull, kDefault, kLinear, kDynamic, kYarn, kLlama3, kMrope };
struct int3_ { int x, y, z; };
struct LinearIteratorParams { const void* kv_cache; long long stride_h; long long key_to_val; };
struct BlockIteratorParams { char** block_ptrs; const int* cu_block_nums; int layer_id; int block_len; };
struct Yarn { float scale_factor, attention_factor, ramp_inv_factor_div_2, ramp_inv_factor_mul_min; };
struct Llama3 { float scale_factor, alpha, beta; };
struct Mrope { int3_ section; int stride; int *position_ids, *position_delta, *length, *position_offsets; };
struct RopeKernelParam {
  RopeType type; float* base; int dim; float scale_factor, inv_factor; int mrope_mode;
  Yarn yarn; Llama3 llama3; Mrope mrope;
};
struct FastDivmod { int divisor; unsigned multiplier, shift_right; };
template <class T> struct AttentionParams {
  T *out, *q, *k, *v; long long stride; T *q_bias, *k_bias, *v_bias;
  const int *cu_q_len, *cu_k_len; const bool* finished; const float* rope_theta;
  LinearIteratorParams linear_iter_params; BlockIteratorParams block_iter_params;
  int token_num, batch_size, max_q_len, max_k_len, num_heads, num_kv_heads, size_per_head; float inv_sqrt_dh;
  int window_size; RopeKernelParam rope_param; bool use_logn_attn; int max_position_embeddings;
  int quant_policy; int max_split_k; int* split_cnt; float *partial_O, *partial_ML;
  int cp_rank; FastDivmod cp_size; int arch; void* stream; float* qk; T* pr;
};
using Seed = AttentionParams<short>;
"""


def _assertions():
    """The struct as its C++ users write it has the layout of params.h's."""
    lines = [SEED, "static_assert(sizeof(Seed) == 384 && sizeof(RopeKernelParam) == 112);"]
    for kind, name in (("Seed", "TurboMindAttentionParams"), ("RopeKernelParam", "TurboMindRopeKernelParam"),
                       ("LinearIteratorParams", "TurboMindLinearIteratorParams"), ("Mrope", "TurboMindMrope"),
                       ("BlockIteratorParams", "TurboMindBlockIteratorParams"), ("Yarn", "TurboMindYarnRope"),
                       ("Llama3", "TurboMindLlama3Rope"), ("FastDivmod", "TurboMindFastDivmod")):
        dtype = layout(name).dtype
        lines.append(f'static_assert(sizeof({kind}) == {dtype.itemsize}, "{name}");')
        for field, (_, offset, *_) in dtype.fields.items():
            if not field.startswith(("padding", "section")):
                lines.append(f'static_assert(__builtin_offsetof({kind}, {field}) == {offset}, "{name}.{field}");')
    return lines


def test_layout_of_the_struct_under_the_host_compiler(tmp_path):
    file = tmp_path / "seed.cpp"
    file.write_text("\n".join(_assertions()) + "\n")
    command = [*host_compiler.compiler().command, "-std=c++17", "-fsyntax-only", "-Wno-invalid-offsetof", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(_assertions()) > 60


def test_layout_of_the_struct_under_nvrtc():
    nvrtc.compile_code("\n".join(_assertions()), ("-std=c++17",), "sm_80")


READER = """
extern "C" double read(const Seed* p, int what) {
  switch (what) {
    case 0: return p->inv_sqrt_dh;              case 1: return p->window_size;
    case 2: return p->use_logn_attn;            case 3: return p->max_position_embeddings;
    case 4: return p->cu_k_len[2];              case 5: return p->q[p->stride + 3];
    case 6: return p->v[5];                     case 7: return p->block_iter_params.block_ptrs[1][0];
    case 8: return p->cp_size.divisor;          case 9: return p->rope_param.scale_factor;
    case 10: return p->rope_param.base[1];      case 11: return p->finished[1];
    case 12: return p->quant_policy;            case 13: return p->partial_ML[1];
    case 14: return static_cast<int>(p->rope_param.type);  case 15: return p->max_split_k;
  }
  return -1;
}
"""


def test_a_c_caller_reads_the_struct(tmp_path):
    import ctypes

    (tmp_path / "reader.cpp").write_text(SEED + READER)
    library = tmp_path / "reader.so"
    subprocess.run([*host_compiler.compiler().command, "-std=c++17", "-shared", "-fPIC", "-o", str(library),
                    str(tmp_path / "reader.cpp")], check=True)
    read = ctypes.CDLL(str(library)).read
    read.restype, read.argtypes = ctypes.c_double, [ctypes.c_void_p, ctypes.c_int]
    qkv = np.arange(3 * 128, dtype=np.float16).reshape(3, 128)
    params = make(qkv=qkv, rope_param=RopeParams(rotary_dim=16, base=1e4, style="interleaved"), use_logn_attn=True,
                  max_position_embeddings=2048, rope_theta=np.float32([1, 500, 2]) * 1e4, cp_size=4, cp_rank=1,
                  finished=np.array([False, True, False]), quant_policy=8, max_split_k=3).with_partials()
    params.partial_ML[...] = np.arange(3 * 4 * 3 * 2).reshape(params.partial_ML.shape)
    params.block_iter_params.buffers[0][...] = 7
    pod = params.to_pod()
    assert pod.shape == (1,) and pod.nbytes == 384
    found = [read(pod.ctypes.data, what) for what in range(16)]
    bits = qkv.view(np.int16).astype(int)
    expected = [0.25 * math.log2(math.e), 1 << 28, 1, 2048, 21, bits[1, 3], bits[0, 96 + 5], 7, 4,
                -math.log2(1e4) / 16, 5e6, 1, 8, 1, 3, 3]
    np.testing.assert_allclose(found, expected, rtol=1e-7)


def test_fast_division():
    for divisor in (1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 1000, 2**31 - 1):
        d, multiplier, shift = fast_divmod(divisor)
        x = np.concatenate([np.arange(5000), rng.integers(0, 2**31, 5000), [2**31 - 1, divisor, divisor - 1]])
        quotient = x if d == 1 else ((x.astype(object) * multiplier) >> 32) >> shift
        assert d == divisor and multiplier < 2**32 and (quotient == x // divisor).all(), divisor


@pytest.mark.parametrize(("options", "expected"), [
    ({}, {"type": 1, "inv_factor": 1.0, "scale_factor": -math.log2(1e4) / 16}),
    ({"scaling": "linear", "factor": 4.0}, {"type": 2, "inv_factor": 0.25}),
    ({"scaling": "dynamic", "factor": 4.0, "original_max_position": 64}, {"type": 3, "inv_factor": 1.0}),
    ({"scaling": "ntk", "alpha": 8.0}, {"type": 1, "scale_factor": -math.log2(1e4 * 8 ** (16 / 14)) / 16}),
    ({"scaling": "yarn", "factor": 4.0, "original_max_position": 64}, {"type": 4, "inv_factor": 0.25}),
    ({"scaling": "llama3", "factor": 8.0, "original_max_position": 8192}, {"type": 5, "inv_factor": 0.125}),
])
def test_rope_of_the_struct(options, expected):
    """The frequencies TurboMind's kernels make of the fields are ours."""
    rope = RopeParams(rotary_dim=16, style="interleaved", **options)
    got = make(rope_param=rope).to_pod()["rope_param"][0]
    assert got["dim"] == 16
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-6), name
    j = np.arange(8)
    freq = 2.0 ** (2 * j * float(got["scale_factor"]))
    inv = float(got["inv_factor"])
    if got["type"] == 4:
        ramp = np.clip(2 * j * float(got["yarn"]["ramp_inv_factor_div_2"]) -
                       float(got["yarn"]["ramp_inv_factor_mul_min"]), 0, 1)
        freq = freq - freq * ramp * (1 - inv)
        assert got["yarn"]["attention_factor"] == pytest.approx(rope.table_factor())
    elif got["type"] == 5:
        smooth = np.clip(freq * float(got["llama3"]["alpha"]) - float(got["llama3"]["beta"]), 0, 1)
        freq = (1 - smooth) * freq * inv + smooth * freq
    else:
        freq = freq * inv
    np.testing.assert_allclose(freq, rope.inv_freq(), rtol=3e-6)


PAIRS = RopeParams(rotary_dim=16, style="interleaved")
DYNAMIC = RopeParams(rotary_dim=16, style="interleaved", scaling="dynamic", factor=4.0, original_max_position=64)
THETA = np.float32([1e4, 5e5, 2e4])


@pytest.mark.parametrize(("rope", "changes", "bases"), [
    (PAIRS, {"rope_theta": THETA}, THETA),
    (PAIRS, {"rope_theta": THETA.astype(np.float64)}, THETA),
    (PAIRS, {"rope_theta": np.repeat(THETA, 2)[::2]}, THETA),
    (RopeParams(rotary_dim=16, style="interleaved", scaling="ntk", alpha=8.0), {"rope_theta": THETA}, THETA),
    (DYNAMIC, {"rope_theta": THETA}, THETA),
    (DYNAMIC, {}, [1e4] * 3),
    (DYNAMIC, {"prompt_len": [64, 65, 1000]}, 1e4 * np.array([1, 4 * 65 / 64 - 3, 4 * 1000 / 64 - 3]) ** (16 / 14)),
])
def test_bases_of_the_struct(xp, rope, changes, bases):
    """They differ by sequence where the kernels of type 3 look for them, and nowhere else."""
    changes = {name: xp.array(value) if name == "rope_theta" else value for name, value in changes.items()}
    params = make(xp=xp, rope_param=rope, **changes)
    pod = params.to_pod()
    got, array = pod["rope_param"][0], params.step.rope_bases
    assert (got["type"], got["inv_factor"], got["base"]) == (3, 1.0, array.data.ptr if xp.name != "numpy" else
                                                             array.ctypes.data)
    assert pod["rope_theta"][0] == (got["base"] if "rope_theta" in changes else 0)
    assert array.dtype == np.float32 and array.flags.c_contiguous
    np.testing.assert_allclose(xp.numpy(array), bases, rtol=1e-7)


@pytest.mark.parametrize(("field", "changes"), [
    ("sinks", {"sinks": np.ones(HEADS, np.float32)}),
    ("causal", {"causal": False}),
    ("invariant", {"invariant": True}),
    ("rope_positions", {"rope_param": PAIRS, "rope_positions": np.int32([7, 8, 9])}),
    *(("rope_theta", {"rope_theta": THETA, "rope_param": RopeParams(
        rotary_dim=16, style="interleaved", scaling=scaling, factor=4.0, original_max_position=64)})
      for scaling in ("linear", "yarn", "llama3")),
    ("cu_q_len", {"cu_q_len": np.int32([0, 9, 1, 9, 2, 9, 3])[::2]}),
    ("cu_k_len", {"cu_k_len": np.int32([0, 9, 1, 9, 21, 9, 30])[::2]}),
    ("finished", {"finished": np.zeros(6, bool)[::2]}),
    ("out", {"out": np.zeros((6, HEADS, HEAD_DIM), np.float32)[::2]}),
    ("q_bias", {"q_bias": np.zeros((8, HEAD_DIM), np.float32)[::2]}),
    ("rope_param.style", {"rope_param": RopeParams(rotary_dim=16)}),
    ("rope_param.mrope_section",
     {"rope_param": RopeParams(rotary_dim=16, style="interleaved", mrope_section=(2, 3, 3))}),
    ("quant_policy", {"quant_policy": 16, "kv_scale": (np.ones(1, np.float32),) * 2}),
    ("cp_offsets", {"cp_offsets": np.zeros(3, np.int32), "cp_counts": np.zeros(3, np.int32)}),
])
def test_what_the_struct_cannot_say(field, changes):
    with pytest.raises(NotImplementedError, match=f"^to_pod: {field} must be"):
        make(**changes).to_pod()
