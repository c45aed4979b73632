# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from compare import ROUNDING, assert_close, assert_same_bits, dtype_of, poison
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import cupyattn
from cupyattn.reference.rope import rope as expected_rope
from cupyattn.runtime.cpu import settings

STYLES = ("neox", "interleaved")
rng = np.random.default_rng(11)


def tables(max_pos, rotary_dim, base=10000.0, dtype=np.float32):
    """cos and sin [max_pos, rotary_dim / 2], angles in float64."""
    angle = np.arange(max_pos)[:, None] * base ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    return np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)


def full_width(table, style):
    """The same table with every pair twice, as checkpoints' own code makes it."""
    return np.concatenate([table, table], axis=1) if style == "neox" else np.repeat(table, 2, axis=1)


def run(xp, x, cos, sin, positions, **options):
    return cupyattn.rope(x, cos=xp.array(cos), sin=xp.array(sin), positions=xp.array(positions), **options)


def tolerance(dtype, x):
    """One rounding, and float32's error in a*c - b*s, which may cancel."""
    atol, rtol = ROUNDING[dtype]
    return atol + 2e-7 * float(np.abs(x.astype(np.float64)).max(initial=0)), rtol


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("heads, head_dim, rotary_dim", [(9, 64, None), (3, 128, 64), (1, 20, 10), (5, 6, 2)])
def test_rope(xp, style, dtype, heads, head_dim, rotary_dim):
    x = rng.standard_normal((7, heads, head_dim)).astype(dtype_of(dtype))
    cos, sin = tables(100, rotary_dim or head_dim)
    positions = np.int32([0, 1, 2, 99, 50, 50, 7])
    want = expected_rope(x, cos=cos, sin=sin, positions=positions, style=style, rotary_dim=rotary_dim)
    out = poison(xp.array(np.empty_like(x))) if xp.name == "numpy" else None
    got = run(xp, xp.array(x), cos, sin, positions, style=style, rotary_dim=rotary_dim, out=out)
    assert got.dtype == x.dtype and isinstance(got, xp.module.ndarray)
    assert_close(xp.numpy(got), want, *tolerance(dtype, x))
    assert_same_bits(xp.numpy(got)[:, :, rotary_dim or head_dim:], x[:, :, rotary_dim or head_dim:])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("table_dtype", [np.float32, np.float16])
@pytest.mark.parametrize("rotary_dim", [64, 36])
def test_full_width_tables_are_read_in_place(xp, style, table_dtype, rotary_dim):
    x = rng.standard_normal((3, 2, 64)).astype(np.float16)
    cos, sin = tables(9, rotary_dim, dtype=table_dtype)
    positions = np.int32([8, 0, 3])
    options = {"style": style, "rotary_dim": rotary_dim}
    half = xp.numpy(run(xp, xp.array(x), cos, sin, positions, **options))
    full = run(xp, xp.array(x), full_width(cos, style), full_width(sin, style), positions, **options)
    assert_same_bits(xp.numpy(full), half)
    assert_close(half, expected_rope(x, cos=cos, sin=sin, positions=positions, **options), *tolerance("float16", x))


@pytest.mark.parametrize("style", STYLES)
def test_fused_projection_in_place(xp, style):
    """q and k are slices of one projection, rotated where they lie; v and the padding keep their bits."""
    heads, kv_heads, head_dim = 3, 1, 32
    fused = rng.standard_normal((4, (heads + 2 * kv_heads) * head_dim + 8)).astype(np.float16)
    cos, sin = tables(40, head_dim)
    positions = np.int32([5, 39, 0, 12])
    rotated = (heads + kv_heads) * head_dim
    view = fused[:, :rotated].reshape(4, heads + kv_heads, head_dim)
    want = expected_rope(view, cos=cos, sin=sin, positions=positions, style=style)
    device = xp.array(fused)
    inside = device[:, :rotated].reshape(4, heads + kv_heads, head_dim)
    assert run(xp, inside, cos, sin, positions, style=style, out=inside) is inside
    got = xp.numpy(device)
    assert_close(got[:, :rotated].reshape(view.shape), want, *tolerance("float16", fused))
    assert_same_bits(got[:, rotated:], fused[:, rotated:])


@pytest.mark.full
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("table_dtype", [np.float32, np.float16])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [2, 6, 8, 16, 40, 64, 72, 80, 96, 100, 112, 128, 192, 256])
def test_every_specialisation(xp, dtype, table_dtype, wide, style, head_dim):
    for rotary_dim in {head_dim, max(2, head_dim // 4 * 2)}:
        x = rng.standard_normal((9, 7, head_dim)).astype(dtype_of(dtype))
        cos, sin = tables(30, rotary_dim, dtype=table_dtype)
        positions = rng.integers(0, 30, 9).astype(np.int32)
        want = expected_rope(x, cos=cos, sin=sin, positions=positions, style=style, rotary_dim=rotary_dim)
        if wide:
            cos, sin = full_width(cos, style), full_width(sin, style)
        got = run(xp, xp.array(x), cos, sin, positions, style=style, rotary_dim=rotary_dim)
        assert_close(xp.numpy(got), want, *tolerance(dtype, x))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("start, rotary_dim", [(1, 16), (8, 12), (3, 32)])
def test_offset_views_and_partial_in_place(xp, style, start, rotary_dim):
    base = rng.standard_normal((5, 4, 45)).astype(np.float32)
    cos, sin = tables(10, rotary_dim)
    positions = np.int32([9, 8, 7, 0, 1])
    host = base[::2, 1:4, start:start + 32]          # every second token, not the first head
    want = expected_rope(host, cos=cos, sin=sin, positions=positions[::2], style=style, rotary_dim=rotary_dim)
    device = xp.array(base)
    view = device[::2, 1:4, start:start + 32]
    cupyattn.rope(view, cos=xp.array(cos), sin=xp.array(sin), positions=xp.array(positions)[::2], style=style,
                  rotary_dim=rotary_dim, out=view)
    got = xp.numpy(device)
    assert_close(got[::2, 1:4, start:start + 32], want, *tolerance("float32", base))
    got[::2, 1:4, start:start + rotary_dim] = base[::2, 1:4, start:start + rotary_dim]
    assert_same_bits(got, base)


def test_transposed_heads_and_heads_first_output(xp):
    x = rng.standard_normal((3, 6, 16)).astype(np.float16)      # [heads, tokens, head_dim]
    cos, sin = tables(8, 16)
    positions = np.arange(6, dtype=np.int32)
    want = expected_rope(x.transpose(1, 0, 2), cos=cos, sin=sin, positions=positions)
    got = run(xp, xp.array(x).transpose(1, 0, 2), cos, sin, positions)
    assert_close(xp.numpy(got), want, *tolerance("float16", x))


@pytest.mark.parametrize("style", STYLES)
def test_position_200000(xp, style):
    cos, sin = tables(200_001, 64)
    x = rng.standard_normal((2, 2, 64)).astype(np.float32)
    positions = np.int32([200_000, 199_999])
    want = expected_rope(x, cos=cos, sin=sin, positions=positions, style=style)
    assert_close(xp.numpy(run(xp, xp.array(x), cos, sin, positions, style=style)), want, *tolerance("float32", x))


@pytest.mark.parametrize("rotary_dim", [16, 24])
def test_position_out_of_range(xp, rotary_dim):
    x = rng.standard_normal((3, 2, 24)).astype(np.float16)
    cos, sin = tables(4, rotary_dim)
    for bad in (4, -1, 2**31 - 1):
        positions = np.int32([3, bad, 0])
        device = xp.array(x)
        if xp.name == "numpy":
            with pytest.raises(ValueError, match=rf"rope: positions must be in \[0, 4\).*got {bad}"):
                run(xp, device, cos, sin, positions, rotary_dim=rotary_dim, out=device)
            assert_same_bits(device, x)
        else:
            run(xp, device, cos, sin, positions, rotary_dim=rotary_dim, out=device)
            want = expected_rope(x, cos=cos, sin=sin, positions=positions, rotary_dim=rotary_dim)
            assert np.isnan(want[1]).all()
            assert_close(xp.numpy(device), want, *tolerance("float16", x))


@pytest.mark.parametrize("xp", ["numpy", "standin"], indirect=True)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("rotary_dim", [16, 8])
def test_against_onnxruntime(xp, style, rotary_dim):
    import onnx
    import onnxruntime

    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    tokens, heads, head_dim = 6, 3, 16
    x = rng.standard_normal((tokens, heads, head_dim)).astype(np.float32)
    cos, sin = tables(50, rotary_dim)
    positions = rng.integers(0, 50, tokens).astype(np.int32)
    node = helper.make_node("RotaryEmbedding", ["x", "cos", "sin", "positions"], ["out"],
                            interleaved=int(style == "interleaved"), rotary_embedding_dim=rotary_dim % head_dim)
    graph = helper.make_graph([node], "rope", [
        helper.make_tensor_value_info("x", float32, [1, heads, tokens, head_dim]),
        helper.make_tensor_value_info("cos", float32, cos.shape),
        helper.make_tensor_value_info("sin", float32, sin.shape),
        helper.make_tensor_value_info("positions", onnx.TensorProto.INT64, [1, tokens])],
        [helper.make_tensor_value_info("out", float32, [1, heads, tokens, head_dim])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    want = session.run(None, {"x": x.transpose(1, 0, 2)[None], "cos": cos, "sin": sin,
                              "positions": positions[None].astype(np.int64)})[0][0].transpose(1, 0, 2)
    got = run(xp, xp.array(x), cos, sin, positions, style=style, rotary_dim=rotary_dim)
    assert_close(xp.numpy(got), want, 1e-6, 1e-6)


def test_known_numbers(xp):
    x = np.arange(1, 9, dtype=np.float32).reshape(1, 1, 8)
    cos, sin = tables(4, 8)
    got = xp.numpy(run(xp, xp.array(x), cos, sin, np.int32([3]), style="interleaved"))
    assert_close(got[0, 0], [-1.272233, -1.838865, 1.683929, 4.707907, 4.817777, 6.147278, 6.975969, 8.020964],
                 2e-6, 0)
    cos, sin = tables(4, 4)
    got = xp.numpy(run(xp, xp.array(x), cos, sin, np.int32([3]), style="interleaved", rotary_dim=4))
    assert_close(got[0, 0], [-1.272233, -1.838865, 2.878668, 4.088187, 5, 6, 7, 8], 2e-6, 0)


@pytest.mark.parametrize("style", STYLES)
def test_the_opposite_angle_undoes_it(xp, style):
    x = rng.standard_normal((5, 3, 64)).astype(np.float32)
    cos, sin = tables(77, 64)
    positions = np.int32([0, 1, 20, 76, 5])
    there = run(xp, xp.array(x), cos, sin, positions, style=style)
    back = run(xp, there, cos, -sin, positions, style=style)
    assert_close(xp.numpy(back), x, 2e-6, 1e-6)


def test_tokens_do_not_see_each_other(xp):
    x = rng.standard_normal((1100, 5, 64)).astype(np.float16)
    x[3] = np.nan
    cos, sin = tables(2000, 64)
    positions = rng.integers(0, 2000, len(x)).astype(np.int32)
    whole = xp.numpy(run(xp, xp.array(x), cos, sin, positions))
    assert np.isnan(whole[3]).all() and not np.isnan(np.delete(whole, 3, axis=0)).any()
    for t in (0, 4, 1099):
        assert_same_bits(whole[t:t + 1], xp.numpy(run(xp, xp.array(x[t:t + 1]), cos, sin, positions[t:t + 1])))


def test_empty(xp):
    cos, sin = tables(3, 8)
    for shape in ((0, 2, 8), (2, 0, 8)):
        got = run(xp, xp.array(np.zeros(shape, np.float16)), cos, sin, np.zeros(shape[0], np.int32))
        assert got.shape == shape and got.dtype == np.float16


def test_errors():
    x, positions = np.zeros((2, 3, 8), np.float16), np.zeros(2, np.int32)
    cos, sin = tables(4, 8)
    good = {"cos": cos, "sin": sin, "positions": positions}
    frozen = np.zeros_like(x)
    frozen.flags.writeable = False
    for error, message, array, changes in (
            (ValueError, r"rope: x must be \[tokens, num_heads, head_dim\]", x[0], {}),
            (TypeError, "rope: x must be float16 or bfloat16 or float32, got float64", x.astype(np.float64), {}),
            (ValueError, "rope: x must have a contiguous last axis", x.transpose(0, 2, 1), {"rotary_dim": 2}),
            (ValueError, r"rope: style must be one of .* got 'gptj'", x, {"style": "gptj"}),
            (ValueError, r"rope: rotary_dim must be even and in \[2, head_dim=8\], got 10", x, {"rotary_dim": 10}),
            (ValueError, "rope: rotary_dim must be even .* got 3", x, {"rotary_dim": 3}),
            (TypeError, "rope: rotary_dim must be an integer, got float", x, {"rotary_dim": 8.0}),
            (TypeError, "rope: rotary_dim must be an integer, got str", x, {"rotary_dim": "a"}),
            (ValueError, r"rope: cos must be \[max_pos, 4\] or \[max_pos, 8\], got \[4, 3\]", x, {"cos": cos[:, :3]}),
            (ValueError, "rope: sin must be the shape of cos", x, {"sin": sin[:3]}),
            (TypeError, "rope: sin must be float32, got float16", x, {"sin": sin.astype(np.float16)}),
            (TypeError, "rope: positions must be int32, got int64", x, {"positions": positions.astype(np.int64)}),
            (ValueError, r"rope: positions must be \[tokens\] = \[2\], got \[1\]", x, {"positions": positions[:1]}),
            (TypeError, "rope: out must be float16, got float32", x, {"out": x.astype(np.float32)}),
            (ValueError, "rope: out must be writeable", x, {"out": frozen}),
            (TypeError, "rope: x must be a NumPy or CuPy array, got list", [[[1.0]]], {})):
        with pytest.raises(error, match=message):
            cupyattn.rope(array, **{**good, **changes})


@pytest.mark.parametrize("xp", ["numpy", "standin"], indirect=True)
@pytest.mark.parametrize("style", STYLES)
def test_rope_checked(xp, style):
    x = rng.standard_normal((3, 5, 32)).astype(np.float16)
    cos, sin = tables(20, 16)
    positions = np.int32([19, 0, 4])
    results = []
    for schedule, seed in (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        with settings(check=True, schedule=schedule, seed=seed):
            results.append(xp.numpy(run(xp, xp.array(x), cos, sin, positions, style=style, rotary_dim=16)))
    for other in results[1:]:
        assert_same_bits(other, results[0])
    want = expected_rope(x, cos=cos, sin=sin, positions=positions, style=style, rotary_dim=16)
    assert_close(results[0], want, *tolerance("float16", x))


@hypothesis_settings(max_examples=30, deadline=None, derandomize=True)
@given(tokens=st.integers(0, 5), heads=st.integers(1, 7), pairs=st.integers(1, 40), extra=st.integers(0, 9),
       offset=st.integers(0, 9), style=st.sampled_from(STYLES), data=st.randoms())
def test_shapes(tokens, heads, pairs, extra, offset, style, data):
    generator = np.random.default_rng(data.randrange(2**32))
    head_dim = 2 * pairs + extra
    x = generator.standard_normal((tokens, heads, head_dim + offset)).astype(np.float32)[:, :, offset:]
    cos, sin = tables(12, 2 * pairs)
    options = {"cos": cos, "sin": sin, "positions": generator.integers(0, 12, tokens).astype(np.int32),
               "style": style, "rotary_dim": 2 * pairs}
    assert_close(cupyattn.rope(x, **options), expected_rope(x, **options), *tolerance("float32", x))


def test_many_tokens_of_one_narrow_head(xp):
    """The block shape that would be deepest."""
    x = np.random.default_rng(3).standard_normal((130, 1, 64)).astype(np.float16)
    cos, sin = tables(130, 16)
    positions = np.arange(130, dtype=np.int32)
    want = expected_rope(x, cos=cos, sin=sin, positions=positions, rotary_dim=16)
    got = run(xp, xp.array(x), cos, sin, positions, rotary_dim=16)
    assert_close(xp.numpy(got), want, *ROUNDING["float16"])
