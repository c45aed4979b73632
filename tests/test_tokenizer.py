# SPDX-License-Identifier: Apache-2.0
"""The tokenizer built from SmolLM2's GGUF metadata."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_float64 import PROMPTS, reader, smollm2_path

from cupyattn.models.gguf import GGUF, ModelError
from cupyattn.models.tokenizer import TextStream, Tokenizer


@pytest.fixture(scope="module")
def metadata():
    return GGUF(smollm2_path()).metadata


@pytest.fixture(scope="module")
def tokenizer(metadata):
    return Tokenizer(metadata)


@pytest.fixture(scope="module")
def vocabulary():
    """Token strings as the gguf package reads them."""
    return reader().get_field("tokenizer.ggml.tokens").contents()


def _merge(word, ranks):
    """BPE by its definition: join the neighbours that were merged first, until none is left to join."""
    parts = list(word)
    while True:
        pairs = [ranks.get((a, b), np.inf) for a, b in zip(parts, parts[1:], strict=False)]
        if not pairs or min(pairs) == np.inf:
            return parts
        at = int(np.argmin(pairs))
        parts[at:at + 2] = [parts[at] + parts[at + 1]]


def test_ids_of_a_known_prompt(tokenizer, vocabulary):
    ids = tokenizer.encode("The capital of France is")
    assert [vocabulary[id] for id in ids] == ["The", "Ġcapital", "Ġof", "ĠFrance", "Ġis"]
    assert ids == [504, 3575, 282, 4649, 314]  # what llama.cpp gives
    assert tokenizer.bos_id is None and tokenizer.eos_ids == {2}  # as the metadata says


@pytest.mark.parametrize("text", PROMPTS[:2])
def test_encoding_equals_merging_by_definition(tokenizer, metadata, vocabulary, text):
    ranks = {tuple(merge.split(" ")): n for n, merge in enumerate(metadata["tokenizer.ggml.merges"])}
    words = re.findall(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+|\d| ?(?:_|[^\s\w])+|\s+(?![^\s\d])|\s+", text)
    assert "".join(words) == text
    parts = [part for word in words for part in _merge(word.replace(" ", "Ġ").replace("\n", "Ċ"), ranks)]
    assert [vocabulary[id] for id in tokenizer.encode(text)] == parts


def test_every_byte_level_token_round_trips(tokenizer, vocabulary):
    """A token that is whole characters encodes to ids that decode to the same text."""
    for id in range(0, len(vocabulary), 37):
        text = tokenizer.decode([id])
        if "\ufffd" not in text:
            assert tokenizer.decode(tokenizer.encode(text)) == text, vocabulary[id]


def test_special_tokens_are_recognised_and_print_nothing(tokenizer, vocabulary):
    ids = tokenizer.encode("<|im_start|>user\nHi<|im_end|>")
    assert vocabulary[ids[0]] == "<|im_start|>" and ids[-1] == 2
    assert tokenizer.decode(ids) == "user\nHi"


def test_digits_are_single_tokens(tokenizer, vocabulary):
    assert [vocabulary[id] for id in tokenizer.encode("x1234")] == ["x", "1", "2", "3", "4"]


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.text(st.characters(max_codepoint=0x4FFF, exclude_categories=["Cc", "Cs"]), max_size=40))
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 49151), max_size=20))
def test_stream_equals_decode_for_any_tokens(tokenizer, ids):
    stream = TextStream(tokenizer)
    assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids)


def test_stream_holds_back_incomplete_characters(tokenizer):
    text = "naïve 🦙 façade"
    ids = tokenizer.encode(text)
    assert any("\ufffd" in tokenizer.decode([id]) for id in ids)  # some token ends inside a character
    stream = TextStream(tokenizer)
    pieces = [stream.push(id) for id in ids]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.finish() == ""
    assert stream.push(ids[-1]) == tokenizer.decode(ids[-1:])


def test_stream_flushes_what_never_became_a_character(tokenizer, vocabulary):
    llama = tokenizer.encode("🦙")
    stream = TextStream(tokenizer)
    assert stream.push(llama[0]) == ""
    assert stream.finish() == "\ufffd"


def test_bos_as_the_metadata_says(metadata):
    tokenizer = Tokenizer(metadata | {"tokenizer.ggml.add_bos_token": True})
    assert tokenizer.encode("The")[0] == metadata["tokenizer.ggml.bos_token_id"]


@pytest.mark.parametrize("change", [{"model": "llama"}, {"pre": "qwen2"}, {"merges": None}])
def test_unknown_tokenizers_are_refused(metadata, change):
    with pytest.raises(ModelError, match="tokenizer"):
        Tokenizer(metadata | {"tokenizer.ggml." + key: value for key, value in change.items()})


@pytest.mark.parametrize(("key", "value", "message"), [
    ("pre", ["smollm"], "must be a string"), ("tokens", np.arange(3), "must be a list of strings, got an array"),
    ("tokens", "abc", "must be a list of strings, got 'abc'"), ("merges", 7, "must be a list of strings, got 7"),
    ("merges", ["ab"], "do not fit the tokens"), ("merges", ["zzq qzz"], "do not fit the tokens"),
    ("token_type", np.ones(3, np.int32), r"one number for each of the 49152 tokens, got \[3\]"),
    ("add_bos_token", 1, "must be true or false, got 1"), ("eos_token_id", np.int32([1]), "must be an integer"),
    ("eos_token_id", ["a" * 200], r"must be an integer, got .{,60}$"), ("eot_token_id", True, "must be an integer"),
    ("bos_token_id", 49152, "must be from 0 to 49151, got 49152")])
def test_odd_metadata_is_one_line_that_names_the_key(metadata, key, value, message):
    with pytest.raises(ModelError, match=message) as raised:
        Tokenizer(metadata | {"tokenizer.ggml." + key: value})
    assert "tokenizer.ggml." + key in str(raised.value) and "\n" not in str(raised.value)


def test_text_that_is_no_unicode(tokenizer):
    with pytest.raises(ModelError, match=r"valid UTF-8, got '\\udcff' as character 3"):
        tokenizer.encode("ab\udcffc")


def test_a_token_of_characters_outside_the_byte_alphabet(metadata):
    tokens = list(metadata["tokenizer.ggml.tokens"])
    tokens[-1] = "a東"
    assert Tokenizer(metadata | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": []}).decode(
        [len(tokens) - 1]) == "a東"
