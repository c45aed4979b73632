# SPDX-License-Identifier: Apache-2.0
"""A layer's attention over TurboMind's blocks, written from the formulas: float64, bytes read one by one."""

import numpy as np
from compare import dtype_of

from cupyattn import AttentionParams, BlockIteratorParams

# element held by each nibble of 8 elements, low to high over the 4 bytes
NIBBLES = [0, 2, 4, 6, 1, 3, 5, 7]
MANTISSA = {"float16": 11, "bfloat16": 8, "float32": 24}
ATTENDED = {"float16": (1e-3, 2.0**-11), "bfloat16": (4e-3, 2.0**-8), "float32": (2e-6, 2e-6)}


class Layer:
    """Tokens of a ragged batch, blocks at shuffled places, and what a right implementation makes of them.

    `k_lens` are the contexts. Every method that speaks of new tokens takes their number per sequence, the last ones of
    the context.
    """

    def __init__(self, k_lens, *, num_heads=8, num_kv_heads=2, head_dim=64, dtype="float16", policy=0, block_len=16,
                 layers=1, layer_id=0, bias=True, rope=None, theta=None, prompt_len=None, positions=None, logn=None,
                 sinks=False, window=0, scale=None, finished=None, extra=0, causal=True, seed=0):
        self.rng = np.random.default_rng(seed)
        self.k_lens, self.heads, self.kv_heads, self.dim = np.array(k_lens), num_heads, num_kv_heads, head_dim
        self.dtype, self.policy, self.block_len, self.layers, self.layer_id = dtype, policy, block_len, layers, layer_id
        self.rope, self.theta, self.prompt_len, self.positions = rope, theta, prompt_len, positions
        self.logn, self.window, self.extra, self.causal = logn, window, extra, causal
        self.finished = np.zeros(len(k_lens), bool) if finished is None else np.array(finished)
        self.scale = head_dim ** -0.5 if scale is None else scale
        self.type = dtype_of(dtype)
        self.width = num_heads + 2 * num_kv_heads
        self.tokens = [self._random(n, self.width, head_dim) for n in k_lens]
        self.bias = 0.3 * self._random(self.width, head_dim).astype(np.float32) if bias else None
        self.bias = None if self.bias is None else self.bias.astype(self.type)
        self.sinks = self.rng.uniform(-5, 5, num_heads).astype(np.float32) if sinks else None
        # a power of two per head, so that fp8's range is used and no scale needs rounding
        self.kv_scale = 2.0 ** self.rng.integers(-6, -3, (2, num_kv_heads)).astype(np.float32) if policy > 8 else None
        self._make_blocks()

    def _random(self, *shape):
        return self.rng.standard_normal(shape).astype(self.type)

    # ---- blocks ----------------------------------------------------------------------------------------

    def _make_blocks(self):
        itemsize = self.type.itemsize
        self.row = {0: self.dim * itemsize, 8: self.dim, 4: self.dim // 2}.get(self.policy, self.dim)
        self.head_bytes = self.block_len * self.row
        self.head_params = 2 * itemsize * self.block_len if self.policy in (4, 8) else 0
        self.layer_bytes = 2 * self.kv_heads * (self.head_bytes + self.head_params)
        counts = -(-self.k_lens // self.block_len)
        spare = 3
        ids = self.rng.permutation(counts.sum() + spare)
        self.table = np.full((len(counts), max(counts.max(), 1)), -1, np.int32)
        for b, first in enumerate(np.cumsum(counts) - counts):
            self.table[b, :counts[b]] = ids[first:first + counts[b]]
        self.block_counts = counts
        # an unwritten slot is NaN in every float format
        self.pool = np.full((counts.sum() + spare, self.layers * self.layer_bytes), 0xFF, np.uint8)

    def _bytes(self, pool, b, tokens, start, stride, size):
        """`size` bytes at ``start + slot * stride`` of the block of every token."""
        blocks, slots = self.table[b, tokens // self.block_len], tokens % self.block_len
        at = self.layer_id * self.layer_bytes + start + slots[:, None] * stride + np.arange(size)
        return np.ascontiguousarray(pool[blocks[:, None], at])

    def stored(self, pool, b, value, tokens=None):
        """Keys (or values) of a sequence as the blocks hold them, [n, kv_heads, D], and the step between levels."""
        tokens = np.arange(self.k_lens[b]) if tokens is None else tokens
        out, steps = [], []
        for h in range(self.kv_heads):
            data = self._bytes(pool, b, tokens, (2 * h + value) * self.head_bytes, self.row, self.row)
            if self.policy == 0:
                x, step = data.view(self.type).astype(np.float64), np.zeros((len(tokens), 1))
            elif self.policy in (4, 8):
                start = 2 * self.kv_heads * self.head_bytes + (2 * h + value) * self.head_params
                size = 2 * self.type.itemsize
                params = self._bytes(pool, b, tokens, start, size, size).view(self.type).astype(np.float64)
                step, low = params[:, :1], params[:, 1:]
                x = self._codes(data) * step + low
            else:
                import ml_dtypes

                kind = ml_dtypes.float8_e4m3fn if self.policy == 16 else ml_dtypes.float8_e5m2
                x = data.view(kind).astype(np.float64) * self.kv_scale[value, h]
                step = np.full((len(tokens), 1), float(self.kv_scale[value, h]))
            out.append(x)
            steps.append(np.broadcast_to(step, x.shape))
        return np.stack(out, 1), np.stack(steps, 1)

    def _codes(self, data):
        if self.policy == 8:
            return data.astype(np.float64)
        nibbles = np.stack([data & 15, data >> 4], -1).reshape(len(data), -1, 8)
        codes = np.empty_like(nibbles)
        codes[..., NIBBLES] = nibbles
        return codes.reshape(len(data), -1).astype(np.float64)

    # ---- the mathematics -------------------------------------------------------------------------------

    def _biased(self, b, first, last):
        """Heads first to last of the projection of every token, with bias."""
        x = self.tokens[b][:, first:last].astype(np.float64)
        return x if self.bias is None else x + self.bias[first:last].astype(np.float64)

    def _rotated(self, b, x):
        rope = self.rope
        if rope is None:
            return x
        freq = rope.inv_freq(None if self.prompt_len is None else int(self.prompt_len[b]),
                             base=None if self.theta is None else float(self.theta[b]))
        angle = np.arange(len(x))[:, None] * freq
        if self.positions is not None:   # [batch][3, n]
            angle = self.positions[b][rope.mrope_axes()].T * freq
        c, s = (f(angle)[:, None] * rope.table_factor() for f in (np.cos, np.sin))
        y, half = x.copy(), rope.rotary_dim // 2
        one = slice(0, 2 * half, 2) if rope.style == "interleaved" else slice(0, half)
        two = slice(1, 2 * half, 2) if rope.style == "interleaved" else slice(half, 2 * half)
        y[..., one], y[..., two] = c * x[..., one] - s * x[..., two], c * x[..., two] + s * x[..., one]
        return y

    def queries(self, b):
        """Every token's finished query, rounded to the activations' dtype."""
        q = self._rotated(b, self._biased(b, 0, self.heads))
        if self.logn:
            p = np.arange(len(q))
            q *= np.where(p > self.logn, np.log2(np.maximum(p, 1)) / np.log2(self.logn), 1)[:, None, None]
        return q.astype(self.type).astype(np.float64)

    def exact(self, b, value):
        """Every token's key (or value) before it is rounded or quantized."""
        first = self.heads + value * self.kv_heads
        x = self._biased(b, first, first + self.kv_heads)
        return x if value else self._rotated(b, x)

    def attended(self, pool, new):
        """Output rows [new tokens, heads, D] of softmax attention over what the blocks hold."""
        rows = []
        for b, n in enumerate(new):
            q = self.queries(b)
            if self.finished[b]:
                rows.append(np.zeros((n, self.heads, self.dim)))
                continue
            k, v = (np.repeat(self.stored(pool, b, value)[0], self.heads // self.kv_heads, 1) for value in (0, 1))
            for p in range(self.k_lens[b] - n, self.k_lens[b]):
                j = np.arange(self.k_lens[b])
                seen = j <= p if self.causal else j >= 0
                if self.window:
                    seen &= (j > p - self.window) & (j < p + self.window)
                score = np.einsum("hd,nhd->hn", q[p], k[seen]) * self.scale
                top = score.max(1, keepdims=True)
                if self.sinks is not None:
                    top = np.maximum(top, self.sinks[:, None])
                weight = np.exp(score - top)
                total = weight.sum(1)
                if self.sinks is not None:
                    total += np.exp(self.sinks - top[:, 0])
                rows.append((np.einsum("hn,nhd->hd", weight, v[seen]) / total[:, None])[None])
        return np.concatenate(rows)

    def check_stored(self, pool, written=None):
        """What the blocks hold is each key and value, to half a step of its format. `written`: tokens per sequence."""
        eps = 2.0 ** (1 - MANTISSA[self.dtype])
        for b in range(len(self.k_lens)):
            tokens = np.arange(self.k_lens[b]) if written is None else np.asarray(written[b])
            for value in (0, 1):
                want = self.exact(b, value)[tokens]
                got, step = self.stored(pool, b, value, tokens)
                allowed = eps * np.abs(want) + 4e-6
                if self.policy in (4, 8):   # the scale is rounded, and the largest number goes to the last level
                    allowed = allowed + step * (0.5 + eps * (2 ** self.policy - 1))
                elif self.policy:
                    allowed = allowed + np.abs(want) * (2.0**-4 if self.policy == 16 else 2.0**-3) + step * 2.0**-9
                excess = np.abs(got - want) - allowed
                assert excess.size == 0 or excess.max() <= 0, (b, value, np.argwhere(excess > 0)[:3], excess.max())

    # ---- arguments -------------------------------------------------------------------------------------

    def rows(self, new, k_lens=None):
        """[new tokens, width] as a projection leaves them, NaN past its end."""
        k_lens = self.k_lens if k_lens is None else k_lens
        rows = [t[n - m:n].reshape(m, self.width * self.dim) for t, n, m in zip(self.tokens, k_lens, new, strict=True)]
        rows = np.concatenate(rows)
        return np.concatenate([rows, np.full((len(rows), self.extra), np.nan, self.type)], 1)

    def blocks(self, xp, pool):
        return BlockIteratorParams.from_pool(pool, self.table.clip(0), self.block_counts, layer_id=self.layer_id,
                                             block_len=self.block_len)

    def params(self, xp, pool, new, k_lens=None, **changes):
        """AttentionParams of the last `new` tokens of every context; `pool` is an array of xp."""
        k_lens = self.k_lens if k_lens is None else np.asarray(k_lens)
        cut = self.heads, self.heads + self.kv_heads
        biases = [None] * 3 if self.bias is None else np.split(self.bias, cut)
        cumulative = [np.concatenate([[0], np.cumsum(n)]).astype(np.int32) for n in (new, k_lens)]
        fields = dict(zip(("q_bias", "k_bias", "v_bias"), (None if a is None else xp.array(a) for a in biases),
                          strict=True))
        fields |= dict(zip(("cu_q_len", "cu_k_len"), map(xp.array, cumulative), strict=True))
        if self.positions is not None:
            fields["rope_positions"] = xp.array(np.concatenate(
                [p[:, n - m:n] for p, n, m in zip(self.positions, k_lens, new, strict=True)], 1).astype(np.int32))
        if self.theta is not None:
            fields["rope_theta"] = xp.array(np.asarray(self.theta, np.float32))
        if self.kv_scale is not None:
            fields["kv_scale"] = tuple(xp.array(s) for s in self.kv_scale)
        if self.logn:
            fields |= {"use_logn_attn": True, "max_position_embeddings": self.logn}
        if self.finished.any():
            fields["finished"] = xp.array(self.finished)
        fields |= dict(
            num_heads=self.heads, num_kv_heads=self.kv_heads, size_per_head=self.dim, rope_param=self.rope,
            prompt_len=self.prompt_len, sinks=None if self.sinks is None else xp.array(self.sinks),
            window_size=self.window, inv_sqrt_dh=self.scale, quant_policy=self.policy, causal=self.causal)
        if "block_iter_params" not in changes:
            fields["block_iter_params"] = self.blocks(xp, pool)
        return AttentionParams.from_qkv(xp.array(self.rows(new, k_lens)), **fields | changes)
