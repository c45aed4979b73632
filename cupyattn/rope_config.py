# SPDX-License-Identifier: Apache-2.0
"""The rotary embedding a Hugging Face ``config.json`` describes."""

# models whose own code pairs neighbours instead of halves
_INTERLEAVED_MODELS = ("codegen", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "ernie4_5", "glm", "glm4", "gptj",
                       "llama4_text")


def rope_fields(config, layer_type, style):
    """Keyword arguments of RopeParams; see ``RopeParams.from_hf_config``."""
    config = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(config, dict):
        raise TypeError(f"RopeParams: config must be a dict or have to_dict(), got {type(config).__name__}")
    if isinstance(config.get("text_config"), dict):
        config = config | config["text_config"]
    rope = _rope(config, layer_type)
    kind = rope.get("rope_type", rope.get("type", "default"))
    interleaved = config.get("rope_interleave", config.get("model_type") in _INTERLEAVED_MODELS)
    fields = {"rotary_dim": _rotary_dim(config, rope),
              "base": rope.get("rope_theta", config.get("rope_theta", config.get("rotary_emb_base", 10000.0))),
              "style": style or ("interleaved" if interleaved else "neox")}
    if rope.get("mrope_section") is not None:
        fields |= {"mrope_section": tuple(rope["mrope_section"]),
                   "mrope_interleaved": bool(rope.get("mrope_interleaved", False))}
    elif kind == "mrope":
        raise ValueError("RopeParams: config must have mrope_section for RoPE of type 'mrope', got none")
    return fields | _scaling(config, rope, kind)


def _rope(config, layer_type):
    """The dict that describes the RoPE of `layer_type`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope and all(isinstance(value, dict) for value in rope.values()):
        if layer_type not in rope:
            raise ValueError(f"RopeParams: layer_type must be one of {sorted(rope)}, got {layer_type!r}")
        return rope[layer_type]
    if layer_type == "sliding_attention" and "rope_local_base_freq" in config:
        return {"rope_theta": config["rope_local_base_freq"]}
    return rope


def _rotary_dim(config, rope):
    for name in ("qk_rope_head_dim", "rotary_dim"):
        if config.get(name) is not None:
            return config[name]
    head_dim = config.get("head_dim")
    if head_dim is None:
        hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
        if hidden is None or heads is None:
            raise ValueError("RopeParams: config must have head_dim, or hidden_size and num_attention_heads, got "
                             f"{sorted(config)}")
        head_dim = hidden // heads
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", config.get("rotary_pct", 1.0)))
    return int(head_dim * (1.0 if part is None else part))


def _scaling(config, rope, kind):
    """The fields of the scaling rule called `kind`."""
    def need(name, *places):
        value = next((place[name] for place in (rope, *places) if place.get(name) is not None), None)
        if value is None:
            raise ValueError(f"RopeParams: config must have {name} for RoPE of type {kind!r}, got none")
        return value

    def given(*names):
        return {name: rope[name] for name in names if rope.get(name) is not None}

    limit, original = "max_position_embeddings", "original_max_position_embeddings"
    if kind in ("default", "mrope"):
        return {}
    if kind == "linear":
        return {"scaling": "linear", "factor": need("factor")}
    if kind in ("dynamic", "ntk") and rope.get("alpha") is not None:
        return {"scaling": "ntk", "alpha": rope["alpha"]}
    if kind == "dynamic":
        m = rope.get(original) or need(limit, config)
        return {"scaling": "dynamic", "factor": need("factor"), "original_max_position": m}
    if kind == "llama3":
        return {"scaling": "llama3", "factor": need("factor"), "original_max_position": need(original, config),
                "low_freq_factor": need("low_freq_factor"), "high_freq_factor": need("high_freq_factor")}
    if kind == "yarn":
        m = rope.get(original) or config.get(original) or need(limit, config)
        factor = rope.get("factor") or need(limit, config) / m
        return {"scaling": "yarn", "factor": factor, "original_max_position": m} | given(
            "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim")
    if kind in ("longrope", "su"):
        m = config.get(original) or rope.get(original)
        factor = need(limit, config) / m if m else rope.get("factor") or 1.0
        fields = given("attention_factor")
        if rope.get("short_mscale") is not None:
            if rope["short_mscale"] != rope.get("long_mscale"):
                raise NotImplementedError("RopeParams: short_mscale and long_mscale must be equal, got "
                                          f"{rope['short_mscale']} and {rope.get('long_mscale')}")
            fields["attention_factor"] = rope["short_mscale"]
        return fields | {"scaling": "longrope", "factor": factor, "original_max_position": m or need(limit, config),
                         "short_factor": need("short_factor"), "long_factor": need("long_factor")}
    raise NotImplementedError(f"RopeParams: RoPE of type {kind!r} is not known; there are default, linear, dynamic, "
                              "ntk, yarn, llama3, longrope (su) and mrope")
