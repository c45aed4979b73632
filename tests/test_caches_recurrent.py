# SPDX-License-Identifier: Apache-2.0
"""Mamba's and Mamba-2's caches: metadata, the window of the convolution, states, and what every cache class can do."""

import dataclasses
import json

import numpy as np
import pytest
from compare import assert_same_bits, dtype_of

import cupyattn
from cupyattn import (
    Mamba2Cache,
    Mamba2CacheMetaData,
    Mamba2CacheView,
    Mamba2Metadata,
    MambaCache,
    MambaCacheMetaData,
    MambaCacheView,
    MambaMetadata,
)
from cupyattn.caches.base import Record

SIZES = {"batch_size": 2, "intermediate_size": 3, "ssm_state_size": 5, "conv_kernel_size": 4}
SIZES2 = {"batch_size": 2, "intermediate_size": 12, "num_heads": 4, "head_dim": 3, "state_size": 5,
          "conv_kernel_size": 4, "n_groups": 2}


def mamba(xp, layers=2, dtype="float32", **options):
    return MambaCache.init_cache(MambaCacheMetaData.create(layers, None, **SIZES), dtype, xp=xp.module, **options)


def mamba2(xp, layers=2, dtype="float32", **options):
    metadata = Mamba2CacheMetaData.create(None, layers, **SIZES2)
    return Mamba2Cache.init_cache(layers, metadata, dtype, xp=xp.module, **options)


def filled(xp, cache):
    """The same cache with numbers everywhere, NaN and infinity among them."""
    rng = np.random.default_rng(0)
    for view in cache.views:
        for name in ("conv_states", "ssm_states"):
            old = getattr(view, name)
            numbers = rng.standard_normal(old.shape)
            numbers.flat[:2] = np.nan, -np.inf
            setattr(view, name, xp.array(numbers.astype(old.dtype)))
    return cache


def window(xp, row):
    """A view of one sequence whose channels all hold `row`."""
    metadata = MambaCacheMetaData.create(1, None, 1, 2, 1, len(row))
    view = MambaCacheView.init(metadata, None, "float32", xp=xp.module)
    view.conv_states = xp.array(np.tile(np.float32(row), (1, 2, 1)))
    return view


def rows(xp, view):
    """The window of each channel of the only sequence."""
    return xp.numpy(view.conv_states)[0].tolist()


# ---- metadata --------------------------------------------------------------------------------------------

def test_metadata_fields_and_order():
    made = MambaCacheMetaData.create(7, "axis", 2, 3, 5, 4)
    assert made == MambaCacheMetaData(7, "axis", 2, 3, 5, 4)
    assert made.to_dict() == {"num_hidden_layers": 7, "partition_axis": "axis", **SIZES}
    made = Mamba2CacheMetaData.create("axis", 7, 2, 12, 4, 3, 5, 4, 2)
    assert made == Mamba2CacheMetaData("axis", 7, 2, 12, 4, 3, 5, 4, 2)
    assert made.to_dict() == {"partition_axis": "axis", "num_hidden_layers": 7, **SIZES2}


def test_both_spellings_of_partition_axis():
    for spelling in ("parition_axis", "partition_axis"):
        made = Mamba2CacheMetaData.create(num_hidden_layers=1, **{spelling: "axis"}, **SIZES2)
        assert made.partition_axis == "axis"
    assert Mamba2CacheMetaData.create(num_hidden_layers=1, **SIZES2).partition_axis is None
    assert MambaCacheMetaData.create(num_hidden_layers=1, **SIZES).partition_axis is None
    with pytest.raises(TypeError, match="partition_axis must be given once"):
        Mamba2CacheMetaData.create("a", 1, partition_axis="b", **SIZES2)


@pytest.mark.parametrize("create,sizes", [(MambaCacheMetaData.create, SIZES), (Mamba2CacheMetaData.create, SIZES2)])
def test_sizes_are_checked(create, sizes):
    for name in sizes:
        for wrong in (0, -1):
            with pytest.raises(ValueError, match=f"{name} must be positive, got {wrong}"):
                create(num_hidden_layers=1, **{**sizes, name: wrong})
        with pytest.raises(TypeError, match=f"{name} must be given"):
            create(num_hidden_layers=1, **{**sizes, name: None})
        with pytest.raises(TypeError, match=f"{name} must be an integer, got float"):
            create(num_hidden_layers=1, **{**sizes, name: 1.5})
    assert create(num_hidden_layers=0, **sizes).num_hidden_layers == 0   # unchecked, as in EasyDeL


def test_mamba2_sizes_fit_each_other():
    with pytest.raises(ValueError, match=r"intermediate_size must be num_heads \* head_dim = 12, got 13"):
        Mamba2CacheMetaData.create(None, 1, **{**SIZES2, "intermediate_size": 13})
    with pytest.raises(ValueError, match="n_groups must divide num_heads = 4, got 3"):
        Mamba2CacheMetaData.create(None, 1, **{**SIZES2, "n_groups": 3})


# ---- views -----------------------------------------------------------------------------------------------

def test_init(xp):
    view = MambaCacheView.init(MambaCacheMetaData.create(1, None, **SIZES), None, "float16", 3, xp=xp.module)
    assert isinstance(view.conv_states, xp.module.ndarray)
    assert_same_bits(xp.numpy(view.conv_states), np.zeros((2, 3, 4), np.float16))
    assert_same_bits(xp.numpy(view.ssm_states), np.zeros((2, 3, 5), np.float32))   # whatever the window's dtype
    assert_same_bits(xp.numpy(view.positions), np.zeros(2, np.int32))
    assert view.layer_index == 3 and view.nbytes == 2 * 3 * (4 * 2 + 5 * 4) + 8
    view = Mamba2CacheView.init(Mamba2CacheMetaData.create(None, 1, **SIZES2), None, "float16", 3, xp=xp.module)
    assert_same_bits(xp.numpy(view.conv_states), np.zeros((2, 12 + 2 * 2 * 5, 4), np.float16))
    assert_same_bits(xp.numpy(view.ssm_states), np.zeros((2, 4, 3, 5), np.float32))
    assert_same_bits(xp.numpy(view.positions), np.zeros(2, np.int32))
    assert (view.seqlen_offset, view.layer_index) == (0, 3)
    with pytest.raises(TypeError, match="MambaCacheView.init: metadata must be given"):
        MambaCacheView.init()


@pytest.mark.parametrize("make", [mamba, mamba2])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes(xp, make, dtype):
    view = make(xp, dtype=dtype)[0]
    assert view.conv_states.dtype == dtype_of(dtype) and view.ssm_states.dtype == np.float32
    assert make(xp, dtype=dtype, ssm_dtype=dtype)[0].ssm_states.dtype == dtype_of(dtype)
    assert make(xp, dtype=None)[1].conv_states.dtype == dtype_of("bfloat16")
    assert [view.layer_index for view in make(xp).views] == [0, 1]


@pytest.mark.parametrize("dtype", ["float64", np.int8, "float99", None])
def test_dtypes_that_no_op_takes(dtype):
    for init, metadata in ((MambaCacheView.init, MambaCacheMetaData.create(1, None, **SIZES)),
                           (Mamba2CacheView.init, Mamba2CacheMetaData.create(None, 1, **SIZES2))):
        with pytest.raises(TypeError, match="View.init: dtype must be float16, bfloat16, float32, got"):
            init(metadata, None, dtype)
        with pytest.raises(TypeError, match="View.init: ssm_dtype must be float16, bfloat16, float32, got"):
            init(metadata, ssm_dtype=dtype)


@pytest.mark.parametrize("position,want", [(1, [1, 9, 3, 0]), (99, [1, 2, 3, 9]), (-5, [9, 2, 3, 0]), (3, [1, 2, 3, 9]),
                                           (0, [9, 2, 3, 0])])
def test_update_conv_state_at_one_position(xp, position, want):
    view = window(xp, [0, 1, 2, 3])
    assert view.update_conv_state(xp.array(np.full((1, 2), 9, np.float32)), position) is view
    assert rows(xp, view) == [want, want]
    again = window(xp, [0, 1, 2, 3])
    again.update_conv_state(xp.array(np.full((1, 2), 9, np.float32)), xp.array(np.int32(position)))
    assert again == view


def test_update_conv_state_at_several_positions(xp):
    new = xp.array(np.arange(8, dtype=np.float32).reshape(1, 2, 4) + 10)
    view = window(xp, [0, 1, 2, 3]).update_conv_state(new, np.arange(4))
    assert rows(xp, view) == [[10, 11, 12, 13], [14, 15, 16, 17]]
    view = window(xp, [0, 1, 2, 3]).update_conv_state(new[:, :, :2], [0, 2])
    assert rows(xp, view) == [[10, 2, 11, 0], [14, 2, 15, 0]]
    view = window(xp, [0, 1, 2, 3]).update_conv_state(new[:, :, :3], [2, 3, 7])   # 7 is 3 as well: the last wins
    assert rows(xp, view) == [[1, 2, 10, 12], [1, 2, 14, 16]]


def test_append_conv_state_is_a_causal_window(xp):
    inputs = np.arange(1, 8, dtype=np.float32)
    for width in (1, 2, 4):
        for step in (1, 2, 3, 7):
            view = window(xp, [0] * width)
            for at in range(0, 7, step):
                chunk = xp.array(np.tile(inputs[at:at + step], (1, 2, 1)))
                assert view.append_conv_state(chunk) is view
                seen = [0] * width + inputs[:at + step].tolist()
                assert rows(xp, view) == [seen[-width:]] * 2
            one = window(xp, [0] * width)
            for x in inputs:
                one.append_conv_state(xp.array(np.full((1, 2), x, np.float32)))
            assert one.conv_states.shape == view.conv_states.shape and rows(xp, one) == rows(xp, view)
    view = window(xp, [1, 2]).append_conv_state(xp.array(np.zeros((1, 2, 0), np.float32)))
    assert rows(xp, view) == [[1, 2], [1, 2]]


def test_new_inputs_are_rounded_to_the_window(xp):
    view = mamba(xp, dtype="bfloat16")[0]
    view.append_conv_state(xp.array(np.full((2, 3), 1.00390625 + 2**-12, np.float32)))
    assert np.all(xp.numpy(view.conv_states)[:, :, 3] == dtype_of("bfloat16").type(1.0078125))


def test_update_ssm_state(xp):
    for make in (mamba, mamba2):
        view = make(xp)[0]
        state, new = view.ssm_states, np.random.default_rng(0).standard_normal(view.ssm_states.shape).astype(np.float16)
        assert view.update_ssm_state(xp.array(new)) is view and view.ssm_states is state
        assert_same_bits(xp.numpy(state), new.astype(np.float32))


def test_wrong_shapes_and_kinds(xp):
    view, other = mamba(xp)[0], mamba2(xp)[0]
    zeros = xp.array(np.zeros((2, 3, 4), np.float32))
    with pytest.raises(ValueError, match=r"update_conv_state: new_conv_state must be \[2, 3\], got \[2, 3, 4\]"):
        view.update_conv_state(zeros, 0)
    with pytest.raises(ValueError, match=r"new_conv_state must be \[2, 3, 2\], got \[2, 3, 4\]"):
        view.update_conv_state(zeros, [0, 1])
    with pytest.raises(ValueError, match=r"cache_position must be a number or \[n\], got \[1, 1\]"):
        view.update_conv_state(zeros, [[0]])
    with pytest.raises(ValueError, match=r"append_conv_state: x must be \[2, 32\], got \[2\]"):
        other.append_conv_state(zeros[:, 0, 0])
    with pytest.raises(ValueError, match=r"Mamba2CacheView.update_ssm_state: new_ssm_state must be \[2, 4, 3, 5\]"):
        other.update_ssm_state(zeros)
    with pytest.raises(TypeError, match="new_ssm_state must be a NumPy or CuPy array, got list"):
        view.update_ssm_state([1])
    with pytest.raises(TypeError, match="append_conv_state: x must be a NumPy or CuPy array, got list"):
        view.append_conv_state([1])
    if xp.name != "numpy":
        with pytest.raises(TypeError, match="all arrays must be of one kind"):
            view.append_conv_state(np.zeros((2, 3), np.float32))


def test_reset(xp):
    cache = filled(xp, mamba2(xp)).update_seq(4)
    assert cache.reset() is cache
    for view in cache.views:
        assert not xp.numpy(view.conv_states).any() and not xp.numpy(view.ssm_states).any()
        assert xp.numpy(view.positions).tolist() == [4, 4] and view.seqlen_offset == 4   # they stay
    cache.reset(positions=True)
    assert cache == mamba2(xp)
    view = filled(xp, mamba(xp))[1]
    assert view.reset() is view and view == mamba(xp)[1]


def test_update_seq(xp):
    cache = mamba2(xp)
    cache.views[1] = None
    shared = cache[0].positions
    cache.update_seq(3)
    cache.update_seq(2)
    assert xp.numpy(cache[0].positions).tolist() == [5, 5] and cache[0].seqlen_offset == 5 and cache[1] is None
    assert xp.numpy(shared).tolist() == [0, 0]   # an array several views hold moves on once for each of them
    with pytest.raises(TypeError, match="num must be an integer"):
        cache.update_seq(1.5)


# ---- caches ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make", [mamba, mamba2])
def test_updates_of_a_layer_are_in_place_and_return_the_cache(xp, make):
    cache = make(xp)
    before = cache.copy()
    channels = cache[0].conv_states.shape[1]
    ones = xp.array(np.ones((2, channels), np.float32))
    assert cache.update_conv_state(1, ones, 3) is cache and cache.append_conv_state(1, ones) is cache
    state = xp.array(np.ones(cache[0].ssm_states.shape, np.float32))
    assert cache.update_ssm_state(layer_idx=1, new_ssm_state=state) is cache
    assert xp.numpy(cache[1].conv_states)[0, 0].tolist() == [0, 0, 1, 1] and xp.numpy(cache[1].ssm_states).all()
    assert cache[0] == before[0] and cache[1] != before[1] and before == make(xp)   # the snapshot has its own arrays


@pytest.mark.parametrize("make", [mamba, mamba2])
def test_layers_without_a_view(xp, make):
    cache = type(make(xp)).init_empty(3)
    assert cache.views == [None] * 3 and len(cache) == 3
    with pytest.raises(ValueError, match="Cache view for layer 1 is None"):
        cache.update_conv_state(1, None, 0)
    with pytest.raises(ValueError, match="Cache view for layer 2 is None"):
        cache.update_ssm_state(2, None)
    with pytest.raises(IndexError):
        cache.update_ssm_state(3, None)
    assert cache.reset() == cache
    cache[1] = make(xp)[1]
    assert cache[1].layer_index == 1
    with pytest.raises(IndexError):
        cache[3]
    with pytest.raises(IndexError):
        cache[3] = None


def test_clear(xp):
    cache = mamba(xp)
    view = cache[0]
    assert cache.nbytes == 2 * view.nbytes and cache.clear() is cache
    assert cache == MambaCache.init_empty(2) and cache.nbytes == 0 and view.nbytes


def test_no_keys_and_values(xp):
    for make in (mamba, mamba2):
        with pytest.raises(NotImplementedError, match="append_conv_state, update_conv_state, update_ssm_state"):
            make(xp)[0].concatenate_to_cache(1, key=2)


# ---- what every class can do -----------------------------------------------------------------------------

def test_replace(xp):
    metadata = MambaCacheMetaData.create(1, None, **SIZES)
    assert metadata.replace() is metadata
    other = metadata.replace(batch_size=9)
    assert (other.batch_size, metadata.batch_size) == (9, 2) and other != metadata
    with pytest.raises(TypeError, match="unknown"):
        metadata.replace(unknown=1)
    view = mamba(xp)[0]
    assert view.replace(layer_index=5).conv_states is view.conv_states


def test_metadata_is_plain_json():
    metadata = Mamba2CacheMetaData.create(None, np.int64(3), **SIZES2)
    assert json.loads(metadata.to_json()) == {"partition_axis": None, "num_hidden_layers": 3, **SIZES2}
    assert list(metadata.to_dict()) == ["partition_axis", "num_hidden_layers", *SIZES2]
    assert Mamba2CacheMetaData.from_json(metadata.to_json(indent=2)) == metadata
    assert Mamba2CacheMetaData.from_dict({**metadata.to_dict(), "what": 1}) == metadata   # unknown keys are ignored
    with pytest.raises(TypeError, match="batch_size"):
        Mamba2CacheMetaData.from_dict({"num_hidden_layers": 3})
    with pytest.raises(TypeError, match="to_dict: partition_axis must be .* got object; replace it by None first"):
        metadata.replace(partition_axis=object()).to_dict()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("make", [mamba, mamba2])
def test_nothing_is_lost_in_json(xp, make, dtype):
    cache = filled(xp, make(xp, dtype=dtype, ssm_dtype=dtype))
    cache.views.append(None)
    for back in (type(cache).from_json(cache.to_json(), xp=xp.module),
                 type(cache).from_dict(cache.to_dict(), xp=xp.module)):
        assert back == cache and type(back[0]) is type(cache[0]) and back[0].metadata == cache[0].metadata
        assert back[0].conv_states.dtype == dtype_of(dtype) and back[2] is None
        assert isinstance(back[0].conv_states, xp.module.ndarray)
        assert_same_bits(xp.numpy(back[1].ssm_states), xp.numpy(cache[1].ssm_states))
        back.reset()   # its arrays are writeable and its own
        assert back != cache
    metadata = cache.to_dict()["views"][0]["metadata"]
    assert metadata == cache[0].metadata.to_dict()
    assert json.JSONEncoder().default.__qualname__ == "JSONEncoder.default"   # nobody else's JSON changed


def test_large_arrays_are_whole():
    view = MambaCacheView.init(MambaCacheMetaData.create(1, None, 4, 500, 3, 4), None, "float32")
    view.conv_states[...] = np.arange(8000, dtype=np.float32).reshape(4, 500, 4)
    assert_same_bits(MambaCacheView.from_json(view.to_json()).conv_states, view.conv_states)
    view.conv_states = view.conv_states.astype(">f4")
    assert_same_bits(MambaCacheView.from_json(view.to_json()).conv_states, view.conv_states.astype("<f4"))


def test_dtypes_and_tuples_come_back():
    """dtypes by their names; a tuple as a list, which is equal to it."""
    for dtype in (np.float16, np.dtype("float32"), dtype_of("bfloat16"), dtype_of("bfloat16").type):
        made = cupyattn.AttentionMetadata(dtype, dtype)
        back = cupyattn.AttentionMetadata.from_json(made.to_json())
        assert back == made and back.runtime_dtype == np.dtype(dtype) and made.to_dict()["runtime_dtype"] == {
            "dtype": np.dtype(dtype).name}
    assert cupyattn.AttentionMetadata(np.float16) != cupyattn.AttentionMetadata(np.float32)
    made = MambaCacheMetaData.create(1, (("dp", "fsdp"), "tp"), **SIZES)
    back = MambaCacheMetaData.from_json(made.to_json())
    assert back == made and back.partition_axis == [["dp", "fsdp"], "tp"]
    assert back != made.replace(partition_axis=(("dp", "tp"), "tp"))


def test_a_field_that_is_a_tuple_comes_back_as_one():
    @dataclasses.dataclass(eq=False, repr=False)
    class Axes(Record):
        plain: tuple
        of_int: tuple[int, ...]
        listed: list

    made = Axes((1, 2), (3,), [4])
    back = Axes.from_json(made.to_json())
    assert (back.plain, back.of_int, back.listed) == ((1, 2), (3,), [4]) and made.to_dict()["plain"] == [1, 2]


def test_missing_fields_get_defaults():
    data = Mamba2CacheView.init(Mamba2CacheMetaData.create(None, 1, **SIZES2), layer_index=4).to_dict()
    assert Mamba2CacheView.from_dict(data).layer_index == 4
    del data["layer_index"]
    assert Mamba2CacheView.from_dict(data).layer_index is None


@pytest.mark.parametrize("make", [mamba, mamba2])
def test_pure(xp, make):
    cache = filled(xp, make(xp))
    pure, metadata = cache.to_pure()
    assert metadata is cache[1].metadata and pure[0][:2] == [cache[0].conv_states, cache[0].ssm_states]
    assert len(pure[0]) == (3 if make is mamba else 4)
    back = type(cache).from_pure(pure, metadata)
    assert back == cache and [view.layer_index for view in back.views] == [0, 1]
    assert back[0].conv_states is cache[0].conv_states
    assert type(cache).init_empty(2).to_pure() == ([None, None], None)
    cache[0].metadata = metadata.replace(batch_size=9)
    assert cache.to_pure()[1] is metadata   # the last layer's
    assert type(cache).from_pure([None, pure[1]], metadata)[0] is None


def test_equality_looks_at_every_byte(xp):
    cache = filled(xp, mamba(xp))
    assert cache == cache.copy() and not cache != cache.copy()
    other = cache.copy()
    other[1].ssm_states[1, 2, 4] = 7
    assert cache != other and cache[0] == other[0] and cache != 3
    assert mamba(xp, dtype="float16") != mamba(xp, dtype="bfloat16")
    assert mamba(xp) != mamba(xp, layers=1) and MambaMetadata() == MambaMetadata() != Mamba2Metadata()


def test_to_another_kind_of_array(xp):
    here = filled(xp, mamba2(xp))
    host = here.to(np)
    assert isinstance(host[0].ssm_states, np.ndarray) and host == here and host.to(xp.module) == here
    assert here.to(xp.module) is here and (host is here) == (xp.name == "numpy")


def test_repr(xp):
    view = mamba2(xp, dtype="bfloat16")[1].update_ssm_state(xp.array(np.ones((2, 4, 3, 5), np.float32)))
    lines = repr(view).splitlines()
    assert lines[0] == "Mamba2CacheView(" and lines[1] == "  conv_states : bfloat16[2, 32, 4]"
    assert "  metadata : Mamba2CacheMetaData(...)" in lines and "  layer_index : 1" in lines
    assert str(view) == repr(view) and len(lines) == 8
    assert "  partition_axis : str(...)" in repr(view.metadata.replace(partition_axis="x" * 300))


def test_empty_metadata_classes():
    for kind in (MambaMetadata, Mamba2Metadata):
        assert kind().to_dict() == {} and kind.from_json(kind().to_json()) == kind() and kind().replace() == kind()


def test_exports():
    assert {name for name in cupyattn.caches.__all__} <= {*cupyattn.__all__}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_convolution_s_kernel_moves_the_window_as_append_does(dtype):
    """`causal_conv1d_update` on the view's own array, for one token and for several."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((3, 4)).astype(dtype_of(dtype))
    view = MambaCacheView.init(MambaCacheMetaData.create(1, None, **SIZES), None, dtype)
    other = view.copy()
    for shape in ((2, 3), (2, 3, 2), (2, 3), (2, 3, 6)):
        x = rng.standard_normal(shape).astype(dtype_of(dtype))
        cupyattn.causal_conv1d_update(x, view.conv_states, weight)
        assert view == other.append_conv_state(x)


@pytest.mark.parametrize("make", [mamba, mamba2])
def test_states_are_the_pools_of_the_ops(xp, make):
    """`selective_state_update` on the view's own array, by slots: the state of the others keeps its bits."""
    view = filled(xp, make(xp))[1]
    before, rng = xp.numpy(view.ssm_states), np.random.default_rng(1)
    if make is mamba:
        shapes = [(1, 3), (1, 3), (3, 5), (1, 5), (1, 5)]
    else:
        shapes = [(1, 4, 3), (1, 4), (4,), (1, 2, 5), (1, 2, 5)]
    x, dt, a, b, c = (rng.uniform(0.1, 1, shape).astype(np.float32) for shape in shapes)
    cupyattn.selective_state_update(view.ssm_states, *map(xp.array, (x, dt, -a, b, c)),
                                    state_batch_indices=xp.array(np.int32([1])))
    after = xp.numpy(view.ssm_states)
    assert_same_bits(after[0], before[0])
    if make is mamba:
        want = np.exp(-a * dt[0, :, None]) * before[1] + (dt * x)[0, :, None] * b[0]
    else:
        want = (np.exp(-a * dt[0])[:, None, None] * before[1]
                + (dt[0, :, None] * x[0])[:, :, None] * b[0].repeat(2, 0)[:, None])
    assert np.abs(after[1] - want).max() < 1e-6
