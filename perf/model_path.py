# SPDX-License-Identifier: Apache-2.0
"""A whole model, GPU against CPU executor: the same random SmolLM2-135M weights, the same tokens."""

import time

import numpy as np
from timing import DEVICE

from cupyattn.models import SMOLLM2_135M, random_llama

# bounds of |difference| of the log-probability of the next token: twice what either may be off the exact forward
BOUNDS = {"float16": {"max": 6e-2, "median": 6e-3}, "bfloat16": {"max": 0.6, "median": 4e-2},
          "float32": {"max": 4e-4, "median": 4e-4}}


def compare_with_cpu(dtype, *, config=SMOLLM2_135M, tokens=32, seed=1):
    """Teacher-forced log-probabilities of random tokens on `DEVICE` and on the CPU executor.

    Returns
    -------
    dict
        dtype, tokens, max and median of the absolute difference, the bounds, and whether they hold.
    """
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, tokens)
    chosen = []
    for xp in (DEVICE.xp, np):
        rows = random_llama(config, seed, dtype=dtype, xp=xp).logprobs(ids)
        chosen.append(rows[np.arange(tokens - 1), ids[1:]])
    difference = np.abs(chosen[0] - chosen[1])
    result = {"dtype": dtype, "tokens": tokens, "max": float(difference.max()),
              "median": float(np.median(difference)), "bounds": BOUNDS[dtype]}
    # written so that a NaN fails
    result["passed"] = bool(result["max"] <= BOUNDS[dtype]["max"] and result["median"] <= BOUNDS[dtype]["median"])
    return result


def tokens_per_second(batch, *, config=SMOLLM2_135M, new_tokens=64, seed=1):
    """Greedy decoding of `batch` random prompts of 8 tokens, float16: tokens per second of the whole batch."""
    model = random_llama(config, seed, xp=DEVICE.xp)
    prompts = [list(map(int, ids)) for ids in np.random.default_rng(seed).integers(0, config.vocab_size, (batch, 8))]
    options = {"max_new_tokens": new_tokens, "ignore_eos": True}
    model.generate(prompts, **options)   # kernels compiled, memory allocated
    start = time.perf_counter()
    model.generate(prompts, **options)   # gives host values, so the device has finished
    return batch * new_tokens / (time.perf_counter() - start)
