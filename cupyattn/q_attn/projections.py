# SPDX-License-Identifier: Apache-2.0
"""What stands before and after the attention of a layer: norms, projections, their adapters, the residual."""

import numpy as np

from ..ops.embedding import embedding
from ..ops.quant_gemm import quant_gemm
from .buffers import Workspace
from .lora import Adapters
from .norms import add, add_normed, norm
from .weights import joined, matrix, vector


class Projections:
    """The part of QAttn that holds its weights and multiplies by them."""

    def _set_norms(self, layernorm, layernorm_bias, post_layernorm, post_layernorm_bias, q_norm, k_norm):
        width = ((self.hidden_size,),)
        for name, gain, bias in (("layernorm", layernorm, layernorm_bias),
                                 ("post_layernorm", post_layernorm, post_layernorm_bias)):
            if bias is not None and (gain is None or self.layernorm_is_rms):
                raise ValueError(f"QAttn: {name}_bias must come with a {name} that is a layer norm "
                                 "(layernorm_is_rms=False), got it without")
            setattr(self, name, vector(name, gain, width, self.xp))
            setattr(self, f"{name}_bias", vector(f"{name}_bias", bias, width, self.xp))
        self.q_norm = vector("q_norm", q_norm, ((self.head_dim,), (self.num_heads, self.head_dim)), self.xp)
        self.k_norm = vector("k_norm", k_norm, ((self.head_dim,), (self.num_kv_heads, self.head_dim)), self.xp)
        self._finish = {"norm_eps": self.norm_epsilon, "norm_is_rms": self.headnorm_is_rms}   # of new heads
        for name in ("q_norm", "k_norm"):
            if getattr(self, name) is not None:
                self._finish[name] = getattr(self, name)

    def _set_projections(self, q, k, v, o, q_bias, k_bias, v_bias, o_bias):
        self.q_size, self.kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        sizes = {"q": self.q_size, "k": self.kv_size, "v": self.kv_size}
        given = {"q": (q, q_bias), "k": (k, k_bias), "v": (v, v_bias)}
        matrices = [matrix(f"q_{n}_proj", given[n][0], (size, self.hidden_size),
                           f"[num_{'' if n == 'q' else 'kv_'}heads * head_dim, hidden_size]")
                    for n, size in sizes.items()]
        biases = [vector(f"{n}_bias", given[n][1], ((size,),), np) for n, size in sizes.items()]
        self.qkv = joined(matrices, biases, self.xp)
        self.o_proj = matrix("q_o_proj", o, (self.hidden_size, self.q_size),
                             "[hidden_size, num_heads * head_dim]").to(self.xp)
        self.o_bias = vector("o_bias", o_bias, ((self.hidden_size,),), self.xp)

    def set_loras(self, adapters):
        """The adapters that calls can name, in place of those of an earlier call.

        Threads that share a layer name different ones in their calls; none may be in a call meanwhile.

        Parameters
        ----------
        adapters : dict of name to (dict of "q", "k", "v" or "o" to LoRA)
            A name without weights for this layer has an empty dict. `load_lora` reads them from a file.

        Returns
        -------
        int
            The largest rank of all projections and adapters, 0 for none.

        Raises
        ------
        TypeError, ValueError
            A matrix that is missing or does not fit its projection; nothing has changed then.
        """
        kv = self.kv_size, self.hidden_size
        sizes = {"q": (self.q_size, self.hidden_size), "k": kv, "v": kv, "o": (self.hidden_size, self.q_size)}
        self.loras = Adapters(adapters, sizes, self._dtype_name, self.xp)
        if self.loras.max_rank and self._ones is None:
            self._ones = self.xp.asarray(np.ones(self.hidden_size, np.float32))
        self._workspace = Workspace(self, self.loras.max_rank > 0)
        return self.loras.max_rank

    def _added(self, loras, sequence_loras, batch_size, q_len):
        """(numbers of adapters of all rows, Group or None) of a call; None for no adapter."""
        if not loras and sequence_loras is None:
            return None
        group = None if sequence_loras is None else self.loras.group(sequence_loras, batch_size, q_len)
        return self.loras.numbers(loras), group if self.loras.max_rank else None

    # ---- before attention ------------------------------------------------------------------------------

    def _project(self, rows, added):
        """Norm and projections of q, k and v; the Buffers that hold them."""
        self._check_open()
        buffers = self._workspace.of(len(rows))
        normed, outs = rows, buffers.linears
        if self.layernorm is not None:
            normed = norm(rows, self.layernorm, self.layernorm_bias, self.layernorm_is_rms, self.norm_epsilon,
                          buffers.normed)
        numbers, group = added or ((), None)
        columns, order = buffers.outs, None if group is None else group.order
        if order is not None:
            normed = self._sorted(order, normed, buffers)
            flat = buffers.sorted_y[:buffers.heads.nbytes].view(self.dtype).reshape(buffers.heads.shape)
            outs, columns = [flat[:, linear.start:linear.stop] for linear in self.qkv], self._workspace.columns(flat)
        for linear, out in zip(self.qkv, outs, strict=True):
            quant_gemm(normed, linear.matrix, bias=linear.bias, out=out)
        if added is not None:
            self.loras.add(("q", "k", "v"), normed, columns, numbers, group)
        if order is not None:
            embedding(group.inverse, flat, out=buffers.heads)
        return buffers

    # ---- after it --------------------------------------------------------------------------------------

    def _output(self, mixed, rows, buffers, added):
        """Output projection, adapters, post-norm and residual into `rows` of x."""
        numbers, group = added or ((), None)
        order = None if group is None else group.order
        if self.post_layernorm is None and group is None:   # a group: as many roundings in any order
            quant_gemm(mixed, self.o_proj, bias=self.o_bias, accumulate=self.has_residual, out=rows)
            if added is not None:
                self.loras.add(("o",), mixed, {"o": rows}, numbers)
            return
        projected = buffers.projected
        if order is not None:
            mixed = self._sorted(order, mixed, buffers)
            projected = buffers.sorted_y[:projected.nbytes].view(np.float32).reshape(projected.shape)
        quant_gemm(mixed, self.o_proj, bias=self.o_bias, out=projected)
        if added is not None:
            self.loras.add(("o",), mixed, {"o": projected}, numbers, group)
        room = buffers.added if self.has_residual else None
        if self.post_layernorm is not None:
            if order is not None:
                projected = embedding(group.inverse, projected, out=buffers.projected)
            add_normed(projected, rows, room, self.post_layernorm, self.post_layernorm_bias, self.layernorm_is_rms,
                       self.norm_epsilon)
        else:
            embedding(group.inverse, projected, out=rows if room is None else room)
            if room is not None:
                add(room, rows, self._ones, self.norm_epsilon)

    def _sorted(self, order, rows, buffers):
        """`rows` in the order of their adapters."""
        nbytes = rows.size * rows.dtype.itemsize
        return embedding(order, rows, out=buffers.sorted_x[:nbytes].view(rows.dtype).reshape(rows.shape))

    # ---- the end ---------------------------------------------------------------------------------------

    def close(self):
        """Let go of all weights; calls are refused from then on."""
        self.qkv = self.o_proj = self._workspace = None

    def _check_open(self):
        if self.qkv is None:
            raise ValueError("QAttn: it must not be used after close(), got a call")

    @property
    def nbytes(self):
        """Bytes of the projections."""
        self._check_open()
        return sum(linear.matrix.nbytes for linear in self.qkv) + self.o_proj.nbytes
