# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding: the frequencies of every scaling rule, and the cos/sin tables the kernels read."""

import math
from dataclasses import dataclass

import numpy as np

STYLES = ("neox", "interleaved")
SCALINGS = ("none", "linear", "dynamic", "yarn", "llama3")
_TABLE_ROWS = 4096  # positions per block of float64 angles: 2 MiB at 64 pairs


@dataclass(frozen=True)
class RopeParams:
    """How positions turn into rotation angles: ``angle[p, j] = p * inv_freq()[j]`` for pair ``j``.

    Pair ``j`` of a head is elements ``(j, j + rotary_dim/2)`` in style "neox" and ``(2j, 2j + 1)`` in style
    "interleaved"; with ``f[j] = base ** (-2j / rotary_dim)`` the frequencies are

    ========  ============================================================================================
    none      ``f``
    linear    ``f / factor``
    dynamic   ``f`` with base ``base * (factor*n/m - (factor-1)) ** (rotary_dim / (rotary_dim-2))`` for a prompt
              of ``n > m`` tokens and ``factor > 1``; ``m`` is ``original_max_position``
    yarn      ``f*(1-a) + f/factor*a``, ``a[j] = clip((j-low) / (high-low), 0, 1)``; cos and sin are multiplied by
              an attention factor
    llama3    ``f*s + f/factor*(1-s)``, ``s = clip((m*f/(2*pi) - low_freq_factor) / (high_freq_factor -
              low_freq_factor), 0, 1)``
    ========  ============================================================================================

    Parameters
    ----------
    rotary_dim : int
        Rotated elements of a head, even; the head's other elements pass through.
    base : float
        Often called ``rope_theta``. Default 10000.
    style : "neox" or "interleaved"
        Which elements form a pair. Hugging Face checkpoints are "neox", GGUF's llama family "interleaved".
    scaling : "none", "linear", "dynamic", "yarn" or "llama3"
    factor : float
        Context extension, default 1.
    original_max_position : int, optional
        Context the model was trained with (tokens). Needed by dynamic, yarn and llama3.
    beta_fast, beta_slow : float
        YaRN: pairs that turn more than ``beta_fast`` times within the original context keep their frequency, fewer
        than ``beta_slow`` are divided by ``factor``. Defaults 32 and 1.
    truncate : bool
        YaRN: round the ends of the ramp outwards to whole pairs (default); gpt-oss does not.
    attention_factor : float, optional
        YaRN: multiplies cos and sin, so logits by its square. Default ``0.1*ln(factor) + 1``, or the ratio of that
        expression at `mscale` and at `mscale_all_dim`; 1 for ``factor <= 1``.
    mscale, mscale_all_dim : float, optional
        YaRN: weights of ``0.1*ln(factor)`` above; used when both are given and not zero.
    low_freq_factor, high_freq_factor : float
        llama3: turns within the original context below which a pair is divided by `factor`, and above which it
        stays. Defaults 1 and 4.

    Raises
    ------
    TypeError, ValueError
        A field of the wrong kind or outside its range.

    Examples
    --------
    >>> rope = RopeParams(rotary_dim=8)
    >>> rope.inv_freq()
    array([1.   , 0.1  , 0.01 , 0.001])
    >>> cos, sin = rope.tables(max_pos=16)
    >>> cos.shape, cos.dtype
    ((16, 4), dtype('float32'))
    """

    rotary_dim: int
    base: float = 10000.0
    style: str = "neox"
    scaling: str = "none"
    factor: float = 1.0
    original_max_position: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self):
        if not isinstance(self.rotary_dim, int | np.integer):
            raise TypeError(f"RopeParams: rotary_dim must be an int, got {type(self.rotary_dim).__name__}")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(f"RopeParams: rotary_dim must be even and positive, got {self.rotary_dim}")
        if self.style not in STYLES:
            raise ValueError(f"RopeParams: style must be one of {STYLES}, got {self.style!r}")
        if self.scaling not in SCALINGS:
            raise ValueError(f"RopeParams: scaling must be one of {SCALINGS}, got {self.scaling!r}")
        self._check_number("base", above=1.0)
        self._check_number("factor", above=0.0)
        if self.scaling in ("dynamic", "yarn", "llama3"):
            if self.original_max_position is None:
                raise ValueError(f"RopeParams: original_max_position must be given for scaling {self.scaling!r}, "
                                 "got None")
            self._check_number("original_max_position", above=0.0)
        if self.scaling == "dynamic" and self.rotary_dim < 4:
            raise ValueError("RopeParams: rotary_dim must be at least 4 for scaling 'dynamic', got 2")
        if self.scaling == "yarn":
            self._check_number("beta_slow", above=0.0)
            self._check_number("beta_fast", above=self.beta_slow, what="beta_slow")
            for name in ("attention_factor", "mscale", "mscale_all_dim"):
                if getattr(self, name) is not None:
                    self._check_number(name, above=0.0 if name == "attention_factor" else -math.inf)
        if self.scaling == "llama3":
            self._check_number("low_freq_factor", above=0.0)
            self._check_number("high_freq_factor", above=self.low_freq_factor, what="low_freq_factor")

    def _check_number(self, name, *, above, what=None):
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
            raise TypeError(f"RopeParams: {name} must be a number, got {type(value).__name__}")
        if not (math.isfinite(value) and value > above):
            bound = f"{what} = {above:g}" if what else f"{above:g}"
            raise ValueError(f"RopeParams: {name} must be finite and greater than {bound}, got {value:g}")

    def inv_freq(self, prompt_len=None):
        """Angle per position of every pair, in float64. This is the one place where frequencies are made.

        Parameters
        ----------
        prompt_len : int or int array, optional
            Prompt length (tokens) of each sequence when it was admitted; it stays the same while the sequence grows.
            Only scaling "dynamic" looks at it; None means a prompt within the original context.

        Returns
        -------
        ndarray [rotary_dim/2], float64
            ``prompt_len.shape + (rotary_dim/2,)`` for an array `prompt_len`. Unit: radians per token.
        """
        lengths = self._prompt_lengths(prompt_len)
        pair = np.arange(self.rotary_dim // 2, dtype=np.float64)
        exponent = -2.0 * pair / self.rotary_dim
        if self.scaling == "dynamic":
            return self._dynamic_base(lengths)[..., None] ** exponent
        freq = np.float64(self.base) ** exponent
        if self.scaling == "linear":
            freq = freq / self.factor
        elif self.scaling == "yarn":
            low, high = self.yarn_range()
            slow = np.clip((pair - low) / (high - low), 0.0, 1.0)
            freq = freq * (1.0 - slow) + freq / self.factor * slow
        elif self.scaling == "llama3":
            turns = self.original_max_position * freq / (2.0 * math.pi)
            fast = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            fast = np.clip(fast, 0.0, 1.0)
            freq = freq * fast + freq / self.factor * (1.0 - fast)
        return np.broadcast_to(freq, lengths.shape + freq.shape).copy()

    def _prompt_lengths(self, prompt_len):
        if prompt_len is None:
            return np.zeros(())
        lengths = np.asarray(prompt_len)
        if lengths.dtype.kind not in "iu":
            raise TypeError(f"RopeParams: prompt_len must be an int or an int array, got dtype {lengths.dtype}")
        if (lengths < 0).any():
            raise ValueError(f"RopeParams: prompt_len must not be negative, got {lengths.min()}")
        return lengths.astype(np.float64)

    def _dynamic_base(self, lengths):
        extension = self.factor * lengths / self.original_max_position - (self.factor - 1.0)
        grows = (lengths > self.original_max_position) & (self.factor > 1.0)
        power = self.rotary_dim / (self.rotary_dim - 2)
        return self.base * np.where(grows, extension, 1.0) ** power

    def yarn_range(self):
        """Ends ``(low, high)`` of YaRN's ramp, in pairs: below low nothing changes, above high all is divided."""
        def pair_with_turns(turns):
            wavelength = self.original_max_position / (2.0 * math.pi * turns)
            return self.rotary_dim * math.log(wavelength) / (2.0 * math.log(self.base))

        low, high = pair_with_turns(self.beta_fast), pair_with_turns(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.rotary_dim - 1)
        return (low, high + 0.001) if low == high else (low, high)

    def table_factor(self):
        """What cos and sin are multiplied by: YaRN's attention factor, 1 for every other scaling."""
        if self.scaling != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return float(self.attention_factor)

        def magnitude(weight):
            return 0.1 * weight * math.log(self.factor) + 1.0 if self.factor > 1.0 else 1.0

        if self.mscale and self.mscale_all_dim:
            return magnitude(self.mscale) / magnitude(self.mscale_all_dim)
        return magnitude(1.0)

    def cos_sin(self, positions, *, prompt_len=None):
        """Cosine and sine rows of the given positions, YaRN's attention factor included.

        Angles are float64; the only rounding is that of the result, so position 200,000 is as accurate as position 1.

        Parameters
        ----------
        positions : int array [...]
        prompt_len : int or int array broadcastable to `positions`, optional
            See `inv_freq`.

        Returns
        -------
        cos, sin : ndarray [..., rotary_dim/2], float32
        """
        positions = np.asarray(positions)
        if positions.dtype.kind not in "iu":
            raise TypeError(f"RopeParams: positions must be integers, got dtype {positions.dtype}")
        freq = self.inv_freq(prompt_len)
        try:
            freq = np.broadcast_to(freq, positions.shape + freq.shape[-1:])
        except ValueError:
            raise ValueError(f"RopeParams: prompt_len must broadcast to positions {list(positions.shape)}, "
                             f"got {list(freq.shape[:-1])}") from None
        cos = np.empty(freq.shape, dtype=np.float32)
        sin = np.empty(freq.shape, dtype=np.float32)
        pairs = freq.shape[-1]
        flat = positions.reshape(-1, 1).astype(np.float64)
        flat_freq, flat_cos, flat_sin = (a.reshape(-1, pairs) for a in (freq, cos, sin))
        for start in range(0, len(flat), _TABLE_ROWS):
            rows = slice(start, start + _TABLE_ROWS)
            angle = flat[rows] * flat_freq[rows]
            flat_cos[rows] = np.cos(angle) * self.table_factor()
            flat_sin[rows] = np.sin(angle) * self.table_factor()
        return cos, sin

    def tables(self, max_pos, *, prompt_len=None):
        """The cos and sin tables ``rope`` and ``kv_append`` read: row ``p`` belongs to position ``p``.

        Parameters
        ----------
        max_pos : int
            Rows of the tables (tokens).
        prompt_len : int, optional
            See `inv_freq`. Sequences with different prompts have different tables under scaling "dynamic".

        Returns
        -------
        cos, sin : ndarray [max_pos, rotary_dim/2], float32
        """
        if not isinstance(max_pos, int | np.integer) or max_pos < 0:
            raise ValueError(f"RopeParams: max_pos must be an int of at least 0, got {max_pos!r}")
        return self.cos_sin(np.arange(max_pos), prompt_len=prompt_len)
