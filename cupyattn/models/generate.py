# SPDX-License-Identifier: Apache-2.0
"""Prefill, batched decoding and sampling. Logits come to the host; everything from there is float64, row by row."""

import time
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..graphs import BoundSteps
from ..paging.pages import PageManager
from ..paging.sequence import PageSequence
from .gguf import ModelError
from .llama import PREFILL_CHUNK, to_host


class Token(NamedTuple):
    """One generated token."""

    id: int
    text: str  # what became printable with it; the pieces of all tokens make up the completion's text
    logprob: float  # natural log-softmax at temperature 1
    top5: list  # the five likeliest (id, logprob), best first; all of a smaller vocabulary


@dataclass
class Completion:
    """What `generate` returns for one prompt.

    Its first reused_tokens prompt tokens were in the cache already and were not computed again. Of its pages
    shared_pages are an earlier prompt's, the others its own.
    """

    prompt_ids: list
    tokens: list = field(default_factory=list)
    finished: bool = False
    started: float = 0.0  # clock after the prompt's first token, seconds
    ended: float = 0.0
    prefill_seconds: float = 0.0
    reused_tokens: int = 0
    shared_pages: int = 0
    own_pages: int = 0

    @property
    def text(self):
        """Text of all tokens."""
        return "".join(token.text for token in self.tokens)

    @property
    def tokens_per_s(self):
        """Decoding speed: tokens after the first per second; a lone token is timed with its prefill."""
        if len(self.tokens) > 1:
            return (len(self.tokens) - 1) / (self.ended - self.started)
        return 1.0 / self.prefill_seconds


@dataclass
class _Sequence:
    ids: list  # prompt, then generated tokens
    cached: PageSequence  # those whose keys and values are in the cache


def log_softmax(logits):
    """Natural log-softmax of each row, float64; a row's result does not depend on the other rows."""
    result = np.empty(logits.shape, np.float64)
    for row, out in zip(logits, result, strict=True):
        np.subtract(row, row.max(), out=out, dtype=np.float64)
        out -= np.log(np.exp(out).sum())
    return result


class _Forecast(NamedTuple):
    """What a run will need."""

    limits: list  # tokens to generate for each prompt
    num_pages: int  # of the cache
    max_pages: int  # width of every block table
    chunks: set  # lengths of prefill steps
    copies: bool  # whether begun pages are copied


def forecast(model, prompts, max_new_tokens, page_size, share_prefix):
    """What `generate` will need, from a run without arrays, in which no prompt ends early."""
    # The last token generated is never fed back, so a full context still yields one.
    limits = [min(max_new_tokens, model.config.context_length - len(ids) + 1) for ids in prompts]
    lengths = [len(ids) + limit - 1 for ids, limit in zip(prompts, limits, strict=True)]
    widths = [-(-length // page_size) for length in lengths]
    pages, sequences, chunks, copies = PageManager(sum(widths), page_size), [], set(), False
    for ids, length in zip(prompts, lengths, strict=True):
        sequence = pages.sequence(ids[:-2], share_prefix=share_prefix)
        sequences.append(sequence)   # which holds its pages
        found = sequence.num_tokens
        copies |= bool(sequence.reserve(length - found))
        sequence.append(ids[found:])
        chunks |= set(_chunks(len(ids) - found))
    return _Forecast(limits, pages.capacity - pages.num_free, max(widths, default=1), chunks, copies)


def check_prompts(model, prompts):
    """Raise ModelError or ValueError unless every prompt, a list of token ids, fits the model."""
    c = model.config
    for n, ids in enumerate(prompts, 1):
        if len(ids) > c.context_length:
            raise ModelError(f"prompt {n} has {len(ids)} tokens, more than the model's context of {c.context_length}")
        if len(ids) == 0:
            raise ModelError(f"prompt {n} is empty: it must have at least one token")
        if min(ids) < 0 or max(ids) >= c.vocab_size:
            raise ValueError(f"prompt {n} must hold token ids from 0 to {c.vocab_size - 1}, "
                             f"got {min(ids)} to {max(ids)}")


def _forward(model, sequences, cache, q_len, max_pages):
    """Feed the next `q_len` tokens of every sequence; their hidden rows [batch * q_len, hidden]."""
    params = cache.step([sequence.cached for sequence in sequences], q_len, max_pages=max_pages)
    ids = [s.ids[s.cached.num_tokens:s.cached.num_tokens + q_len] for s in sequences]
    return model.forward(model.xp.asarray(np.int32(ids).reshape(-1)), params, cache)


def _chunks(count):
    """Lengths of prefill steps over `count` tokens. None is 1: the kernel for that, decoding's, rounds otherwise."""
    while count:
        size = min(PREFILL_CHUNK, count)
        size -= count - size == 1
        yield size
        count -= size


def _start(cache, ids, share_prefix):
    """_Sequence of a prompt, with what is in the cache of it; at least its last 2 tokens are to be fed."""
    return _Sequence([int(id) for id in ids], cache.pages.sequence(ids[:-2], share_prefix=share_prefix))


def _prefill(model, sequence, cache, max_pages):
    """Feed a prompt alone, in chunks; yields the hidden rows of each chunk."""
    for q_len in _chunks(len(sequence.ids) - sequence.cached.num_tokens):
        begin = sequence.cached.num_tokens
        hidden = _forward(model, [sequence], cache, q_len, max_pages)
        sequence.cached.append(sequence.ids[begin:begin + q_len])
        yield hidden


class Decoding:
    """Steps over the last token of some sequences. All they read changes in place, so their launches are kept."""

    def __init__(self, model, sequences, cache, max_pages):
        self.sequences = sequences
        self._model, self._cache, self._max_pages = model, cache, max_pages
        self._ids = model.xp.zeros(len(sequences), np.int32)
        self._params = self._schedule = None
        self._steps = BoundSteps(model.xp)

    def step(self):
        """Scores [sequences, vocabulary] of the next token; those of the step before are overwritten."""
        cached = [sequence.cached for sequence in self.sequences]
        self._params = self._cache.step(cached, 1, max_pages=self._max_pages, out=self._params)
        self._schedule = self._model.schedule(self._params, self._cache, out=self._schedule)
        self._ids[...] = self._model.xp.asarray(np.int32([sequence.ids[-1] for sequence in self.sequences]))
        logits = self._steps.run((), self._forward)
        for sequence in self.sequences:
            # by another name than a prompt's, so that no page of a prompt, with other roundings, takes the place of
            # theirs
            sequence.cached.append([~sequence.ids[-1]])
        return logits

    def _forward(self):
        hidden = self._model.forward(self._ids, self._params, self._cache, self._schedule)
        return self._model.logits(hidden)


def prompt_rows(model, ids, page_size):
    """Hidden rows of every token of a prompt, chunk by chunk."""
    needed = forecast(model, [ids], 1, page_size, share_prefix=False)
    cache = model.new_cache(needed.num_pages, page_size)
    yield from _prefill(model, _start(cache, ids, share_prefix=False), cache, needed.max_pages)


class _Sampler:
    """Turns a row of logits into a Token. Its random numbers depend on seed and prompt, not on the batch."""

    def __init__(self, model, prompt_ids, temperature, seed):
        from .tokenizer import TextStream

        self._temperature = temperature
        self._rng = np.random.default_rng([seed, *prompt_ids])
        self._stream = TextStream(model.tokenizer) if model.tokenizer else None

    def __call__(self, logits):
        (logprobs,) = log_softmax(logits[None])
        best = np.argpartition(-logprobs, min(5, len(logprobs) - 1))[:5]
        best = best[np.lexsort((best, -logprobs[best]))]
        if self._temperature == 0:
            id = int(best[0])
        else:
            scaled = (logprobs - logprobs.max()) / self._temperature
            cumulative = np.cumsum(np.exp(scaled))
            id = int(np.searchsorted(cumulative, self._rng.random() * cumulative[-1], side="right"))
        text = self._stream.push(id) if self._stream else ""
        return Token(id, text, float(logprobs[id]), [(int(i), float(logprobs[i])) for i in best])

    def finish(self):
        """Text still held back."""
        return self._stream.finish() if self._stream else ""


def generate(model, prompts, *, max_new_tokens=64, temperature=0.0, seed=0, ignore_eos=False, page_size=16,
             share_prefix=True, on_token=None, progress=None):
    """Continue several prompts together in one paged cache.

    Each prompt is prefilled alone, then all are decoded together and leave the batch as they finish. Tokens with which
    an earlier prompt began, too, are not computed again; whole pages of them are in the cache once. What a prompt gets
    does not depend, bit for bit, on the prompts beside it.

    Parameters
    ----------
    model : Llama
    prompts : list of str or of sequences of int
        Texts, used as they are (no chat template), or token ids.
    max_new_tokens : int
        Per prompt; also ends at the model's context. Default 64.
    temperature : float
        0 (default) takes the likeliest token; otherwise samples from ``softmax(logits / temperature)``.
    seed : int
        Of the sampling, not negative.
    ignore_eos : bool
        Go on after an end-of-text token, which otherwise is the last token and has no text.
    page_size : int
        Tokens per page of the KV cache. Default 16.
    share_prefix : bool
        False: every prompt is computed from its first token on, on pages of its own.
    on_token : callable, optional
        ``on_token(index, token, finished)`` for every token as it comes, `index` being the prompt's.
    progress : callable, optional
        See `Llama.warm_up`.

    Returns
    -------
    list of Completion

    Raises
    ------
    ModelError
        A prompt that is empty or longer than the context.
    """
    if max_new_tokens < 1 or page_size < 1 or not temperature >= 0 or seed < 0:
        raise ValueError("generate: max_new_tokens and page_size must be at least 1, temperature and seed at least 0, "
                         f"got {max_new_tokens}, {page_size}, {temperature} and {seed}")
    prompts = [model.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompts]
    model.warm_up(prompts, page_size=page_size, share_prefix=share_prefix, progress=progress)
    needed = forecast(model, prompts, max_new_tokens, page_size, share_prefix)
    sequences, cache = [], model.new_cache(needed.num_pages, page_size)
    completions = [Completion(ids) for ids in prompts]
    samplers = [_Sampler(model, ids, temperature, seed) for ids in prompts]
    stop_ids = model.tokenizer.eos_ids if model.tokenizer and not ignore_eos else frozenset()

    def take(index, logits):
        """Sample the next token of prompt `index` and record it."""
        completion, sequence = completions[index], sequences[index]
        token = samplers[index](logits)
        completion.finished = token.id in stop_ids or len(completion.tokens) + 1 == needed.limits[index]
        if completion.finished:
            token = token._replace(text=token.text + samplers[index].finish())
            completion.own_pages = len(sequence.cached.pages) - completion.shared_pages
            sequence.cached.free()
        sequence.ids.append(token.id)
        completion.tokens.append(token)
        completion.ended = time.perf_counter()
        if on_token is not None:
            on_token(index, token, completion.finished)

    for index, ids in enumerate(prompts):
        begin = time.perf_counter()
        sequence = _start(cache, ids, share_prefix)
        sequences.append(sequence)
        completions[index].reused_tokens = sequence.cached.num_tokens
        completions[index].shared_pages = sequence.cached.num_tokens // page_size
        *_, hidden = _prefill(model, sequence, cache, needed.max_pages)
        take(index, to_host(model.logits(hidden[-1:]))[0])
        completions[index].prefill_seconds = time.perf_counter() - begin
    for completion in completions:
        completion.started = time.perf_counter()
    decoding = None
    while active := [n for n, completion in enumerate(completions) if not completion.finished]:
        if decoding is None or len(decoding.sequences) > len(active):
            decoding = Decoding(model, [sequences[n] for n in active], cache, needed.max_pages)
        for index, logits in zip(active, to_host(decoding.step()), strict=True):
            take(index, logits)
    return completions
