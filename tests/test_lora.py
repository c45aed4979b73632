# SPDX-License-Identifier: Apache-2.0
"""LoRA of attention layers: several at once, one for each sequence, ExLlamaV2's function, PEFT's files, refusals."""

import json

import ml_dtypes
import numpy as np
import pytest
from attention_layers import Layer
from compare import assert_same_bits
from conftest import CupyArrays, NumpyArrays

import cupyattn
from cupyattn import LoRA, PagedCache, Params, load_lora
from cupyattn.graphs import capture
from cupyattn.quant.safetensors_file import write


@pytest.fixture(params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def here(request):
    """As `xp`, without the stand-in."""
    return NumpyArrays() if request.param == "numpy" else CupyArrays()


def adapter(layer, rank, projections="qkvo", seed=0, scale=0.7, dtype="float32"):
    rng = np.random.default_rng(seed)
    shapes = {p: layer.matrices[p].shape for p in projections}
    return {p: LoRA(rng.standard_normal((rank, shape[1])).astype(dtype) / 8,
                    rng.standard_normal((shape[0], rank)).astype(dtype) / 2, scale) for p, shape in shapes.items()}


def product(loras):
    """What the adapter adds to each weight."""
    return {p: lora.scale * lora.b.astype(np.float64) @ lora.a.astype(np.float64) for p, lora in loras.items()}


def cache_for(layer, batch):
    return PagedCache.contiguous(1, batch, 32, layer.kv_heads, layer.dim, dtype=layer.dtype, xp=layer.xp.module)


def check_steps(layer, adapters, batch, names_of, **options):
    """Prefill and decode with adapters; `names_of`: those of each sequence, as the float64 layer takes them."""
    cache, keys, values = cache_for(layer, batch), layer.no_past(batch), layer.no_past(batch)
    for q_len in (5, 1):
        x, past = layer.inputs(batch, q_len), len(keys[0])
        loras = [[product(adapters[name]) for name in names] for names in names_of]
        want, keys, values = layer.expected(x, keys, values, loras=loras)
        got = layer.xp.array(x)
        layer.attn.forward(got, Params(batch, q_len, past), cache, 0, **layer.tables, **options)
        layer.check(got, want, 1.5)


LAYERS = {
    "float32": {}, "fp16": {"dtype": "float16", "formats": "int4-g32", "biases": True},
    "post-norm": {"dtype": "float16", "post": True}, "layer norms": {"norm": "layer", "post": True},
    "fp32 residual": {"dtype": "float16", "residual_fp32": True},
    "fp32 residual, no norm": {"dtype": "float16", "residual_fp32": True, "norm": None},
    "no residual": {"has_residual": False}, "no residual, post-norm": {"has_residual": False, "post": True},
    "head norms": {"head_norm": "heads", "formats": ("int8", "float16", "float16", "int8")}}


@pytest.mark.parametrize("name", LAYERS)
def test_adapters_of_all_sequences(here, name):
    """Ranks 3 and 16 and another projections each, summed; before a post-norm, not after."""
    layer = Layer(here, **LAYERS[name])
    adapters = {"a": adapter(layer, 3), "b": adapter(layer, 16, "kvo", 1), "c": adapter(layer, 1, "q", 2), "none": {}}
    assert layer.attn.set_loras(adapters) == 16
    check_steps(layer, adapters, 2, [["b", "a"]] * 2, loras=("b", "a"))
    check_steps(layer, adapters, 2, [["c"]] * 2, loras=["c", "none"])
    check_steps(layer, adapters, 2, [[]] * 2)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("chosen", [(None, "a", "b", "b"), ("b", None, "a", "b"), ("b", "b", "b", "b"),
                                    (None, None, None, None), ("c", "none", "b", None)])
def test_an_adapter_for_each_sequence(here, name, chosen):
    layer = Layer(here, **LAYERS[name])
    adapters = {"a": adapter(layer, 3), "b": adapter(layer, 16, "kvo", 1), "none": {}, "c": adapter(layer, 8, "q", 2)}
    layer.attn.set_loras(adapters)
    check_steps(layer, adapters, 4, [[n] if n else [] for n in chosen], sequence_loras=chosen)
    check_steps(layer, adapters, 4, [["a", *([n] if n else [])] for n in chosen], sequence_loras=chosen, loras=["a"])


def test_on_every_kind_of_array(xp):
    layer = Layer(xp, dtype="float16", formats="int4-g32")
    adapters = {"a": adapter(layer, 3), "b": adapter(layer, 8, "ko", 1)}
    layer.attn.set_loras(adapters)
    check_steps(layer, adapters, 3, [["a", "b"], ["a"], ["a", "a"]], loras=["a"], sequence_loras=["b", None, "a"])


def test_a_sequence_gets_what_it_gets_alone(here):
    """Bit for bit: neither the others nor their adapters matter."""
    layer = Layer(here, dtype="float16")
    adapters = {"a": adapter(layer, 4), "b": adapter(layer, 16, seed=1)}
    layer.attn.set_loras(adapters)
    x, chosen = layer.inputs(4, 3), ["b", "a", None, "b"]
    together, cache = here.array(x), cache_for(layer, 4)
    layer.attn.forward(together, Params(4, 3, 0), cache, 0, **layer.tables, sequence_loras=chosen, invariant=True)
    for b in range(4):
        alone = here.array(x[b:b + 1])
        layer.attn.forward(alone, Params(1, 3, 0), cache_for(layer, 1), 0, **layer.tables,
                           sequence_loras=chosen[b:b + 1], invariant=True)
        assert_same_bits(here.numpy(alone)[0], here.numpy(together)[b])
    halves = here.array(x)
    q, k, v = layer.attn.forward_1(halves, 4, 3, 0, **layer.tables, sequence_loras=chosen)
    assert_same_bits(here.numpy(halves), x)
    assert_same_bits(here.numpy(k), here.numpy(cache.k[0])[:, :3])


@pytest.mark.parametrize("name", ["float32", "fp16", "no residual, post-norm"])
def test_adapters_of_rank_one(here, name):
    """Alone, and beside one of many; a name that comes twice is added twice."""
    layer = Layer(here, **LAYERS[name])
    adapters = {"one": adapter(layer, 1), "many": adapter(layer, 24, "qo", 1)}
    assert layer.attn.set_loras({"one": adapters["one"]}) == 1
    check_steps(layer, adapters, 2, [["one"]] * 2, loras=["one"])
    check_steps(layer, adapters, 2, [["one"], []], sequence_loras=["one", None])
    assert layer.attn.set_loras(adapters) == 24
    check_steps(layer, adapters, 2, [["one", "one"]] * 2, loras=("one", "one"))
    check_steps(layer, adapters, 3, [["many"], ["one"], []], sequence_loras=np.array(["many", "one", None], object))


def test_no_adapters(here):
    """None at all, or those that have no weights for the layer: the bits of a layer that never had any."""
    layer, plain = (Layer(here, dtype="float16", post=True) for _ in range(2))
    x = layer.inputs(2, 3)
    want = here.numpy(plain.attn.forward(here.array(x), Params(2, 3, 0), cache_for(layer, 2), 0, **layer.tables))
    calls = [{}, {"loras": []}, {"sequence_loras": [None, None]}]
    for given in ({}, {"a": {}, 0: {}}):
        assert layer.attn.set_loras(given) == 0
        calls += [{"loras": ["a"]}, {"sequence_loras": [0, "a"]}, {"loras": [0], "sequence_loras": ["a", None]}] \
            if given else []
        for options in calls:
            got = here.array(x)
            layer.attn.forward(got, Params(2, 3, 0), cache_for(layer, 2), 0, **layer.tables, **options)
            assert_same_bits(here.numpy(got), want)


def test_matrices_of_other_dtypes(here):
    """Those of one adapter need not have one, nor that of the layer; they may lie where the layer is not."""
    layer = Layer(here, dtype="float16")
    mixed = {p: LoRA(lora.a.astype(a), lora.b.astype(b), lora.scale) for (p, lora), a, b in zip(
        adapter(layer, 5).items(), ("float16", ml_dtypes.bfloat16, "float32", "float16"),
        (ml_dtypes.bfloat16, "float32", "float16", "float16"), strict=True)}
    assert layer.attn.set_loras({"host": mixed, "device": {p: lora._replace(
        a=here.array(lora.a), b=here.array(np.asfortranarray(lora.b))) for p, lora in mixed.items()}}) == 5
    for name in ("host", "device"):
        check_steps(layer, {name: mixed}, 2, [[name]] * 2, loras=[name])


def test_an_adapter_for_each_of_several_caches(here):
    layer = Layer(here)
    adapters = {"a": adapter(layer, 3), "b": adapter(layer, 8, "kv", 1)}
    layer.attn.set_loras(adapters)
    x, caches = layer.inputs(3, 4), [cache_for(layer, 1) for _ in range(3)]
    names = ["b", None, "a"]
    want, _, _ = layer.expected(x, layer.no_past(3), layer.no_past(3),
                                loras=[[product(adapters[n])] if n else [] for n in names])
    got = here.array(x)
    layer.attn.forward(got, Params(3, 4, [0, 0, 0]), caches, 0, **layer.tables, sequence_loras=names)
    layer.check(got, want, 1.5)


def test_replays_add_the_adapters_of_the_capture(xp):
    layer = Layer(xp, dtype="float16", formats="int4-g32")
    layer.attn.set_loras({"a": adapter(layer, 3), "b": adapter(layer, 8, "ko", 1)})
    params, options = Params(3, 2), {"loras": ["a"], "sequence_loras": ["b", None, "a"], **layer.tables}
    x = xp.array(layer.inputs(3, 2))
    graph = capture(lambda: layer.attn.forward(x, params, **options), xp=xp.module)
    wanted = []
    for rows in (layer.inputs(3, 2), layer.inputs(3, 2)):
        wanted.append((rows, xp.numpy(layer.attn.forward(xp.array(rows), params, **options))))
    layer.attn.set_loras({})
    for rows, want in wanted:
        x[...] = xp.array(rows)
        assert_same_bits(xp.numpy(graph.replay()), want)


def test_function_of_exllamav2(here):
    layer = Layer(here)
    loras = {7: adapter(layer, 4, scale=1.0), 8: adapter(layer, 12, "qo", 1, scale=1.0)}
    dicts = [{key: here.array(np.ascontiguousarray(getattr(lora[p], half).T)) for key, lora in loras.items()
              if p in lora} for p in "qkvo" for half in "ab"]
    assert cupyattn.q_attn_set_loras(layer.attn, *dicts) == 12
    x = layer.inputs(2, 3)
    _, keys, values = layer.expected(x, layer.no_past(2), layer.no_past(2), loras=[[product(a) for a in
                                                                                   loras.values()]] * 2)
    q, k, v = (here.array(np.zeros((2, 3, h, 32), np.float32)) for h in (4, 2, 2))
    scratch = here.array(np.zeros(12 * 6, np.float32))
    cupyattn.q_attn_forward_1(layer.attn, here.array(x), 2, 3, 0, None, q, k, v, *layer.tables.values(),
                              [7, 8, 99], scratch)
    layer.check(k, np.stack(keys), what="keys")
    layer.check(v, np.stack(values), what="values")
    with pytest.raises(ValueError, match="loras_temp must have at least 72 elements, got 71"):
        layer.attn.forward_1(here.array(x), 2, 3, 0, **layer.tables, loras=[7], loras_temp=scratch[:71])
    del dicts[3][7]
    with pytest.raises(ValueError, match="k_proj_lora_b must have 7 like k_proj_lora_a, got none"):
        cupyattn.q_attn_set_loras(layer.attn, *dicts)
    assert cupyattn.q_attn_set_loras(layer.attn, *[{}] * 8) == 0


# ---- files -----------------------------------------------------------------------------------------------


def peft(path, layer, layers=(0, 2), rank=4, config=(), drop=(), extra=(), prefix="base_model.model.model."):
    """A folder as PEFT writes it; returns the matrices."""
    written = {n: adapter(layer, rank, seed=n) for n in layers}
    tensors = {f"{prefix}layers.{n}.self_attn.{p}_proj.lora_{half.upper()}.weight":
               np.ascontiguousarray(getattr(lora, half)) for n, loras in written.items()
               for p, lora in loras.items() for half in "ab"}
    tensors |= dict(extra)
    write(path / "adapter_model.safetensors", {name: a for name, a in tensors.items() if name not in drop})
    (path / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "bias": "none", "use_rslora": False} | dict(config)))
    return written


@pytest.mark.parametrize(("config", "scale"), [({}, 4.0), ({"use_rslora": True}, 8.0), ({"lora_alpha": 1}, 0.25)])
def test_files_of_peft(tmp_path, config, scale):
    layer = Layer(NumpyArrays())
    written = peft(tmp_path, layer, config=config)
    found = load_lora(tmp_path)
    assert sorted(found) == [0, 2] and set(found[2]) == set("qkvo")
    for n, loras in written.items():
        for p, lora in loras.items():
            assert np.array_equal(found[n][p].a, lora.a) and np.array_equal(found[n][p].b, lora.b)
            assert found[n][p].scale == scale
    assert load_lora(tmp_path, scaling=0.5)[0]["q"].scale == scale / 2
    assert layer.attn.set_loras({"file": found[0]}) == 4
    check_steps(layer, {"file": {p: lora._replace(scale=scale) for p, lora in written[0].items()}}, 2, [["file"]] * 2,
                loras=["file"])


def test_patterns_of_ranks_and_alphas(tmp_path):
    layer = Layer(NumpyArrays())
    peft(tmp_path, layer, config={"r": 64, "rank_pattern": {"layers.[02].self_attn.._proj": 4},
                                  "alpha_pattern": {"q_proj": 2, "model.layers.2.self_attn.k_proj": 40}})
    found = load_lora(tmp_path)
    assert found[0]["q"].scale == 0.5 and found[2]["k"].scale == 10 and found[0]["k"].scale == 4


MLP = {f"base_model.model.model.layers.{n}.mlp.{m}_proj.lora_{half}.weight": np.zeros(shape, np.float32)
       for n in (0, 2) for m in ("up", "down") for half, shape in (("A", (4, 64)), ("B", (96, 4)))}
MLP["base_model.model.lm_head.weight"] = MLP["base_model.model.model.layers.0.post_attention_layernorm.weight"] = \
    np.zeros((8, 64), np.float32)


def test_modules_beside_attention(tmp_path):
    """Left out only where the caller says so; the message names them and how."""
    layer = Layer(NumpyArrays())
    written = peft(tmp_path, layer, extra=MLP, config={"modules_to_save": ["lm_head"]})
    with pytest.raises(NotImplementedError, match=r"skip_others must be True for .*, to leave out what is not of "
                       "attention, got False for lm_head, mlp.down_proj, mlp.up_proj, post_attention_layernorm$"):
        load_lora(tmp_path)
    found = load_lora(tmp_path, skip_others=True)
    assert sorted(found) == [0, 2] and set(found[0]) == set("qkvo")
    assert np.array_equal(found[2]["v"].b, written[2]["v"].b)
    with pytest.raises(TypeError, match="load_lora: skip_others must be True or False, got 1"):
        load_lora(tmp_path, skip_others=1)
    with pytest.raises(TypeError, match="load_lora: scaling must be a number, got str"):
        load_lora(tmp_path, scaling="1")


def test_defaults_of_peft(tmp_path):
    """r and lora_alpha are 8 where the file does not say; fields that mean nothing for the result are not looked at."""
    layer = Layer(NumpyArrays())
    peft(tmp_path, layer, rank=4, config={"rank_pattern": {}, "alpha_pattern": None, "lora_dropout": 0.1,
                                          "layer_replication": None, "use_dora": None, "loftq_config": {},
                                          "init_lora_weights": "gaussian", "target_modules": ["q_proj"],
                                          "inference_mode": True, "layers_to_transform": [0, 2]})
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    del config["lora_alpha"]
    file.write_text(json.dumps(config))
    assert load_lora(tmp_path)[0]["q"].scale == 2
    del config["r"]
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="must have the rank 8 of adapter_config.json, got 4"):
        load_lora(tmp_path)
    peft(tmp_path, layer, rank=8)
    file.write_text("{}")
    assert load_lora(tmp_path)[2]["o"].scale == 1
    file.write_text('{"rank_pattern": {"o_proj": 8}, "r": 8, "use_rslora": true, "alpha_pattern": {"v_proj": 16}}')
    found = load_lora(tmp_path)[0]
    assert (found["v"].scale, found["q"].scale) == (16 / 8**0.5, 8 / 8**0.5)


def tensor(name, *shape):
    return {"extra": {f"base_model.model.{name}": np.zeros(shape or (4, 64), np.float32)}}


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"config": {"peft_type": "IA3"}}, NotImplementedError, "peft_type of .* must be 'LORA', got 'IA3'"),
    ({"config": {"use_dora": True}}, NotImplementedError, "use_dora of .* must be False"),
    ({"config": {"bias": "all"}}, NotImplementedError, "bias of .* must be 'none', got 'all'"),
    ({"config": {"bias": "lora_only"}}, NotImplementedError, "bias of .* must be 'none', got 'lora_only'"),
    ({"config": {"lora_bias": True}}, NotImplementedError, "lora_bias of .* must be False, got True"),
    ({"config": {"layer_replication": [[0, 4], [2, 5]]}}, NotImplementedError,
     r"layer_replication of .* must be None, got \[\[0, 4\], \[2, 5\]\]"),
    ({"config": {"alora_invocation_tokens": [1]}}, NotImplementedError, "alora_invocation_tokens of .* must be None"),
    ({"config": {"use_qalora": True}}, NotImplementedError, "use_qalora of .* must be False"),
    ({"config": {"init_lora_weights": "pissa_niter_16"}}, NotImplementedError,
     "init_lora_weights of .* must leave the model's own weights as they are, got 'pissa_niter_16'"),
    ({"config": {"r": 8}}, ValueError, "_proj.lora_A.weight must have the rank 8 of adapter_config.json, got 4"),
    ({"config": {"rank_pattern": {"layers.2.*o_proj": 16}}}, ValueError,
     "layers.2.self_attn.o_proj.lora_A.weight must have the rank 16 of"),
    ({"config": {"rank_pattern": {"(": 16}}}, ValueError, r"rank_pattern of .* must hold regular expressions, got"),
    ({"config": {"rank_pattern": ["q_proj"]}}, ValueError, r"rank_pattern of .* must hold an object, got \['q_proj'\]"),
    ({"config": {"alpha_pattern": 3}}, ValueError, "alpha_pattern of .* must hold an object, got 3"),
    ({"config": {"alpha_pattern": {"o_proj": None}}}, TypeError, "lora_alpha of .* must be a number, got NoneType"),
    ({"rank": 0}, ValueError, r"lora_A.weight must be \[rank, in\] and .* \[out, rank\], got \[0, 64\] and \["),
    ({"config": {"lora_alpha": "16"}}, TypeError, "lora_alpha of adapter_config.json must be a number, got str"),
    ({"drop": ["base_model.model.model.layers.2.self_attn.v_proj.lora_B.weight"]}, ValueError,
     "must have lora_B beside .*layers.2.self_attn.v_proj.lora_A.weight, got none"),
    (tensor("model.layers.0.mlp.up_proj.lora_A.weight"), NotImplementedError,
     "skip_others must be True .* got False for mlp.up_proj$"),
    (tensor("model.layers.0.self_attn.q_proj.lora_B.weight", 128, 3),
     ValueError, r"lora_A.weight must be \[rank, in\] and .* \[out, rank\], got \[4, 64\] and \[128, 3\]"),
    *((tensor(f"model.layers.0.{name}") | {"skip": True}, NotImplementedError,
       f"tensors of attention in .* must be lora_A and lora_B of q_proj, .*, got .*{name}")
      for name in ("self_attn.q_proj.lora_magnitude_vector", "self_attn.q_proj.lora_B.bias", "self_attn.q_proj.bias",
                   "self_attn.qkv_proj.lora_A.weight", "self_attn.out_proj.lora_A.weight",
                   "encoder_attn.q_proj.lora_A.weight", "linear_attn.in_proj.lora_A.weight")),
    (tensor("vision.layers.0.self_attn.q_proj.lora_A.weight") | {"skip": True}, ValueError,
     "must have one adapter for q_proj of layer 0, got .*model.layers.0.* and .*vision.layers.0")])
def test_files_refused(tmp_path, change, error, message):
    change = dict(change)
    skip_others = change.pop("skip", False)
    peft(tmp_path, Layer(NumpyArrays()), **change)
    with pytest.raises(error, match=f"load_lora: .*{message}"):
        load_lora(tmp_path, skip_others=skip_others)


@pytest.mark.parametrize(("text", "message"), [("{", "adapter_config.json must be JSON, got "),
                                               ("[]", "adapter_config.json must hold an object, got list")])
def test_configs_that_are_none(tmp_path, text, message):
    peft(tmp_path, Layer(NumpyArrays()))
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=f"load_lora: .*{message}"):
        load_lora(tmp_path)


def test_refused():
    layer = Layer(NumpyArrays())
    good = adapter(layer, 4)
    assert layer.attn.set_loras({"good": good}) == 4

    def refused(error, message, loras):
        with pytest.raises(error, match=message):
            layer.attn.set_loras({"bad": loras})

    refused(ValueError, r"loras\['bad'\] must be of projections q, k, v, o, got 'up'", {"up": good["q"]})
    refused(ValueError, r"\['q'\].a must be \[rank, in_features=64\], got \[64, 4\]", {"q": LoRA(good["q"].a.T, 1.0 *
                                                                                               good["q"].b)})
    refused(ValueError, r"\['q'\].b must be \[out_features=128, rank=4\], got \[64, 4\]", {"q": LoRA(good["q"].a,
                                                                                                    good["k"].b)})
    refused(TypeError, r"\['k'\].b must be a NumPy or CuPy array, got NoneType", {"k": LoRA(good["k"].a, None)})
    refused(TypeError, r"\['k'\].a must be a NumPy or CuPy array, got list", {"k": LoRA([[1.0] * 64], good["k"].b)})
    refused(TypeError, r"\['k'\] must be a LoRA of two arrays, got tuple", {"k": (good["k"].a, good["k"].b)})
    refused(ValueError, r"\['k'\].a must be \[rank, in_features=64\], got \[64\]", {"k": LoRA(good["k"].a[0],
                                                                                           good["k"].b[:, :1])})
    refused(ValueError, r"\['k'\].a must be \[rank, in_features=64\], got \[0, 64\]", {"k": LoRA(good["k"].a[:0],
                                                                                              good["k"].b[:, :0])})
    refused(TypeError, r"\['k'\].b must be float16 or bfloat16 or float32, got float64",
            {"k": LoRA(good["k"].a, good["k"].b.astype(float))})
    refused(ValueError, "scale must be a finite float32, got inf", {"k": good["k"]._replace(scale=np.inf)})
    with pytest.raises(ValueError, match=r"adapters must have names other than None, .* got \['a', None\]"):
        layer.attn.set_loras({"a": good, None: good})
    x, params = layer.inputs(2, 1), Params(2, 1, 0)
    for options, message in (({"loras": ["bad"]}, r"loras must be among 'good', got 'bad'; .*set_loras\(\{'bad': \{\}"),
                             ({"sequence_loras": ["good"]}, "a name or None for each of the 2 sequences, got 1"),
                             ({"sequence_loras": ["good", "bad"]}, "sequence_loras must be among 'good', got 'bad'")):
        with pytest.raises(ValueError, match=message):
            layer.attn.forward(x, params, cache_for(layer, 2), 0, **layer.tables, **options)
    layer.attn.set_loras({})
    with pytest.raises(ValueError, match="loras must be among none, got 'good'"):
        layer.attn.forward(x, params, cache_for(layer, 2), 0, **layer.tables, loras=["good"])
