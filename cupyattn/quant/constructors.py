# SPDX-License-Identifier: Apache-2.0
"""QMatrix from every checkpoint format and from numbers: a reader makes a CodedWeight, `from_coded` packs it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..runtime.arrays import dtype_of
from . import gguf, layout
from .checkpoint import quantization_config, read_layer, reader
from .coded import FLOAT8
from .packed import check_module, cupy_of, on_host
from .safetensors_file import Safetensors
from .shards import SEGMENT_ARRAYS
from .tensors import check_matrix

_CHUNK_BYTES = 1 << 19   # of codes read at a time, so that reader and packer meet in the cache


class Constructors:
    """The part of QMatrix that makes one.

    Common to all: tensors are arrays by the names the format gives them, the layer's prefix removed, NumPy or CuPy;
    they are read on the host and left as they are. out_features and in_features must be multiples of 8, of an array of
    numbers only in_features.
    ValueError for a missing tensor or a wrong shape, TypeError for a wrong dtype, NotImplementedError for a variant
    of the format that is not read: the message names the tensor. `xp` is where the matrix lives, numpy or cupy;
    default where the tensors are. FP8 weights that are NaN or infinite are refused, with their number; scales, zero
    points and weights that are not quantized may be, and make NaN or infinities of the products they are in.
    """

    @classmethod
    def _read(cls, format, tensors, xp, *arguments, **options):
        if not isinstance(tensors, Mapping):
            raise TypeError(f"QMatrix: tensors must be a dict of arrays, got {type(tensors).__name__}")
        host = {name: on_host(array) for name, array in tensors.items()}
        return cls.from_coded(reader(format)(host, *arguments, **options), xp=_module(xp, *tensors.values()))

    @classmethod
    def from_gptq(cls, tensors, bits=None, group_size=None, *, checkpoint_format=None, sym=None, zero_wrap=True,
                  in_features=None, xp=None):
        """From a GPTQ layer (AutoGPTQ, GPTQModel).

        Parameters
        ----------
        tensors : dict of str to ndarray
            ``qweight`` int32 [in * bits / 32, out], ``qzeros`` int32 [groups, out * bits / 32], ``scales``
            [groups, out] and perhaps ``g_idx`` int32 [in], any grouping of the columns.
        bits : int, optional
            2, 3, 4 or 8. Default what the shapes say.
        group_size : int, optional
            -1 for a group of all columns. Default what the shapes say.
        checkpoint_format : str, optional
            ``"gptq"``, the default, where qzeros hold zero - 1, or ``"gptq_v2"``, where they hold zero. A symmetric
            weight that is labelled wrongly is told by its zeros, read rightly and warned of.
        sym : bool, optional
            False: the label is believed.
        zero_wrap : bool or "word"
            Whether field 2^bits - 1 of "gptq" is zero point 0 (True) or 2^bits. "word": the writer subtracted 1 from
            all fields of a word at once, so that a zero point of 0 borrowed from the next, as GPTQModel does.
        in_features : int, optional
            Where neither ``g_idx`` nor the words of ``qweight`` say it.
        xp : module, optional
            numpy or cupy.

        Returns
        -------
        QMatrix
        """
        return cls._read("gptq", tensors, xp, bits, group_size, checkpoint_format=checkpoint_format, sym=sym,
                         zero_wrap=zero_wrap, in_features=in_features)

    @classmethod
    def from_awq(cls, tensors, bits=None, group_size=None, *, version="gemm", xp=None):
        """From an AWQ layer in the gemm layout.

        Parameters
        ----------
        tensors : dict of str to ndarray
            ``qweight`` int32 [in, out * bits / 32], ``qzeros`` int32 [groups, out * bits / 32], ``scales``
            [groups, out].
        bits : int, optional
            4 or 8. Default what the shapes say.
        group_size : int, optional
            -1 for a group of all columns. Default what the shapes say.
        version : str
            Only ``"gemm"``.
        xp : module, optional
            numpy or cupy.

        Returns
        -------
        QMatrix
        """
        return cls._read("awq", tensors, xp, bits, group_size, version=version)

    @classmethod
    def from_compressed_tensors(cls, tensors, bits=None, group_size=None, *, shape=None, xp=None):
        """From a layer of integers saved by compressed-tensors (llm-compressor): W4A16, W8A16 and other widths.

        Parameters
        ----------
        tensors : dict of str to ndarray
            ``weight_packed`` int32 [out, words], or ``weight`` int8 [out, in]; ``weight_scale``; perhaps
            ``weight_zero_point``, ``weight_g_idx``, ``weight_shape``.
        bits : int, optional
            2 to 6 or 8. Default what the shapes say.
        group_size : int, optional
            -1 for a group of all columns. Default what the shapes say.
        shape : (int, int), optional
            (out_features, in_features), for files without ``weight_shape``.
        xp : module, optional
            numpy or cupy.

        Returns
        -------
        QMatrix
        """
        return cls._read("compressed_tensors", tensors, xp, bits, group_size, shape=shape)

    @classmethod
    def from_exl2(cls, tensors, out_features=None, *, xp=None):
        """From an EXL2 layer (ExLlamaV2), any mix of bits.

        Parameters
        ----------
        tensors : dict of str to ndarray
            ``q_weight``, ``q_groups``, ``q_scale``, ``q_scale_max``, ``q_invperm``.
        out_features : int, optional
            Columns of ``q_weight`` past it are padding. Default all.
        xp : module, optional
            numpy or cupy.

        Returns
        -------
        QMatrix
            A segment for each run of groups of as many bits.
        """
        return cls._read("exl2", tensors, xp, out_features)

    @classmethod
    def from_hqq(cls, tensors, bits=None, shape=None, *, axis=None, xp=None):
        """From an HQQ layer with groups along the rows (axis 1).

        Parameters
        ----------
        tensors : dict of str to ndarray
            ``W_q``, ``scale``, ``zero`` and perhaps ``nbits``, ``axis``, ``shape``, which stand in for arguments.
        bits : int, optional
            2 to 6 or 8. Default what the shapes say.
        shape : (int, int), optional
            (out_features, in_features); must be given if it is no tensor.
        axis : int, optional
            Only 1. Default what the shape of ``scale`` says.
        xp : module, optional
            numpy or cupy.

        Returns
        -------
        QMatrix
        """
        return cls._read("hqq", tensors, xp, bits, shape, axis=axis)

    @classmethod
    def from_fp8(cls, tensors, *, block=(128, 128), xp=None):
        """From an FP8 layer: a scale for the tensor, for each row, or for each block.

        Parameters
        ----------
        tensors : dict of str to ndarray
            ``weight`` float8_e4m3fn or float8_e5m2 [out, in] and ``weight_scale`` or ``weight_scale_inv``, a
            multiplier by either name.
        block : (int, int)
            Rows and columns of a block, where scales are of blocks.
        xp : module, optional
            numpy or cupy.

        Returns
        -------
        QMatrix
        """
        return cls._read("fp8", tensors, xp, block=block)

    @classmethod
    def from_bitsandbytes(cls, tensors, state=None, *, xp=None):
        """From an NF4 or FP4 layer of bitsandbytes, with or without double quantization.

        Parameters
        ----------
        tensors : dict of str to ndarray
            ``weight``, ``weight.absmax``, ``weight.quant_map``, ``weight.quant_state.bitsandbytes__nf4`` and, for
            double quantization, ``weight.nested_absmax`` and ``weight.nested_quant_map``.
        state : dict, optional
            Instead of the quant_state tensor: ``quant_type``, ``blocksize``, ``shape``, and ``nested_blocksize`` and
            ``nested_offset``.
        xp : module, optional
            numpy or cupy.

        Returns
        -------
        QMatrix
        """
        return cls._read("bitsandbytes", tensors, xp, state)

    @classmethod
    def from_mxfp4(cls, tensors, *, xp=None):
        """From an MXFP4 layer: E2M1 numbers, a power of two for each 32.

        Parameters
        ----------
        tensors : dict of str to ndarray
            ``blocks`` uint8 [..., out, in / 32, 16] and ``scales`` (gpt-oss; leading axes are joined to the rows),
            or ``weight_packed`` uint8 [out, in / 2] and ``weight_scale`` (compressed-tensors).
        xp : module, optional
            numpy or cupy.

        Returns
        -------
        QMatrix
        """
        return cls._read("mxfp4", tensors, xp)

    @classmethod
    def from_nvfp4(cls, tensors, *, xp=None):
        """From an NVFP4 layer: E2M1 numbers, an FP8 scale for each 16, one float32 for the tensor.

        Parameters
        ----------
        tensors : dict of str to ndarray
            ``weight_packed``, ``weight_scale`` and ``weight_global_scale``, a divisor (compressed-tensors), or
            ``weight``, ``weight_scale`` and ``weight_scale_2``, a multiplier (ModelOpt).
        xp : module, optional
            numpy or cupy.

        Returns
        -------
        QMatrix
        """
        return cls._read("nvfp4", tensors, xp)

    @classmethod
    def from_gguf(cls, data, type, shape, *, xp=None):
        """From the raw bytes of a GGUF tensor.

        Parameters
        ----------
        data : ndarray, uint8, or bytes
            Blocks of N rows, any shape in that order: of one axis, or with the rows in front. Not changed. (F16, BF16
            and F32: the values' bytes.)
        type : GGMLQuantizationType, int or str
            Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4, NVFP4, F16, BF16 or F32.
        shape : (int, int)
            (out_features, in_features): GGUF's ``ne`` reversed.
        xp : module, optional
            numpy or cupy; default the kind of `data`.

        Raises
        ------
        NotImplementedError
            Another type.
        ValueError
            `data` and `shape` disagree, in bytes or rows (a `shape` that is ``ne`` not reversed), or in_features is no
            multiple of the block's numbers (8 for F16, BF16, F32).
        """
        shape, name, xp = check_matrix("shape", shape), gguf.type_name(type), _module(xp, data)
        host = np.frombuffer(data, np.uint8) if isinstance(data, bytes | bytearray | memoryview) else on_host(data)
        if host.dtype not in (np.uint8, np.int8):
            raise TypeError(f"QMatrix: data must be uint8 or bytes, got {host.dtype.name}")
        host = host.view(np.uint8)
        gguf.check_rows(host, shape)
        if name in gguf.DENSE:
            dtype = dtype_of(gguf.DENSE[name])
            if host.size != shape[0] * shape[1] * dtype.itemsize:
                raise ValueError(f"QMatrix: data must hold {shape[0] * shape[1] * dtype.itemsize} bytes, "
                                 f"got {host.size}")
            return cls.from_dense(np.ascontiguousarray(host).reshape(-1).view(dtype).reshape(shape), xp=xp)
        blocks = gguf.blocks(host, name, shape)
        step = max(1, _CHUNK_BYTES // (16 * shape[1])) * 16
        some = (blocks[start:start + step] for start in range(0, shape[0], step))
        parts = (layout.pack(gguf.read(rows, name, (len(rows), shape[1])))[0][0] for rows in some)
        return cls(name, shape, (layout.pack_by_rows(shape[0], parts),)).to(xp)

    @classmethod
    def from_dense(cls, w, *, xp=None):
        """From an array [out_features, in_features], float16, bfloat16 or float32, kept in that type.

        in_features must be a multiple of 8. `xp` as in `from_gguf`.
        """
        xp = _module(xp, w)
        w = w if cupy_of(w) else np.asarray(w)
        if w.dtype.name not in layout.DENSE:
            raise TypeError(f"QMatrix: w must be {' or '.join(layout.DENSE)}, got {w.dtype.name}")
        shape = check_matrix("w", w.shape)
        segment = layout.pack_dense(np.ascontiguousarray(on_host(w))) if xp is np else _repack(xp.asarray(w))
        return cls(w.dtype.name, shape, (segment,))

    @classmethod
    def from_coded(cls, weight, *, xp=None):
        """From a ``cupyattn.quant.coded.CodedWeight`` of NumPy arrays, whose in_features must be a multiple of 8.

        `xp` is numpy or cupy, default numpy; with cupy the packing is done on the device. ValueError for FP8 codes
        that are no finite numbers.
        """
        shape, xp = check_matrix("weight", weight.shape), _module(xp)
        _check_finite(weight)
        if xp is np:
            return cls(weight.format, shape, *layout.pack(weight))
        segments, order = layout.pack(weight, lambda segment: _repacked(segment, xp))
        return cls(weight.format, shape, segments, None if order is None else xp.asarray(order))

    @classmethod
    def quantize(cls, w, scheme, *, xp=None):
        """From an array, rounded to nearest.

        Parameters
        ----------
        w : ndarray [out_features, in_features], float16, bfloat16 or float32
            All numbers finite.
        scheme : str
            ``"int4"``, ``"int8"``: a scale per row; with ``-g<N>`` per N columns of a row (a multiple of 16), with
            ``-asym`` zero points too, as in ``"int4-g128-asym"``. ``"fp8"`` (e4m3, a scale per row),
            ``"fp8-block128"``, ``"nf4"`` (64 columns), ``"nf4-g<N>"``, ``"mxfp4"``, ``"nvfp4"``.
        xp : module, optional
            numpy or cupy.

        Returns
        -------
        QMatrix
            Its format is `scheme`.
        """
        from .quantize import quantize

        if not isinstance(w, np.ndarray) and cupy_of(w) is None:
            raise TypeError(f"QMatrix: w must be a NumPy or CuPy array, got {type(w).__name__}")
        return cls.from_coded(quantize(on_host(w), scheme), xp=_module(xp, w))

    @classmethod
    def from_safetensors(cls, path, prefix, *, config=None, shape=None, xp=None):
        """From a file or folder of safetensors, in whatever format the layer is there.

        Parameters
        ----------
        path : str, Path or Safetensors
            A .safetensors file, or a model's folder, sharded or not. To load many layers, open it once:
            ``cupyattn.quant.Safetensors(path)``.
        prefix : str
            Of the layer's tensors, ``"model.layers.0.self_attn.q_proj"``. Its bias, if any, is not part of the
            matrix.
        config : dict, optional
            The model's config.json or its ``quantization_config``. Default what is beside the file.
        shape : (int, int), optional
            (out_features, in_features), for formats whose tensors leave it open; checked where they do not.
        xp : module, optional
            numpy, the default, or cupy.

        Returns
        -------
        QMatrix

        Raises
        ------
        ValueError
            A damaged file, or no layer of that name; close names are listed.

        Examples
        --------
        >>> QMatrix.from_safetensors("Llama-3.2-1B-GPTQ", "model.layers.0.mlp.down_proj")  # doctest: +SKIP
        QMatrix(gptq, 2048x8192, 4.125 bits per weight, 8650752 bytes)
        """
        files = path if isinstance(path, Safetensors) else Safetensors(Path(path))
        tensors = files.layer(prefix)
        try:
            weight = read_layer(tensors, quantization_config(files.folder) if config is None else config, shape)
            return cls.from_dense(weight, xp=xp) if isinstance(weight, np.ndarray) else cls.from_coded(weight, xp=xp)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise type(error)(f"{error} (layer {prefix} of {files.path})") from None


def _module(xp, *arrays):
    """Where the matrix shall live: `xp`, or else cupy if it has one of the arrays."""
    if xp is not None:
        return check_module(xp)
    return next(filter(None, map(cupy_of, arrays)), np)


def _repack(weights, **keywords):
    from ..ops.repack import repack

    return repack(weights, **keywords)


def _repacked(segment, cupy):
    """A Segment of NumPy arrays as a PackedSegment on the device: moved as it is and packed there."""
    segment = layout.with_whole_supers(segment)
    arrays = {name: getattr(segment, name) for name in SEGMENT_ARRAYS if getattr(segment, name) is not None}
    scale_dtype = segment.scale.dtype.name if segment.scale.dtype.name.startswith("float8") else None
    if scale_dtype is not None:   # CuPy has no such dtype
        arrays["scale"] = segment.scale.view(np.uint8)
    moved = {name: cupy.asarray(array) for name, array in arrays.items()}
    return _repack(replace(segment, **moved), scale_dtype=scale_dtype)


def _check_finite(weight):
    """Kernels on tensor cores read FP8 codes as if all were finite."""
    for segment in weight.segments:
        if segment.kind in FLOAT8:
            codes, least = segment.codes & np.uint8(127), {"e4m3": 127, "e5m2": 124}[segment.kind]
            if codes.max(initial=0) >= least:
                raise ValueError(f"QMatrix: weight must hold finite numbers only, got {(codes >= least).sum()} codes "
                                 f"of {codes.size} that are NaN{' or infinity' if least == 124 else ''}")
