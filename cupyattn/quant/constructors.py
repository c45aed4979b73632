# SPDX-License-Identifier: Apache-2.0
"""QMatrix from every checkpoint format: a reader makes a CodedWeight, `from_coded` packs it."""

import sys
from pathlib import Path

import numpy as np

from .checkpoint import quantization_config, read_layer, reader
from .safetensors_file import Safetensors


class Constructors:
    """The part of QMatrix that makes one.

    Common to all: tensors are arrays by the names the format gives them, the layer's prefix removed, NumPy or CuPy;
    they are read on the host and left as they are. out_features and in_features must be multiples of 8.
    ValueError for a missing tensor or a wrong shape, TypeError for a wrong dtype, NotImplementedError for a variant
    of the format that is not read: the message names the tensor. `xp` is where the matrix lives, numpy or cupy;
    default where the tensors are. FP8 weights that are NaN or infinite are refused, with their number; scales, zero
    points and weights that are not quantized may be, and make NaN or infinities of the products they are in.
    """

    @classmethod
    def _read(cls, format, tensors, xp, *arguments, **options):
        host, xp = _host(tensors, xp)
        return cls.from_coded(reader(format)(host, *arguments, **options), xp=xp)

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

        host, xp = _host({"w": w}, xp)
        return cls.from_coded(quantize(host["w"], scheme), xp=xp)

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


def _host(tensors, xp):
    """The arrays on the host, and the module the matrix shall live in: `xp`, or cupy if it has one of the arrays."""
    cupy = sys.modules.get("cupy")
    found = {}
    for name, array in tensors.items():
        if cupy is not None and isinstance(array, cupy.ndarray):
            found[name], xp = cupy.asnumpy(array), xp or cupy
        else:
            found[name] = np.asarray(array)
    return found, xp or np
