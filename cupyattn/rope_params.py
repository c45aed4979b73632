# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding: the frequencies of every scaling rule, and the cos/sin tables the kernels read."""

import math
from dataclasses import dataclass

import numpy as np

from .rope_config import rope_fields
from .runtime.arrays import array_namespace

STYLES = ("neox", "interleaved")
SCALINGS = ("none", "linear", "dynamic", "ntk", "yarn", "llama3", "longrope")
_ALIASES = {"default": "none", "su": "longrope"}
_TABLE_ROWS = 4096  # positions per block of float64 angles: 2 MiB at 64 pairs


@dataclass(frozen=True)
class RopeParams:
    """How positions turn into rotation angles: ``angle[p, j] = p * inv_freq()[j]`` for pair ``j``.

    Pair ``j`` of a head is elements ``(j, j + rotary_dim/2)`` in style "neox" and ``(2j, 2j + 1)`` in style
    "interleaved"; with ``f[j] = base ** (-2j / rotary_dim)`` and ``m`` for `original_max_position` the frequencies are

    ========  ============================================================================================
    none      ``f``
    linear    ``f / factor``
    dynamic   ``f`` with base ``base * (factor*n/m - (factor-1)) ** (rotary_dim / (rotary_dim-2))`` for a prompt
              of ``n > m`` tokens and ``factor > 1``
    ntk       ``f`` with base ``base * alpha ** (rotary_dim / (rotary_dim-2))``
    yarn      ``f*(1-a) + f/factor*a``, ``a[j] = clip((j-low) / (high-low), 0, 1)``, see `yarn_range`; cos and sin
              are multiplied by an attention factor
    llama3    ``f*s + f/factor*(1-s)``, ``s = clip((m*f/(2*pi) - low_freq_factor) / (high_freq_factor -
              low_freq_factor), 0, 1)``
    longrope  ``f / long_factor`` for a prompt of ``n > m`` tokens, else ``f / short_factor``; cos and sin are
              multiplied by an attention factor
    ========  ============================================================================================

    With `mrope_section` a token has three positions (time, height, width) and each pair turns by one of them.

    Parameters
    ----------
    rotary_dim : int
        Rotated elements of a head, even; the head's other elements pass through.
    base : float
        Often called ``rope_theta``. Default 10000.
    style : "neox" or "interleaved"
        Which elements form a pair. Hugging Face checkpoints are "neox", GGUF's llama family "interleaved".
    scaling : "none", "linear", "dynamic", "ntk", "yarn", "llama3" or "longrope"
        "default" is another name of "none", "su" of "longrope".
    factor : float
        Context extension, default 1.
    original_max_position : int, optional
        Context the model was trained with (tokens). Needed by dynamic, yarn, llama3 and longrope.
    alpha : float
        ntk: see the table. Default 1.
    beta_fast, beta_slow : float
        YaRN: pairs that turn more than ``beta_fast`` times within the original context keep their frequency, fewer
        than ``beta_slow`` are divided by ``factor``. Defaults 32 and 1.
    truncate : bool
        YaRN: round the ends of the ramp outwards to whole pairs (default); gpt-oss does not.
    attention_factor : float, optional
        YaRN, longrope: multiplies cos and sin, so logits by its square. Default for YaRN ``0.1*ln(factor) + 1``, or
        the ratio of that expression at `mscale` and at `mscale_all_dim`; for longrope ``sqrt(1 + ln(factor)/ln(m))``;
        1 for ``factor <= 1``.
    mscale, mscale_all_dim : float, optional
        YaRN: weights of ``0.1*ln(factor)`` above; used when both are given and not zero.
    low_freq_factor, high_freq_factor : float
        llama3: turns within the original context below which a pair is divided by `factor`, and above which it
        stays. Defaults 1 and 4.
    short_factor, long_factor : sequence of rotary_dim/2 floats, optional
        longrope: divisors of the frequencies.
    mrope_section : (int, int, int), optional
        Pairs that turn by time, height and width; their sum is ``rotary_dim/2``.
    mrope_interleaved : bool
        False (default): the pairs of an axis lie side by side, time first. True (Qwen3-VL): pair ``j`` belongs to
        axis ``j % 3`` while that axis has pairs left, the rest to time.

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
    alpha: float = 1.0
    short_factor: tuple | None = None
    long_factor: tuple | None = None
    mrope_section: tuple | None = None
    mrope_interleaved: bool = False

    # ---- making one ------------------------------------------------------------------------------------

    def __post_init__(self):
        if not isinstance(self.rotary_dim, int | np.integer):
            raise TypeError(f"RopeParams: rotary_dim must be an int, got {type(self.rotary_dim).__name__}")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(f"RopeParams: rotary_dim must be even and positive, got {self.rotary_dim}")
        if self.style not in STYLES:
            raise ValueError(f"RopeParams: style must be one of {STYLES}, got {self.style!r}")
        object.__setattr__(self, "scaling", _ALIASES.get(self.scaling, self.scaling))
        if self.scaling not in SCALINGS:
            raise ValueError(f"RopeParams: scaling must be one of {SCALINGS}, got {self.scaling!r}")
        self._check_number("base", above=1.0)
        self._check_number("factor", above=0.0)
        if self.scaling in ("dynamic", "yarn", "llama3", "longrope"):
            if self.original_max_position is None:
                raise ValueError(f"RopeParams: original_max_position must be given for scaling {self.scaling!r}, "
                                 "got None")
            self._check_number("original_max_position", above=1.0 if self.scaling == "longrope" else 0.0)
        if self.scaling in ("dynamic", "ntk") and self.rotary_dim < 4:
            raise ValueError(f"RopeParams: rotary_dim must be at least 4 for scaling {self.scaling!r}, got 2")
        if self.scaling == "ntk":
            self._check_number("alpha", above=0.0)
        if self.scaling == "yarn":
            self._check_number("beta_slow", above=0.0)
            self._check_number("beta_fast", above=self.beta_slow, what="beta_slow")
        if self.scaling in ("yarn", "longrope"):
            for name in ("attention_factor", "mscale", "mscale_all_dim"):
                if getattr(self, name) is not None:
                    self._check_number(name, above=0.0 if name == "attention_factor" else -math.inf)
        if self.scaling == "llama3":
            self._check_number("low_freq_factor", above=0.0)
            self._check_number("high_freq_factor", above=self.low_freq_factor, what="low_freq_factor")
        if self.scaling == "longrope":
            self._check_divisors("short_factor")
            self._check_divisors("long_factor")
        if self.mrope_section is not None:
            self._check_section()

    def _check_number(self, name, *, above, what=None):
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
            raise TypeError(f"RopeParams: {name} must be a number, got {type(value).__name__}")
        if not (math.isfinite(value) and value > above):
            bound = f"{what} = {above:g}" if what else f"{above:g}"
            raise ValueError(f"RopeParams: {name} must be finite and greater than {bound}, got {value:g}")

    def _check_divisors(self, name):
        """Keep the field as a tuple of rotary_dim/2 positive floats."""
        value = getattr(self, name)
        try:
            value = tuple(float(v) for v in value)
        except (TypeError, ValueError):
            raise TypeError(f"RopeParams: {name} must be a sequence of numbers for scaling 'longrope', got "
                            f"{value!r}") from None
        if len(value) != self.rotary_dim // 2:
            raise ValueError(f"RopeParams: {name} must have rotary_dim/2 = {self.rotary_dim // 2} entries, "
                             f"got {len(value)}")
        if not all(math.isfinite(v) and v > 0 for v in value):
            raise ValueError(f"RopeParams: {name} must hold finite numbers greater than 0, got {value}")
        object.__setattr__(self, name, value)

    def _check_section(self):
        try:
            section = tuple(self.mrope_section)
        except TypeError:
            section = (None,)
        if not all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in section):
            raise TypeError(f"RopeParams: mrope_section must be three ints, got {self.mrope_section!r}")
        if len(section) != 3 or min(section) < 0 or sum(section) != self.rotary_dim // 2:
            raise ValueError("RopeParams: mrope_section must be the pairs of time, height and width, together "
                             f"rotary_dim/2 = {self.rotary_dim // 2}, got {section}")
        object.__setattr__(self, "mrope_section", tuple(int(n) for n in section))

    @classmethod
    def from_hf_config(cls, config, *, layer_type=None, style=None):
        """The RopeParams of a Hugging Face model.

        Parameters
        ----------
        config : dict or object with ``to_dict()``
            The model's ``config.json``. Read are ``head_dim`` (or ``hidden_size`` and ``num_attention_heads``),
            ``qk_rope_head_dim``, ``partial_rotary_factor``, ``rope_theta``, ``max_position_embeddings`` and
            ``rope_scaling`` or its newer form ``rope_parameters``, of ``text_config`` where there is one. With YaRN a
            given ``factor`` counts; without one it is ``max_position_embeddings / original_max_position_embeddings``.
        layer_type : str, optional
            Which layers, for models with more than one kind, e.g. "full_attention" or "sliding_attention".
        style : "neox" or "interleaved", optional
            Default: what the model's own code does.

        Raises
        ------
        TypeError, ValueError
            The configuration has no such field, or one out of range.
        NotImplementedError
            A kind of RoPE that is not known here.

        Examples
        --------
        >>> RopeParams.from_hf_config({"head_dim": 8, "rope_scaling": {"rope_type": "linear", "factor": 4}}).factor
        4
        """
        return cls(**rope_fields(config, layer_type, style))

    # ---- frequencies -----------------------------------------------------------------------------------

    def bases(self, prompt_len=None):
        """Base of ``f`` for each sequence, in float64: what "dynamic" and "ntk" make of `base`.

        Parameters
        ----------
        prompt_len : int or int array, optional
            See `inv_freq`.

        Returns
        -------
        ndarray of prompt_len's shape, float64
        """
        xp, lengths = self._prompt_lengths(prompt_len)
        stretch = xp.ones_like(lengths)
        if self.scaling == "ntk":
            stretch = stretch * self.alpha
        elif self.scaling == "dynamic" and self.factor > 1.0:
            extension = self.factor * lengths / self.original_max_position - (self.factor - 1.0)
            stretch = xp.where(lengths > self.original_max_position, extension, 1.0)
        # the power is only defined for the scalings that need it
        return self.base * stretch ** (self.rotary_dim / max(self.rotary_dim - 2, 1))

    def inv_freq(self, prompt_len=None, *, base=None):
        """Angle per position of every pair, in float64. This is the one place where frequencies are made.

        Parameters
        ----------
        prompt_len : int or int array, optional
            Prompt length (tokens) of each sequence when it was admitted; it stays the same while the sequence grows.
            Only "dynamic" and "longrope" look at it; None means a prompt within the original context.
        base : float or float array, optional
            Base of each sequence, used as it is instead of ``bases(prompt_len)``; broadcast with `prompt_len`.

        Returns
        -------
        ndarray [rotary_dim/2], float64
            ``shape + (rotary_dim/2,)`` for arrays of that shape. Unit: radians per token. CuPy for CuPy arrays.
        """
        xp, lengths = self._prompt_lengths(prompt_len, base)
        base = self.bases(prompt_len) if base is None else self._given_base(xp, base)
        pair = xp.arange(self.rotary_dim // 2, dtype=np.float64)
        try:
            base, lengths = (a[..., None] for a in xp.broadcast_arrays(xp.asarray(base), lengths))
        except ValueError:
            raise ValueError(f"RopeParams: base must broadcast with prompt_len {list(lengths.shape)}, "
                             f"got {list(base.shape)}") from None
        freq = base ** (-2.0 * pair / self.rotary_dim)
        if self.scaling == "linear":
            freq = freq / self.factor
        elif self.scaling == "yarn":
            low, high = self._yarn_range(xp, base)
            slow = xp.clip((pair - low) / (high - low), 0.0, 1.0)
            freq = freq * (1.0 - slow) + freq / self.factor * slow
        elif self.scaling == "llama3":
            turns = self.original_max_position * freq / (2.0 * math.pi)
            fast = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            fast = xp.clip(fast, 0.0, 1.0)
            freq = freq * fast + freq / self.factor * (1.0 - fast)
        elif self.scaling == "longrope":
            freq = freq / xp.where(lengths > self.original_max_position, xp.asarray(self.long_factor),
                                   xp.asarray(self.short_factor))
        return freq

    @staticmethod
    def _prompt_lengths(prompt_len, base=None):
        """The arrays' module and `prompt_len` as float64."""
        prompt_len = np.zeros((), np.int64) if prompt_len is None else prompt_len
        arrays = {name: a for name, a in (("prompt_len", prompt_len), ("base", base)) if getattr(a, "ndim", 0)}
        xp = array_namespace("RopeParams", **arrays) if arrays else np
        lengths = xp.asarray(prompt_len)
        if lengths.dtype.kind not in "iu":
            raise TypeError(f"RopeParams: prompt_len must be an int or an int array, got dtype {lengths.dtype}")
        if xp is np and (lengths < 0).any():
            raise ValueError(f"RopeParams: prompt_len must not be negative, got {lengths.min()}")
        return xp, lengths.astype(np.float64)

    @staticmethod
    def _given_base(xp, base):
        base = xp.asarray(base)
        if base.dtype.kind not in "iuf":
            raise TypeError(f"RopeParams: base must be a number or a float array, got dtype {base.dtype}")
        if xp is np and not (np.isfinite(base) & (base > 1)).all():
            raise ValueError(f"RopeParams: base must be finite and greater than 1, got {base.min():g}")
        return base.astype(np.float64)

    def yarn_range(self):
        """Ends ``(low, high)`` of YaRN's ramp, in pairs: below low nothing changes, above high all is divided.

        ``d(turns) = rotary_dim * ln(m / (2*pi*turns)) / (2*ln(base))``, low = d(beta_fast), high = d(beta_slow),
        rounded outwards with `truncate`, kept within 0 and rotary_dim - 1 and at least 0.001 apart.
        """
        low, high = self._yarn_range(np, np.float64(self.base))
        return float(low), float(high)

    def _yarn_range(self, xp, base):
        def pair_with_turns(turns):
            wavelength = self.original_max_position / (2.0 * math.pi * turns)
            return self.rotary_dim * math.log(wavelength) / (2.0 * xp.log(base))

        low, high = pair_with_turns(self.beta_fast), pair_with_turns(self.beta_slow)
        if self.truncate:
            low, high = xp.floor(low), xp.ceil(high)
        low, high = xp.maximum(low, 0.0), xp.minimum(high, self.rotary_dim - 1.0)
        return low, xp.where(low == high, high + 0.001, high)

    def table_factor(self):
        """What cos and sin are multiplied by: the attention factor of YaRN and longrope, else 1."""
        if self.scaling not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return float(self.attention_factor)
        if self.factor <= 1.0:
            return 1.0
        if self.scaling == "longrope":
            return math.sqrt(1.0 + math.log(self.factor) / math.log(self.original_max_position))

        def magnitude(weight):
            return 0.1 * weight * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:
            return magnitude(self.mscale) / magnitude(self.mscale_all_dim)
        return magnitude(1.0)

    def mrope_axes(self):
        """Which position each pair turns by: 0 time, 1 height, 2 width.

        Returns
        -------
        ndarray [rotary_dim/2], int64
        """
        time, height, width = self.mrope_section
        if not self.mrope_interleaved:
            return np.repeat(np.arange(3), self.mrope_section)
        pair = np.arange(self.rotary_dim // 2)
        axis, turn = pair % 3, pair // 3
        has_pairs = turn < np.array([len(pair), height, width])[axis]
        return np.where(has_pairs, axis, 0)

    # ---- tables ----------------------------------------------------------------------------------------

    def tables(self, max_pos, *, prompt_len=None, base=None):
        """The cos and sin tables ``rope`` and ``kv_append`` read: row ``p`` belongs to position ``p``.

        Parameters
        ----------
        max_pos : int
            Rows of the tables (tokens).
        prompt_len : int, optional
            See `inv_freq`. Sequences with different prompts have different tables under "dynamic" and "longrope".
        base : float, optional
            See `inv_freq`.

        Returns
        -------
        cos, sin : ndarray [max_pos, rotary_dim/2], float32
        """
        if not isinstance(max_pos, int | np.integer) or max_pos < 0:
            raise ValueError(f"RopeParams: max_pos must be an int of at least 0, got {max_pos!r}")
        return self.tables_for(np.arange(max_pos), prompt_len=prompt_len, base=base)

    def tables_for(self, positions, *, sequence=None, prompt_len=None, base=None):
        """Cos and sin rows of the given tokens, the attention factor included: row ``t`` belongs to token ``t``.

        For what one table by position cannot say: sequences with frequencies of their own, and tokens with three
        positions. Angles are float64; the only rounding is that of the result, so position 200,000 is as accurate as
        position 1.

        Parameters
        ----------
        positions : int array [tokens], or [3, tokens] with `mrope_section`
            NumPy or CuPy. With `mrope_section`, [tokens] means that all three positions are equal (text). Without,
            any shape goes.
        sequence : int array [tokens], optional
            Sequence of each token, when `prompt_len` or `base` is [batch]. Without it they broadcast to the tokens.
        prompt_len, base : optional
            See `inv_freq`.

        Returns
        -------
        cos, sin : ndarray [tokens, rotary_dim/2], float32, of the kind of `positions`
        """
        positions = positions if hasattr(positions, "dtype") else np.asarray(positions)
        xp = array_namespace("RopeParams", positions=positions, sequence=sequence) if positions.ndim else np
        if positions.dtype.kind not in "iu":
            raise TypeError(f"RopeParams: positions must be integers, got dtype {positions.dtype}")
        axes = None
        if self.mrope_section is not None and positions.ndim > 1:
            if positions.shape[0] != 3:
                raise ValueError(f"RopeParams: positions must be [3, tokens] (time, height, width) or [tokens], got "
                                 f"{list(positions.shape)}")
            axes = xp.asarray(self.mrope_axes())
        shape = positions.shape if axes is None else positions.shape[1:]
        freq, sequence = self._token_frequencies(xp, shape, sequence, prompt_len, base)
        flat = positions.reshape(-1, 1) if axes is None else positions.reshape(3, -1)
        cos = xp.empty((*shape, self.rotary_dim // 2), dtype=np.float32)
        sin = xp.empty_like(cos)
        flat_cos, flat_sin = (a.reshape(-1, a.shape[-1]) for a in (cos, sin))
        for start in range(0, len(flat_cos), _TABLE_ROWS):
            rows = slice(start, start + _TABLE_ROWS)
            position = flat[rows] if axes is None else flat[:, rows][axes].T   # [rows, 1 or pairs]
            angle = position.astype(np.float64) * (freq[rows] if sequence is None else freq[sequence[rows]])
            flat_cos[rows] = xp.cos(angle) * self.table_factor()
            flat_sin[rows] = xp.sin(angle) * self.table_factor()
        return cos, sin

    def _token_frequencies(self, xp, shape, sequence, prompt_len, base):
        """Frequencies [tokens, pairs] and None, or [batch, pairs] and the flat `sequence` that picks their rows."""
        freq = self.inv_freq(prompt_len, base=base)
        given = "prompt_len" if prompt_len is not None else "base"
        if xp is np and not isinstance(freq, np.ndarray):
            raise TypeError(f"RopeParams: {given} must be a NumPy array like positions, got a CuPy array")
        freq = xp.asarray(freq)
        tokens, pairs = math.prod(shape), freq.shape[-1]
        if sequence is None:
            try:
                freq = xp.broadcast_to(freq, (*shape, pairs))
            except ValueError:
                raise ValueError(f"RopeParams: {given} must broadcast to the tokens {list(shape)}, or come with "
                                 f"sequence, got {list(freq.shape[:-1])}") from None
            return freq.reshape(tokens, pairs), None
        sequence = xp.asarray(sequence)
        if sequence.dtype.kind not in "iu":
            raise TypeError(f"RopeParams: sequence must be integers, got dtype {sequence.dtype}")
        if sequence.shape != shape:
            raise ValueError(f"RopeParams: sequence must be of the tokens' shape {list(shape)}, got "
                             f"{list(sequence.shape)}")
        freq = freq.reshape(-1, pairs)
        if xp is np and tokens and not 0 <= sequence.min() <= sequence.max() < len(freq):
            raise ValueError(f"RopeParams: sequence must be in [0, {len(freq)}), the entries of {given}, got "
                             f"{sequence.min()} .. {sequence.max()}")
        return freq, sequence.reshape(-1)


RopeKernelParam = RopeParams
