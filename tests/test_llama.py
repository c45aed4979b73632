# SPDX-License-Identifier: Apache-2.0
"""SmolLM2 through the kernels against an independent float64 forward, and the promises of `generate`."""

import dataclasses
import functools

import llama_float64
import numpy as np
import pytest
from llama_float64 import PROMPTS, smollm2_path

from cupyattn import runtime
from cupyattn.models import GGUF, SMOLLM2_135M, Llama, ModelError, random_llama
from cupyattn.models.generate import Decoding
from cupyattn.models.weights import random_tensors

SMALL = dataclasses.replace(SMOLLM2_135M, num_layers=2, vocab_size=640, context_length=40)


@functools.cache
def smollm2(dtype="float16", kv_dtype=None):
    return Llama.load(smollm2_path(), dtype=dtype, kv_dtype=kv_dtype)


@functools.cache
def prompt_ids():
    """64 tokens of each prompt."""
    return [smollm2().tokenizer.encode(text)[:64] for text in PROMPTS]


@functools.cache
def truth():
    """float64 log-probabilities of `prompt_ids`, computed once."""
    return llama_float64.log_probs(prompt_ids())


@pytest.mark.parametrize(("dtype", "kv_dtype", "max_error", "median_error"), [
    ("float16", None, 3e-2, 3e-3), ("bfloat16", None, 0.3, 2e-2), ("float32", None, 2e-4, 2e-5)])
def test_logprobs_against_float64(dtype, kv_dtype, max_error, median_error):
    model, errors = smollm2(dtype, kv_dtype), []
    for ids, expected in zip(prompt_ids(), truth(), strict=True):
        found = model.logprobs(ids)
        assert found.shape == (64, 49152) and found.dtype == np.float64
        assert np.allclose(np.exp(found).sum(axis=-1), 1.0, atol=1e-9)
        rows = np.arange(63)
        errors.append(np.abs(found - expected)[rows, ids[1:]])
    errors = np.concatenate(errors)
    print(f"{dtype}: max {errors.max():.2e}, median {np.median(errors):.2e}")
    assert errors.max() <= max_error
    assert np.median(errors) <= median_error


@pytest.mark.parametrize(("kv_dtype", "max_error", "median_error"), [
    ("int8", 0.4, 0.02), ("hadamard8/hadamard4", 1.6, 0.08), ("int8_channel", 0.7, 0.04),
    *(pytest.param(*case, marks=pytest.mark.full) for case in (
        ("hadamard8", 0.25, 0.015), ("fp8_e4m3", 1.1, 0.05), ("hadamard6", 1.3, 0.05), ("int8_symmetric", 1.3, 0.08),
        ("fp8_e5m2", 4.0, 0.11), ("hadamard4", 5.0, 0.22), ("int4", 10.0, 0.34)))])
def test_quantized_caches(kv_dtype, max_error, median_error):
    """Distance of the next token's log-probability from the float64 forward: what README says of each format."""
    errors = [np.abs(smollm2("float16", kv_dtype).logprobs(ids) - expected)[np.arange(63), ids[1:]]
              for ids, expected in zip(prompt_ids(), truth(), strict=True)]
    print(f"{kv_dtype}: max {np.max(errors):.2g}, median {np.median(errors):.2g}")
    assert np.max(errors) <= max_error
    assert np.median(errors) <= median_error


@pytest.mark.parametrize("name", ["int7", "int8/int7", "float16/int8", "float16/float32", "int8/int8/int8", ""])
def test_kv_dtypes_that_are_refused(name):
    with pytest.raises(ValueError, match="Llama: kv_dtype must be one of float16, .* as K/V, got '"):
        random_llama(dataclasses.replace(SMALL, num_layers=1), seed=1, kv_dtype=name or "/")


@pytest.mark.parametrize(("dtype", "kv_dtype", "max_error"), [("float16", "float32", 3e-2),
                                                              ("float32", "float16", 3e-2),
                                                              ("float16", "bfloat16", 0.3)])
def test_cache_of_another_dtype(dtype, kv_dtype, max_error):
    ids = prompt_ids()[0][:20]
    found = smollm2(dtype, kv_dtype).logprobs(ids)
    assert np.abs(found - truth()[0][:20])[np.arange(19), ids[1:]].max() <= max_error


def test_greedy_tokens_are_the_likeliest_of_the_float64_forward():
    ids = smollm2().tokenizer.encode("The capital of France is")
    (completion,) = smollm2("float32").generate(["The capital of France is"], max_new_tokens=12)
    assert completion.text == " Paris.\n\nThe answer is: 201"
    assert completion.prompt_ids == ids
    chosen = [token.id for token in completion.tokens]
    (expected,) = llama_float64.log_probs([[*ids, *chosen]])
    rows = np.arange(len(ids) - 1, len(ids) - 1 + len(chosen))
    assert expected[rows].argmax(axis=-1).tolist() == chosen
    assert np.abs([token.logprob for token in completion.tokens] - expected[rows, chosen]).max() < 2e-4
    for row, token in zip(rows, completion.tokens, strict=True):
        best = np.argsort(-expected[row])[:5]
        assert [id for id, _ in token.top5] == best.tolist()
        assert np.abs([logprob for _, logprob in token.top5] - expected[row, best]).max() < 2e-4


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_together_equals_alone_bit_for_bit(temperature):
    """Prompts of 1, 10 and 23 tokens; the first to end leaves the batch."""
    prompts = [prompt_ids()[0][:10], prompt_ids()[1][:1], prompt_ids()[2][:23]]
    options = dict(temperature=temperature, seed=3, max_new_tokens=10, page_size=5)
    together = smollm2().generate(prompts, **options)
    for prompt, found in zip(prompts, together, strict=True):
        (alone,) = smollm2().generate([prompt], **options)
        assert found.tokens == alone.tokens  # ids, texts, log-probabilities and top 5, all exact


def test_a_prompt_that_ends_leaves_the_batch(monkeypatch):
    model, batches, step = smollm2(), [], Decoding.step
    monkeypatch.setattr(Decoding, "step", lambda self: batches.append(len(self.sequences)) or step(self))
    polite = "<|im_start|>user\nSay hi<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n<|im_start|>user\nBye" \
             "<|im_end|>\n<|im_start|>assistant\nGoodbye!"
    model.warm_up([model.tokenizer.encode(polite)])
    batches.clear()
    ended, full = model.generate([polite, "1, 2, 3,"], max_new_tokens=12)
    assert ended.tokens[-1].id == 2 and ended.tokens[-1].text == "" and len(ended.tokens) < 12
    assert len(full.tokens) == 12
    together = len(ended.tokens) - 1
    assert batches == [2] * together + [1] * (11 - together)  # one step for each token after the first
    (longer,) = model.generate([polite], max_new_tokens=12, ignore_eos=True)
    assert len(longer.tokens) == 12
    assert [t.id for t in longer.tokens][:len(ended.tokens)] == [t.id for t in ended.tokens]


def test_launches_of_decoding_are_kept(monkeypatch):
    """A step's Python runs twice for a batch; tokens are those of steps with all of it, which a profile sees."""
    model, prompts = random_llama(SMALL, seed=1), [list(range(3, 14)), [5, 6, 7]]
    forward, tokens = Llama.forward, []
    monkeypatch.setattr(Llama, "forward", lambda self, ids, *args: tokens.append(len(ids)) or
                        forward(self, ids, *args))
    model.warm_up(prompts, page_size=3)
    tokens.clear()
    kept = model.generate(prompts, max_new_tokens=20, page_size=3)
    assert tokens == [11, 3, 2, 2]
    tokens.clear()
    with runtime.profiling():
        plain = model.generate(prompts, max_new_tokens=20, page_size=3)
    assert tokens == [11, 3] + 19 * [2]
    assert [completion.tokens for completion in kept] == [completion.tokens for completion in plain]


def test_page_size_and_unused_slots_change_no_bit(monkeypatch):
    model = random_llama(SMALL, seed=1)
    prompt = list(range(3, 14))
    expected = model.generate([prompt], max_new_tokens=6, page_size=16)[0].tokens
    new_cache = Llama.new_cache

    def poisoned(self, num_pages, page_size):
        cache = new_cache(self, num_pages, page_size)
        for layer in (*cache.k, *cache.v):
            layer[...] = np.nan
        return cache

    monkeypatch.setattr(Llama, "new_cache", poisoned)
    for page_size in (1, 3, 64):
        assert model.generate([prompt], max_new_tokens=6, page_size=page_size)[0].tokens == expected


def alike(length, *ends):
    """Prompts with the same `length` tokens at their beginning."""
    beginning = [3 + n * n % 600 for n in range(length)]
    return [[*beginning, *end] for end in ends]


@pytest.mark.parametrize(("dtype", "kv_dtype"), [("float16", None), ("float32", "int8"),
                                                 ("float16", "hadamard8/hadamard4")])
def test_sharing_prefixes_changes_no_bit(dtype, kv_dtype):
    """Whole pages, begun pages, whole prompts, prompts that are the beginning of another, and tokens one by one."""
    model = random_llama(SMALL, 1, dtype=dtype, kv_dtype=kv_dtype)
    prompts = [*alike(20, [50, 51, 52], [60], [50, 51, 52], [50, 51, 52, 53, 54]), *alike(6, [], [9]), [7]]
    options = dict(max_new_tokens=7, page_size=4)
    shared = model.generate(prompts, **options)
    alone = model.generate(prompts, share_prefix=False, **options)
    for found, expected in zip(shared, alone, strict=True):
        assert found.tokens == expected.tokens            # ids, log-probabilities and top 5
    assert [c.reused_tokens for c in shared] == [0, 19, 20, 23, 4, 4, 0]
    assert [c.shared_pages for c in shared] == [0, 4, 5, 5, 1, 1, 0]
    assert all(c.shared_pages + c.own_pages == d.own_pages for c, d in zip(shared, alone, strict=True))
    assert [c.reused_tokens + c.shared_pages for c in alone] == [0] * 7


def test_shared_pages_need_no_room_of_their_own(monkeypatch):
    """The cache is as large as what the prompts need together, also when some end at once or are longer than a step."""
    model, sizes = random_llama(dataclasses.replace(SMALL, context_length=600), seed=1), []
    new_cache = Llama.new_cache
    monkeypatch.setattr(Llama, "new_cache", lambda self, pages, size: sizes.append(pages) or
                        new_cache(self, pages, size))
    prompts = alike(300, [1, 2], [3], [4, 5, 6])
    model.warm_up(prompts, page_size=16)
    found = {}
    for share, pages in ((True, 19 + 2 * 1), (False, 3 * 19)):
        sizes.clear()
        found[share] = model.generate(prompts, max_new_tokens=2, page_size=16, share_prefix=share)
        assert sizes[-1] == pages == sum(c.own_pages for c in found[share])
    assert [c.reused_tokens for c in found[True]] == [0, 299, 300]
    for shared, alone in zip(found[True], found[False], strict=True):
        assert [token.id for token in shared.tokens] == [token.id for token in alone.tokens]
    (once, *_) = model.generate(prompts, max_new_tokens=1, page_size=16)   # all are freed as they are prefilled
    assert once.tokens == [found[True][0].tokens[0]]


def test_a_prompt_that_goes_on_as_another_was_continued():
    """What was generated and the same as a prompt are not taken for each other: their kernels round differently."""
    model = random_llama(SMALL, seed=1)
    (prompt,) = alike(10, [])
    (first,) = model.generate([prompt], max_new_tokens=12, page_size=4)
    longer = [*prompt, *(token.id for token in first.tokens[:9])]
    together = model.generate([prompt, longer], max_new_tokens=12, page_size=4)
    assert together[0].tokens == first.tokens
    assert together[1].tokens == model.generate([longer], max_new_tokens=12, page_size=4)[0].tokens


def test_drafts_that_are_refused_leave_no_trace():
    """Verifying 5 drafted tokens at once and taking back 3 gives the bits of feeding 2, also where pages are shared."""
    model, rows = random_llama(SMALL, seed=1, kv_dtype="hadamard8"), []
    (prompt,) = alike(11, [])
    for drafts in ([[20, 21, 22, 23, 24], [30, 31]], [[20, 21], [30, 31]]):
        cache = model.new_cache(9, 4)
        first = cache.pages.sequence()
        logits(model, cache, first, prompt)
        sequence = first.fork()
        logits(model, cache, sequence, drafts[0])
        sequence.truncate(len(prompt) + 2)
        rows.append(logits(model, cache, sequence, drafts[1]))
        cache.defragment()
        rows[-1] = np.stack([rows[-1], logits(model, cache, first, [30, 31])])
    assert np.array_equal(rows[0], rows[1])


def logits(model, cache, sequence, ids):
    """Of the last token of `ids`, which go on `sequence`."""
    hidden = model.forward(np.int32(ids), cache.step([sequence], len(ids)), cache)
    sequence.append(ids)
    return model.logits(hidden[-1:])


def test_logprobs_do_not_depend_on_the_chunking():
    """Row i of a long prompt equals the last row of the prompt cut there: decoding sees what prefill saw."""
    model = random_llama(SMALL, seed=2)
    ids = list(range(5, 24))
    whole = model.logprobs(ids)
    for length in (1, 8, 9, 16):
        assert np.array_equal(model.logprobs(ids[:length]), whole[:length])


def test_random_llama(xp):
    """The same weights from the same seed on every kind of array; sane distributions."""
    ids = [7, 8, 9, 600, 0, 1, 2, 3, 4, 5]
    expected = random_llama(SMALL, seed=5).logprobs(ids)
    found = random_llama(SMALL, seed=5, xp=xp.module).logprobs(ids)
    assert np.abs(found - expected).max() < 3e-2
    other = random_llama(SMALL, seed=6).logprobs(ids)
    assert np.abs(other - expected).max() > 0.1
    assert np.isfinite(expected).all() and expected.std(axis=-1).min() > 0.1


def test_rounded_layers(xp):
    """Layers are read back, rounded and packed again on every kind of array."""
    tensors, ids = random_tensors(SMALL, 5), [7, 8, 9, 600, 0]
    expected = Llama(SMALL, tensors, quantize="int4-g64").logprobs(ids)
    found = Llama(SMALL, tensors, quantize="int4-g64", xp=xp.module).logprobs(ids)
    assert np.abs(found - expected).max() < 3e-2
    assert np.abs(Llama(SMALL, tensors).logprobs(ids) - expected).max() > 0.1


def test_warm_up_compiles_everything(monkeypatch, tmp_path):
    model = random_llama(SMALL, seed=1)
    prompts = [[1, 2, 3], list(range(13)), [*range(10), 5, 6]]
    seen = []
    model.warm_up(prompts, page_size=4, progress=lambda done, total, spec: seen.append((done, total)))
    assert seen == [(n, len(seen) - 1) for n in range(len(seen))] and len(seen) > 1
    monkeypatch.setenv("CUPYATTN_FORBID_COMPILE", "1")
    monkeypatch.setenv("CUPYATTN_CACHE_DIR", str(tmp_path))
    assert [len(c.tokens) for c in model.generate(prompts, max_new_tokens=5, page_size=4)] == [5, 5, 5]


def test_generation_stops_at_the_context():
    model = random_llama(SMALL, seed=1)
    full, room = model.generate([[1] * 40, [1] * 38], max_new_tokens=9)
    assert (len(full.tokens), len(room.tokens)) == (1, 3)
    with pytest.raises(ModelError, match="prompt 2 has 41 tokens, more than the model's context of 40"):
        model.generate([[1], [1] * 41])


@pytest.mark.parametrize(("prompt", "options", "error", "message"), [
    ([], {}, ModelError, "prompt 1 is empty"), ([640], {}, ValueError, "token ids from 0 to 639, got 640"),
    ([1], {"max_new_tokens": 0}, ValueError, "max_new_tokens"), ([1], {"temperature": -1}, ValueError, "temperature"),
    ([1], {"temperature": float("nan")}, ValueError, "temperature"), ([1], {"page_size": 0}, ValueError, "page_size"),
    ([1], {"page_size": 10**12}, ModelError, "no memory for a KV cache of 1 pages of 1000000000000 tokens"),
    ([1], {"page_size": 10**30}, ModelError, "no memory for a KV cache")])
def test_generate_refuses(prompt, options, error, message):
    with pytest.raises(error, match=message):
        random_llama(dataclasses.replace(SMALL, num_layers=1), seed=1).generate([prompt], **options)


def test_sampling_follows_the_distribution():
    from cupyattn.models.generate import _Sampler

    logits = np.log(np.float32([0.5, 0.3, 0.1, 0.05, 0.03, 0.02]))
    model = random_llama(dataclasses.replace(SMALL, num_layers=1), seed=1)
    sample = _Sampler(model, [1], 1.0, seed=0)
    counts = np.bincount([sample(logits).id for _ in range(4000)], minlength=6) / 4000
    assert np.abs(counts - np.exp(logits)).max() < 0.03
    cold = _Sampler(model, [1], 0.1, seed=0)
    assert np.mean([cold(logits).id == 0 for _ in range(500)]) > 0.98  # 1 / (1 + 0.6 ** 10) = 0.994
    assert sample(logits).logprob <= 0 and sample(logits).top5[0][0] == 0


def test_a_vocabulary_of_fewer_than_five_tokens():
    from cupyattn.models.generate import _Sampler

    sample = _Sampler(random_llama(dataclasses.replace(SMALL, num_layers=1), seed=1), [1], 0.0, seed=0)
    assert [id for id, _ in sample(np.float32([1, 3, 2])).top5] == [1, 2, 0]


def test_on_token_tells_every_token_as_it_comes():
    seen = []
    completions = random_llama(SMALL, seed=1).generate(
        [[1, 2], [3]], max_new_tokens=4, on_token=lambda index, token, finished: seen.append((index, token, finished)))
    for index, completion in enumerate(completions):
        mine = [(token, finished) for i, token, finished in seen if i == index]
        assert [token for token, _ in mine] == completion.tokens
        assert [finished for _, finished in mine] == [False, False, False, True]
        assert completion.tokens_per_s > 0


@pytest.mark.parametrize(("change", "message"), [
    ({"token_embd.weight": None}, "token_embd.weight is missing"),
    ({"token_embd.weight": lambda t: t._replace(type="IQ2_XS")}, "type must be one of Q4_0, Q4_1, .*, got 'IQ2_XS'"),
    ({"token_embd.weight": lambda t: t._replace(shape=(576, 49152))}, r"must have shape \[49152, 576\]"),
    ({"output_norm.weight": lambda t: t._replace(type="F16")}, "must be F32")])
def test_unusable_tensors(change, message):
    tensors = dict(GGUF(smollm2_path()).tensors)
    for name, edit in change.items():
        tensor = tensors.pop(name)
        if edit:
            tensors[name] = edit(tensor)
    with pytest.raises(ModelError, match=message):
        Llama(SMOLLM2_135M, tensors)


def test_a_tensor_nobody_reads_is_refused():
    file = GGUF(smollm2_path())
    tensors = file.tensors | {"blk.0.attn_q.bias": file.tensors["output_norm.weight"]}
    with pytest.raises(ModelError, match="blk.0.attn_q.bias is not part"):
        Llama(SMOLLM2_135M, tensors)


def test_configuration_is_read_from_the_file():
    config = smollm2().config
    assert config.rms_eps == pytest.approx(SMOLLM2_135M.rms_eps, rel=1e-6)
    assert dataclasses.replace(config, rms_eps=1e-5) == SMOLLM2_135M


@pytest.mark.parametrize(("change", "message"), [
    ({"general.architecture": "mamba"}, "must be llama, got mamba"),
    ({"general.architecture": np.arange(2)}, "general.architecture must be a string"),
    ({"llama.block_count": None}, "llama.block_count is missing"),
    ({"llama.expert_count": 8}, "mixture-of-experts"),
    ({"llama.expert_count": np.int32([8, 8])}, "llama.expert_count must be an integer"),
    ({"llama.rope.scaling.type": "yarn"}, "must be none or linear, got yarn"),
    ({"llama.rope.scaling.type": 1}, "llama.rope.scaling.type must be a string, got 1"),
    ({"llama.attention.head_count": 0}, "llama.attention.head_count must be from 1 to 2147483647, got 0"),
    ({"llama.attention.head_count": np.int32([9] * 30)}, "head_count must be an integer, got an array"),
    ({"llama.attention.head_count": 2.5}, "head_count must be an integer, got 2.5"),
    ({"llama.attention.head_count_kv": 2}, "head_count_kv must divide the 9 heads, got 2"),
    ({"llama.attention.key_length": 257}, "key_length .* must be a multiple of 8 from 8 to 256, got 257"),
    ({"llama.attention.head_count": 600}, "key_length .* must be a multiple of 8 from 8 to 256, got 0"),
    ({"llama.block_count": -1}, "llama.block_count must be from 1 to 2147483647, got -1"),
    ({"llama.context_length": 1 << 63}, "llama.context_length must be from 1 to 2147483647"),
    ({"llama.attention.layer_norm_rms_epsilon": "small"}, "rms_epsilon must be a number, got 'small'"),
    ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "rms_epsilon must be finite"),
    ({"llama.vocab_size": 49153}, "llama.vocab_size must be the number of tokenizer.ggml.tokens, 49152, got 49153"),
    ({"tokenizer.ggml.tokens": 5}, "tokenizer.ggml.tokens must be a list of strings, got 5"),
    ({"llama.rope.dimension_count": 0}, "llama.rope.dimension_count must be from 2 to the 64 of a head, got 0"),
    ({"llama.rope.dimension_count": 63}, "llama.rope.dimension_count.*must be even"),
    ({"llama.rope.freq_base": 0.0}, "llama.rope.*freq_base.*base must be finite and greater than 1, got 0"),
    ({"llama.rope.freq_base": True}, "llama.rope.freq_base must be a number, got True"),
    ({"llama.rope.scaling.factor": 0}, "llama.rope.*factor must be finite and greater than 0, got 0")])
def test_configurations_that_are_refused(change, message):
    from cupyattn.models.config import config_from

    with pytest.raises(ModelError, match=message):
        config_from(GGUF(smollm2_path()).metadata | change)


@pytest.mark.full
def test_checked():
    """The whole step in the checking mode, and over another order of threads."""
    expected = random_llama(SMALL, seed=1).logprobs(range(11))
    with runtime.cpu.settings(check=True):
        found = random_llama(SMALL, seed=1).logprobs(range(11), page_size=3)
    with runtime.cpu.settings(check=True, schedule="reverse"):
        assert np.array_equal(random_llama(SMALL, seed=1).logprobs(range(11), page_size=3), found)
    assert np.abs(found - expected).max() < 3e-2


def test_profile_names_every_op():
    with runtime.profiling() as profile:
        random_llama(SMALL, seed=1).generate([[1, 2, 3]], max_new_tokens=2)
    names = " ".join(name for name, _, _ in profile.rows())
    for op in ("embedding", "rms_norm", "quant_gemm", "kv_append", "attention", "paged_decode", "silu_mul"):
        assert op in names
