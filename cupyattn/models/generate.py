# SPDX-License-Identifier: Apache-2.0
"""Prefill, batched decoding and sampling. Logits come to the host; everything from there is float64, row by row."""

import time
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .gguf import ModelError
from .llama import PREFILL_CHUNK, step_params, to_host


class Token(NamedTuple):
    """One generated token."""

    id: int
    text: str  # what became printable with it; the pieces of all tokens make up the completion's text
    logprob: float  # natural log-softmax at temperature 1
    top5: list  # the five likeliest (id, logprob), best first; all of a smaller vocabulary


@dataclass
class Completion:
    """What `generate` returns for one prompt."""

    prompt_ids: list
    tokens: list = field(default_factory=list)
    finished: bool = False
    started: float = 0.0  # clock after the prompt's first token, seconds
    ended: float = 0.0
    prefill_seconds: float = 0.0

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
    limit: int  # tokens to generate at most
    max_pages: int  # width of every block table of this run
    pages: list = field(default_factory=list)
    cached: int = 0  # tokens whose keys and values are in the cache


def log_softmax(logits):
    """Natural log-softmax of each row, float64; a row's result does not depend on the other rows."""
    result = np.empty(logits.shape, np.float64)
    for row, out in zip(logits, result, strict=True):
        np.subtract(row, row.max(), out=out, dtype=np.float64)
        out -= np.log(np.exp(out).sum())
    return result


def start(model, prompts, max_new_tokens, page_size):
    """Sequences of token lists and a PagedCache with room for all of them.

    Returns
    -------
    (list of _Sequence, PagedCache)
    """
    # The last token generated is never fed back, so a full context still yields one.
    limits = [min(max_new_tokens, model.config.context_length - len(ids) + 1) for ids in prompts]
    pages = [-(-(len(ids) + limit - 1) // page_size) for ids, limit in zip(prompts, limits, strict=True)]
    sequences = [_Sequence([int(id) for id in ids], limit, max(pages))
                 for ids, limit in zip(prompts, limits, strict=True)]
    return sequences, model.new_cache(sum(pages), page_size)


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


def step_shapes(prompts):
    """The (batch, q_len) steps that `generate` takes: the chunks of every prompt, then ever fewer together."""
    chunks = {(1, min(PREFILL_CHUNK, len(ids) - begin))
              for ids in prompts for begin in range(0, len(ids), PREFILL_CHUNK)}
    return sorted(chunks | {(batch, 1) for batch in range(1, len(prompts) + 1)})


def _advance(model, sequences, cache, q_len):
    """One step over `q_len` tokens of every sequence; their hidden rows [batch * q_len, hidden]."""
    for sequence in sequences:
        if not cache.pages.grow(sequence.pages, sequence.cached + q_len):
            raise MemoryError("generate: the KV cache has no free page left")
    params = step_params(cache, [s.pages for s in sequences], [s.cached for s in sequences], q_len,
                         sequences[0].max_pages)
    ids = np.concatenate([s.ids[s.cached:s.cached + q_len] for s in sequences]).astype(np.int32)
    hidden = model.forward(model.xp.asarray(ids), params, cache)
    for sequence in sequences:
        sequence.cached += q_len
    return hidden


def prefill(model, sequence, cache):
    """Feed the prompt alone, in chunks; yields the hidden rows of each chunk."""
    total = len(sequence.ids)
    while sequence.cached < total:
        yield _advance(model, [sequence], cache, min(PREFILL_CHUNK, total - sequence.cached))


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
             on_token=None, progress=None):
    """Continue several prompts together in one paged cache.

    Each prompt is prefilled alone, then all are decoded together and leave the batch as they finish. What a prompt
    gets does not depend, bit for bit, on the prompts beside it.

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
    model.warm_up(prompts, page_size=page_size, progress=progress)
    sequences, cache = start(model, prompts, max_new_tokens, page_size)
    completions = [Completion(ids) for ids in prompts]
    samplers = [_Sampler(model, ids, temperature, seed) for ids in prompts]
    stop_ids = model.tokenizer.eos_ids if model.tokenizer and not ignore_eos else frozenset()

    def take(index, logits):
        """Sample the next token of prompt `index` and record it."""
        completion, sequence = completions[index], sequences[index]
        token = samplers[index](logits)
        completion.finished = token.id in stop_ids or len(completion.tokens) + 1 == sequence.limit
        if completion.finished:
            token = token._replace(text=token.text + samplers[index].finish())
            cache.pages.free(sequence.pages)
        sequence.ids.append(token.id)
        completion.tokens.append(token)
        completion.ended = time.perf_counter()
        if on_token is not None:
            on_token(index, token, completion.finished)

    for index, sequence in enumerate(sequences):
        begin = time.perf_counter()
        *_, hidden = prefill(model, sequence, cache)
        take(index, to_host(model.logits(hidden[-1:]))[0])
        completions[index].prefill_seconds = time.perf_counter() - begin
    for completion in completions:
        completion.started = time.perf_counter()
    while active := [n for n, completion in enumerate(completions) if not completion.finished]:
        hidden = _advance(model, [sequences[n] for n in active], cache, 1)
        for index, logits in zip(active, to_host(model.logits(hidden)), strict=True):
            take(index, logits)
    return completions
