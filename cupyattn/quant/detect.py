# SPDX-License-Identifier: Apache-2.0
"""Which format a weight's tensors are: by their names, dtypes and shapes; config.json adds what those leave open."""

DENSE = ("float16", "bfloat16", "float32")
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")


def detect(tensors, config=None):
    """The format of a weight and what its reader should be told.

    Parameters
    ----------
    tensors : dict of str to ndarray
        The arrays of one linear layer by name, their common prefix removed: ``"qweight"``, ``"weight.absmax"``...
        For experts of gpt-oss ``"blocks"`` and ``"scales"``.
    config : dict, optional
        config.json, or its ``quantization_config``.

    Returns
    -------
    name : str
        ``"gptq"``, ``"awq"``, ``"compressed_tensors"``, ``"hqq"``, ``"exl2"``, ``"fp8"``, ``"bitsandbytes"``,
        ``"mxfp4"``, ``"nvfp4"``: the module of `cupyattn.quant` with the reader; or ``"dense"``.
    arguments : dict
        For that reader's ``read(tensors, **arguments)``: what the configuration says and the tensors do not.

    Raises
    ------
    ValueError
        Tensors of no known format; lists their names.
    NotImplementedError
        A known format without a reader.
    """
    config = _quantization(config)
    names = tensors.keys()
    if "trellis" in names:
        raise NotImplementedError("QMatrix: tensors must be of a format that is read, got trellis, which is EXL3")
    if "q_weight" in names:
        return "exl2", {}
    if "W_q" in names:
        config = config.get("quant_config") or config
        return "hqq", _pick(config.get("weight_quant_params") or {}, bits="nbits", axis="axis")
    if {"qweight", "qzeros", "scales"} <= names:
        return _gptq_or_awq(tensors, config)
    if {"blocks", "scales"} <= names:
        return "mxfp4", {}
    if "weight_packed" in names:
        return _packed(tensors, config)
    if "weight" in names:
        return _weight(tensors, config)
    raise ValueError(f"QMatrix: tensors must be a weight of a known format, got {', '.join(sorted(names)) or 'none'}")


def _gptq_or_awq(tensors, config):
    """Both have qweight, qzeros and scales; only GPTQ's qweight is as wide as its scales."""
    qweight, scales = tensors["qweight"], tensors["scales"]
    if qweight.dtype.itemsize == 4 and qweight.shape[-1] == scales.shape[-1]:
        arguments = _pick(config, bits="bits", group_size="group_size", checkpoint_format="checkpoint_format",
                          sym="sym")
        if config.get("dynamic"):   # rules by module name, that give modules other bits and groups
            arguments.pop("bits", None)
            arguments.pop("group_size", None)
        return "gptq", arguments
    return "awq", _pick(config, bits="bits", group_size="group_size", version="version")


def _packed(tensors, config):
    """The formats of compressed-tensors with a weight_packed."""
    if "weight_global_scale" in tensors:
        return "nvfp4", {}
    dtype = tensors["weight_packed"].dtype.name
    if dtype == "uint8":
        return "mxfp4", {}
    return "compressed_tensors", _scheme(config)


def _weight(tensors, config):
    """The formats with a tensor that is called weight."""
    dtype = tensors["weight"].dtype.name
    names = tensors.keys()
    if {"weight.absmax", "absmax"} & names:
        return "bitsandbytes", {}
    if "SCB" in names:
        raise NotImplementedError("QMatrix: tensors must be of a format that is read, got weight and SCB, "
                                  "which is LLM.int8 of bitsandbytes")
    if "weight_scale_2" in names and dtype == "uint8":
        return "nvfp4", {}
    if dtype in FLOAT8:
        block = config.get("weight_block_size") or _agreed(config, "block_structure")
        return "fp8", {"block": tuple(block)} if block else {}
    if dtype == "int8" and "weight_scale" in names:
        return "compressed_tensors", _scheme(config)
    if dtype in DENSE:
        return "dense", {}
    raise ValueError(f"QMatrix: tensors must be a weight of a known format, got weight of {dtype} with "
                     f"{', '.join(sorted(names - {'weight'})) or 'nothing'}")


def _quantization(config):
    config = config or {}
    for key in ("quantization_config", "compression_config"):
        config = config.get(key) or config
    return config


def _scheme(config):
    """What compressed-tensors says of bits and groups."""
    found = {name: _agreed(config, name) for name in ("num_bits", "group_size")}
    return _pick(found, bits="num_bits", group_size="group_size")


def _agreed(config, name):
    """An entry of compressed-tensors' schemes for weights, if all of them have the same."""
    schemes = [group.get("weights") or {} for group in (config.get("config_groups") or {}).values()]
    values = [scheme.get(name) for scheme in schemes]
    return values[0] if values and values.count(values[0]) == len(values) else None


def _pick(config, **names):
    """The entries of `config` that are there, as arguments."""
    return {argument: config[name] for argument, name in names.items() if config.get(name) is not None}
