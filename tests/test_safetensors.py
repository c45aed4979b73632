# SPDX-License-Identifier: Apache-2.0
"""Files of safetensors, whole, in shards and damaged, written by the package of that name; matrices out of them."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from compare import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import gptq, mixed

from cupyattn import QMatrix
from cupyattn.quant import Safetensors
from cupyattn.quant.safetensors_file import write

RNG = np.random.default_rng(7)
DTYPES = ("bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "float32",
          "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")


def random(shape, dtype):
    dtype = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    return RNG.integers(0, 2, (*shape, dtype.itemsize), np.uint8).view(dtype)[..., 0]


def every_dtype():
    return {f"layer.{name}": random((3, 5), name) for name in DTYPES} | {
        "number": np.array(3, np.float32), "empty": np.zeros((0, 4), np.int8)}


@pytest.mark.parametrize("write_file", [safetensors.numpy.save_file, lambda tensors, path: write(path, tensors)],
                         ids=["package", "ours"])
def test_every_dtype(tmp_path, write_file):
    tensors = every_dtype()
    write_file(tensors, tmp_path / "a.safetensors")
    file = Safetensors(tmp_path / "a.safetensors")
    assert set(file) == set(tensors) and len(file) == len(tensors)
    for name, expected in tensors.items():
        assert_same_bits(file[name], expected)
        assert file[name].flags.aligned


def test_the_package_reads_what_we_write(tmp_path):
    tensors = {name: array for name, array in every_dtype().items() if "float8" not in name}
    write(tmp_path / "a.safetensors", tensors, {"kind": "x"})
    found = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    assert set(found) == set(tensors)
    for name, expected in tensors.items():
        assert_same_bits(found[name], expected)
    assert Safetensors(tmp_path / "a.safetensors").metadata == {"kind": "x"}


def in_shards(folder, tensors, shards=2):
    """A model's folder, tensor i in file i modulo `shards`."""
    places = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        safetensors.numpy.save_file({name: np.array(tensors[name], order="C") for name in tensors
                                     if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return places


def test_shards(tmp_path):
    tensors = every_dtype()
    places = in_shards(tmp_path, tensors)
    (tmp_path / "consolidated.safetensors").write_bytes(b"not in the index")
    for path in (tmp_path, tmp_path / "model.safetensors.index.json", str(tmp_path)):
        folder = Safetensors(path)
        assert folder.folder == tmp_path
        for name, expected in tensors.items():
            assert_same_bits(folder[name], expected)
    (tmp_path / places["number"]).unlink()
    folder = Safetensors(tmp_path)    # the other shard can still be read
    for name, place in places.items():
        if place == places["number"]:
            with pytest.raises(FileNotFoundError, match=place):
                folder[name]
        else:
            folder[name]


def test_folders_without_an_index(tmp_path):
    with pytest.raises(ValueError, match="holds no .safetensors file"):
        Safetensors(tmp_path)
    safetensors.numpy.save_file({"a": np.zeros(1)}, tmp_path / "one.safetensors")
    safetensors.numpy.save_file({"b": np.ones(1)}, tmp_path / "two.safetensors")
    assert sorted(Safetensors(tmp_path)) == ["a", "b"]
    safetensors.numpy.save_file({"a": np.ones(1)}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match="holds a twice, in one.safetensors and two.safetensors"):
        Safetensors(tmp_path)
    safetensors.numpy.save_file({"c": np.ones(1)}, tmp_path / "model.safetensors")
    assert list(Safetensors(tmp_path)) == ["c"]


@pytest.mark.parametrize(("text", "message"), [
    ("{}", "must have a weight_map"), ("[1]", "must be an object"), ("{", "cannot be read"),
    ('{"weight_map": {"a": 1}}', "must have a weight_map")])
def test_odd_indexes(tmp_path, text, message):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Safetensors(tmp_path)


def test_an_index_that_is_wrong(tmp_path):
    safetensors.numpy.save_file({"a": np.zeros(1)}, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"b": "one.safetensors"}}')
    with pytest.raises(ValueError, match="one.safetensors lacks tensor b, which model.safetensors.index.json says"):
        Safetensors(tmp_path)["b"]


def file_of(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"a.weight": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


@pytest.mark.parametrize(("content", "message"), [
    (b"", "is truncated: it has 0 bytes"), (b"1234567", "is truncated: it has 7 bytes"),
    (b"PK\x03\x04" + bytes(60), "is not a safetensors file"), (b"version https://git-lfs", "is not a safetensors file"),
    (file_of(b"[1, 2]"), "is not a safetensors file"), (file_of(b"{]"), "its JSON cannot be read"),
    (struct.pack("<Q", 500) + b"{", "is truncated: its header ends at byte 508, the file at 9"),
    (file_of(entry(), bytes(7)), "is truncated: tensor a.weight ends at byte [0-9]+, the file at [0-9]+"),
    (file_of(entry(shape=(3,)), bytes(8)), r"a.weight, F32 \[3\], must have 12 bytes, got 8"),
    (file_of(entry(offsets=(8, 0)), bytes(8)), "header of tensor a.weight must have dtype"),
    (file_of(entry(shape=(-1, -2)), bytes(8)), "header of tensor a.weight must have dtype"),
    (file_of(entry(shape=("x",)), bytes(8)), "header of tensor a.weight must have dtype"),
    (file_of(entry(offsets=(0, 8, 9)), bytes(8)), "header of tensor a.weight must have dtype"),
    (file_of(entry(offsets=(0.0, 8.0)), bytes(8)), "header of tensor a.weight must have dtype"),
    (file_of({"a.weight": 5}), "header of tensor a.weight must have dtype")])
def test_damaged_files(tmp_path, content, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Safetensors(path)


def test_a_dtype_numpy_has_not(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(file_of(entry("F4", (4,), (0, 2)), bytes(2)))
    with pytest.raises(NotImplementedError, match="tensor a.weight must be one of BOOL, .*, got F4"):
        Safetensors(tmp_path)["a.weight"]


def test_a_tensor_at_an_odd_address(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(file_of(entry() | {"b": entry("U8", (1,), (8, 9))["a.weight"]} |
                                                     {"c": entry("F32", (1,), (9, 13))["a.weight"]},
                                                     struct.pack("<2fBf", 1, 2, 3, 4)))
    file = Safetensors(tmp_path)
    assert file["a.weight"].tolist() == [1, 2] and file["c"].tolist() == [4] and file["c"].flags.aligned


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_damaged_headers_never_crash(tmp_path_factory, data):
    whole = safetensors.numpy.save({"a.weight": np.ones((2, 3), np.float32), "b": np.arange(5)})
    at = data.draw(st.integers(0, 150))
    damaged = bytearray(whole)
    damaged[at:at + 1] = data.draw(st.binary(max_size=2))
    path = tmp_path_factory.mktemp("damaged") / "a.safetensors"
    path.write_bytes(damaged)
    try:
        file = Safetensors(path)
        for name in file:
            file[name]
    except (ValueError, NotImplementedError):
        pass


# ---- matrices --------------------------------------------------------------------------------------------------


def model(folder, layers, config=None, shards=2):
    in_shards(folder, {f"model.layers.0.{layer}.{name}": array for layer, tensors in layers.items()
                       for name, array in tensors.items()}, shards)
    if config:
        (folder / "config.json").write_text(json.dumps(config))


def test_layers_by_prefix(tmp_path):
    tensors, weight = gptq(48, 128)
    dense = RNG.standard_normal((16, 64)).astype(ml_dtypes.bfloat16)
    blocks = {"up_blocks": RNG.integers(0, 256, (2, 8, 4, 16), np.uint8),
              "up_scales": RNG.integers(120, 130, (2, 8, 4), np.uint8), "up_bias": np.zeros((2, 8), np.float32)}
    model(tmp_path, {"self_attn.q_proj": tensors, "self_attn.q": {"weight": dense, "bias": dense[0]},
                     "experts": blocks}, {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    at = "model.layers.0."
    found = QMatrix.from_safetensors(tmp_path, at + "self_attn.q_proj")
    assert found.format == "gptq" and found.shape == (48, 128)
    np.testing.assert_allclose(found.reconstruct(), weight, rtol=1e-6)
    folder = Safetensors(tmp_path)
    assert_same_bits(QMatrix.from_safetensors(folder, at + "self_attn.q").reconstruct(),
                     dense.astype(np.float32))
    assert set(folder.layer(at + "experts.up")) == {"blocks", "scales"}
    assert QMatrix.from_safetensors(folder, at + "experts.up").format == "mxfp4"
    assert QMatrix.from_safetensors(folder, at + "experts.up").shape == (16, 128)


def test_fp8_that_is_not_finite_names_its_layer(tmp_path):
    codes = np.zeros((16, 64), np.uint8)
    codes[3, [1, 5]] = 0x7F, 0xFF
    model(tmp_path, {"mlp.up_proj": {"weight": codes.view(ml_dtypes.float8_e4m3fn),
                                     "weight_scale": np.ones(1, np.float32)}})
    with pytest.raises(ValueError, match="weight must hold finite numbers only, got 2 codes of 1024 that are NaN "
                                         ".layer model.layers.0.mlp.up_proj of "):
        QMatrix.from_safetensors(tmp_path, "model.layers.0.mlp.up_proj")


def test_prefixes_that_are_none(tmp_path):
    tensors, _ = gptq(16, 64)
    model(tmp_path, {"self_attn.q_proj": tensors, "norm": {"weight": np.ones(8, np.float16)},
                     "moe": {"something": np.ones(8)}})
    for prefix in ("model.layers.0.self_attn.qproj", "model.layers.0.self_attn", "model.layers.0.self_attn.q_pro"):
        with pytest.raises(ValueError, match="QMatrix: prefix must be that of a layer in .*, got '.*'; close are "
                                             "model.layers.0.self_attn.q_proj"):
            QMatrix.from_safetensors(tmp_path, prefix)
    with pytest.raises(ValueError, match="q_weight.*|known format, got something .layer model.layers.0.moe of"):
        QMatrix.from_safetensors(tmp_path, "model.layers.0.moe")
    with pytest.raises(ValueError, match=r"w must be \[out_features, in_features\]"):
        QMatrix.from_safetensors(tmp_path, "model.layers.0.norm")
    with pytest.raises(KeyError, match="holds no tensor model.layers.0.norm.bias; close are model.layers.0.norm.we"):
        Safetensors(tmp_path)["model.layers.0.norm.bias"]
    with pytest.raises(ValueError, match="bits must follow from the shapes .* and K = 128"):
        QMatrix.from_safetensors(tmp_path, "model.layers.0.self_attn.q_proj", shape=(16, 128))


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json", "config.json"])
def test_where_the_configuration_is(tmp_path, name):
    """FP8 blocks of 64 x 32, which only the configuration tells from 128 x 128."""
    weight = RNG.standard_normal((128, 128)).astype(ml_dtypes.float8_e4m3fn)
    scale = RNG.uniform(1, 2, (2, 4)).astype(np.float32)
    model(tmp_path, {"a": {"weight": weight, "weight_scale_inv": scale}}, {"model_type": "llama"})
    with pytest.raises(ValueError, match="weight_scale_inv must have shape"):
        QMatrix.from_safetensors(tmp_path, "model.layers.0.a")
    config = {"weight_block_size": [64, 32]}
    if name == "config.json":
        config = {"model_type": "llama", "quantization_config": config}
    if name == "hf_quant_config.json":
        config = {"quantization": config}
    (tmp_path / name).write_text(json.dumps(config))
    found = QMatrix.from_safetensors(tmp_path, "model.layers.0.a").reconstruct()
    expected = weight.astype(np.float32) * np.repeat(np.repeat(scale, 64, axis=0), 32, axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("scheme", ["int4-g64-asym", "fp8", "nf4", "nvfp4", "dense"])
def test_save_and_load(tmp_path, scheme):
    w = RNG.standard_normal((40, 200)).astype(np.float32)
    matrix = QMatrix.from_dense(w) if scheme == "dense" else QMatrix.quantize(w, scheme)
    path = tmp_path / "w.safetensors"
    matrix.save(path)
    found = QMatrix.load(path)
    assert (found.format, found.shape, repr(found)) == (matrix.format, matrix.shape, repr(matrix))
    for before, after in zip(matrix.segments, found.segments, strict=True):
        assert (before.form, before.columns) == (after.form, after.columns)
        for name in ("codes", "scales", "supers"):
            one, other = getattr(before, name), getattr(after, name)
            assert (one is None) == (other is None)
            if one is not None:
                assert_same_bits(other, one)
                assert other.ctypes.data % 16 == 0 and not other.flags.owndata
    x = RNG.standard_normal((3, 200)).astype(np.float32)
    assert_same_bits(found.matmul(x), matrix.matmul(x))


@pytest.mark.parametrize("change", [{"order": None}, {"order": lambda order: order[:-64]},
                                    {"order": lambda order: order + 1}, {"order": lambda order: order.astype(np.int64)},
                                    {"codes.1": lambda codes: codes[:-1]}, {"scales.0": None}])
def test_arrays_load_refuses(tmp_path, change):
    mixed().save(tmp_path / "w.safetensors")
    file, ((name, edit),) = Safetensors(tmp_path / "w.safetensors"), change.items()
    arrays = dict(file)
    array = arrays.pop(name)
    if edit is not None:
        arrays[name] = edit(array)
    write(tmp_path / "odd.safetensors", arrays, file.metadata)
    with pytest.raises(ValueError, match="damaged|do not fit each other"):
        QMatrix.load(tmp_path / "odd.safetensors")


def test_save_keeps_order_and_segments(tmp_path):
    matrix = mixed()
    matrix.save(tmp_path / "w.safetensors")
    found = QMatrix.load(tmp_path / "w.safetensors")
    assert len(found.segments) == 2
    assert_same_bits(found.order, matrix.order)
    assert_same_bits(found.reconstruct(), matrix.reconstruct())


@pytest.mark.parametrize(("change", "message"), [
    ({"version": "0"}, "must hold layout version 1, got 0 in .*; save it again"), ({"kind": "x"}, "of QMatrix.save"),
    ({"matrix": "{"}, "damaged"), ({"matrix": "{}"}, "damaged"),
    ({"matrix": lambda text: text.replace("40, 128", "80, 128")}, "do not fit each other"),
    ({"matrix": lambda text: text.replace('"bits": 4', '"bits": 8')}, "do not fit each other")])
def test_files_load_refuses(tmp_path, change, message):
    path = tmp_path / "w.safetensors"
    QMatrix.quantize(RNG.standard_normal((40, 128)).astype(np.float32), "int4-g64").save(path)
    file = Safetensors(path)
    metadata = {name: change.get(name, text) if not callable(change.get(name)) else change[name](text)
                for name, text in file.metadata.items()}
    write(tmp_path / "odd.safetensors", dict(file), metadata)
    with pytest.raises(ValueError, match=message):
        QMatrix.load(tmp_path / "odd.safetensors")
