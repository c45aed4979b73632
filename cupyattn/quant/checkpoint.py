# SPDX-License-Identifier: Apache-2.0
"""A layer's weight out of a checkpoint of any format: the format found, the reader of that format called."""

import importlib
import json

import numpy as np

from .detect import detect

# beside config.json, where its quantization_config is missing: AutoGPTQ, AutoAWQ, ModelOpt
_CONFIGS = ("config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json")
_SHAPE_ARGUMENTS = {"gptq": "in_features", "compressed_tensors": "shape", "hqq": "shape", "exl2": "out_features"}
_REFUSED = ("pre_quant_scale",)   # multiplies x


def read_layer(tensors, config=None, shape=None):
    """The weight of one linear layer.

    Parameters
    ----------
    tensors : dict of str to ndarray
        NumPy arrays by name, the layer's prefix removed; names that are no part of the weight (``bias``,
        ``input_scale``) are not looked at.
    config : dict, optional
        config.json, or its ``quantization_config``.
    shape : (int, int), optional
        (out_features, in_features), where it is known: it settles what some formats leave open, and is checked.

    Returns
    -------
    CodedWeight or ndarray
        An array where the weight is not quantized.

    Raises
    ------
    ValueError, TypeError, NotImplementedError
        From `detect` and the format's reader; or another shape than `shape`.
    """
    refused = sorted(tensors.keys() & set(_REFUSED))
    if refused:
        raise NotImplementedError(f"QMatrix: tensors must be of a format that is read, got {refused[0]}")
    name, arguments = detect(tensors, config)
    if name == "dense":
        weight = np.asarray(tensors["weight"])
    else:
        if shape is not None and name in _SHAPE_ARGUMENTS:
            argument = _SHAPE_ARGUMENTS[name]
            arguments[argument] = {"in_features": shape[1], "out_features": shape[0], "shape": tuple(shape)}[argument]
        weight = reader(name)(tensors, **arguments)
    if shape is not None and tuple(weight.shape) != tuple(shape):
        raise ValueError(f"QMatrix: weight must have shape {list(shape)}, got {list(weight.shape)}")
    return weight


def reader(name):
    """``read`` of the module `name` of this package: imported when it is wanted, some need ml_dtypes."""
    return importlib.import_module("." + name, __package__).read


def quantization_config(folder):
    """What a checkpoint's folder says of its quantization.

    Returns
    -------
    dict
        Empty where it says nothing.
    """
    for name in _CONFIGS:
        path = folder / name
        if not path.is_file():
            continue
        config = read_json(path)
        if name != "config.json":
            return config.get("quantization") or config
        for key in ("quantization_config", "compression_config"):
            if config.get(key):
                return config[key]
    return {}


def read_json(path):
    """The JSON object of a file; ValueError if it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must be a JSON object, got {str(found)[:40]}")
    return found
