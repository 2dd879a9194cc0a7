# SPDX-License-Identifier: Apache-2.0
"""config.json to ModelConfig, with every unknown feature refused by name. No jax.

A key is read (then it stands in DEFAULTS or is required), harmless (it changes no logit), or switched off (null, false,
empty); any other key is refused, because a feature that is silently dropped gives a model that is almost right.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxlm.checkpoints.families import find_family
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.position_kinds import (
    Alibi,
    DynamicScaling,
    Hope,
    Learned,
    LinearScaling,
    Llama3Scaling,
    Nope,
    Rope,
    Xpos,
    YarnScaling,
)

_ROPE = {"rope_parameters": None, "rope_scaling": None, "rope_theta": 10_000.0}
_LLAMA = _ROPE | {
    "hidden_act": "silu",
    "head_dim": None,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": 2048,
}
_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}

# What transformers takes when config.json lacks the key. A key that is read and not here is required.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": _LLAMA | _QWEN,
    "qwen3": _LLAMA | _QWEN | {"head_dim": 128},
    "olmo2": _LLAMA | {"rms_norm_eps": 1e-5},
    "gemma2": _LLAMA
    | {
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": 256,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "layer_types": None,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gpt2": {
        "n_inner": None,
        "n_positions": 1024,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
    },
    "jaxlm": {},
}

# Dropout is here because jaxlm trains without it; pretraining_tp only cuts products in pieces.
_HARMLESS = """
    model_type architectures transformers_version torch_dtype dtype _name_or_path name_or_path use_cache return_dict
    bos_token_id eos_token_id pad_token_id unk_token_id initializer_range attention_dropout pretraining_tp
    id2label label2id num_labels problem_type tokenizer_class cache_implementation task_specific_params
    _attn_implementation _attn_implementation_autoset attn_implementation transformers.js_config is_llama_config
    max_length min_length do_sample temperature top_k top_p num_beams repetition_penalty
    resid_pdrop embd_pdrop attn_pdrop n_ctx unsloth_version unsloth_fixed
"""
HARMLESS = frozenset(_HARMLESS.split())

REMEDIES = {
    "quantization_config": "save the checkpoint dequantised (or use the GGUF file) and load that",
    "auto_map": "the checkpoint wants code of its own to be run, which jaxlm never does",
    "num_experts": "mixtures of experts are not built",
    "num_local_experts": "mixtures of experts are not built",
}

KINDS = {
    kind.__name__: kind
    for kind in (Rope, Learned, Nope, Alibi, Xpos, Hope, LinearScaling, DynamicScaling, Llama3Scaling, YarnScaling)
}

_READ_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


class _Keys:
    """A config.json that remembers which keys were read."""

    def __init__(self, values: Mapping[str, Any], family: str):
        self.values, self.family, self.read = values, family, set[str]()

    def __call__(self, key: str) -> Any:
        self.read.add(key)
        if key in self.values:
            return self.values[key]
        if key not in DEFAULTS[self.family]:
            raise ValueError(
                f"config.json of a {self.family} model lacks {key!r}: take the file of the same checkpoint"
            )
        return DEFAULTS[self.family][key]

    def size(self, key: str) -> int:
        value = self(key)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ValueError(f"config.json: {key} must be a positive integer, got {value!r}")
        return value

    def size_or_none(self, key: str) -> int | None:
        return None if self(key) is None else self.size(key)

    def activation(self, key: str) -> Any:
        name = self(key)
        if name not in _READ_ACTIVATIONS:
            raise ValueError(f"config.json: {key} {name!r} is not supported, only {', '.join(_READ_ACTIVATIONS)}")
        return _READ_ACTIVATIONS[name]

    def refuse_the_rest(self) -> None:
        for key in sorted(self.values.keys() - self.read - HARMLESS):
            value = self.values[key]
            if value is None or value is False or value in ({}, [], "") or key.startswith(("output_", "summary_")):
                continue
            if (key, value) in (("chunk_size_feed_forward", 0), ("partial_rotary_factor", 1.0)):
                continue
            remedy = REMEDIES.get(key, "if it changes no logit, delete the line from config.json")
            raise ValueError(f"config.json: {key} = {value!r} is not supported for {self.family}: {remedy}")


def _read_rope(c: _Keys) -> dict[str, Any]:
    """Base and scaling from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    new, old, base = c("rope_parameters") or {}, c("rope_scaling") or {}, c("rope_theta")
    if new and old and new != old:
        raise ValueError(f"config.json: rope_parameters {new!r} and rope_scaling {old!r} differ: delete one of them")
    rope = dict(new or old)
    base = rope.pop("rope_theta", base)
    kind, also = rope.pop("rope_type", None), rope.pop("type", None)
    kind = kind or also or "default"
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"config.json: partial_rotary_factor {new or old!r} is not supported: all of a head is rotated"
        )
    scaling: LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | None = None
    try:
        if kind == "dynamic":  # of the pretrained length, which this kind alone reads from the model's
            rope.pop("original_max_position_embeddings", None)
            scaling = DynamicScaling(
                factor=float(rope.pop("factor")), original_length=c.size("max_position_embeddings")
            )
        elif kind == "yarn":
            scaling = _read_yarn(rope, c)
        elif kind == "linear":
            scaling = LinearScaling(factor=float(rope.pop("factor")))
        elif kind == "llama3":
            scaling = Llama3Scaling(
                factor=float(rope.pop("factor")),
                low_frequency_factor=float(rope.pop("low_freq_factor")),
                high_frequency_factor=float(rope.pop("high_freq_factor")),
                original_length=int(rope.pop("original_max_position_embeddings", c("max_position_embeddings"))),
            )
        elif kind != "default":
            raise ValueError(
                f"config.json: rope_type {kind!r} is not supported, only default, linear, dynamic, llama3 and yarn"
            )
    except KeyError as error:
        raise ValueError(f"config.json: rope_type {kind!r} lacks {error}: {new or old!r}") from error
    if rest := {key: value for key, value in rope.items() if value is not None}:
        raise ValueError(f"config.json: {rest!r} beside rope_type {kind!r} is not supported")
    if not isinstance(base, int | float) or base <= 0:
        raise ValueError(f"config.json: rope_theta must be a positive number, got {base!r}")
    return {"positions": Rope(base=float(base), scaling=scaling)}


def _read_yarn(rope: dict[str, Any], c: _Keys) -> YarnScaling:
    """Takes YaRN's keys out of `rope`."""
    factor = float(rope.pop("factor"))
    sharpness = rope.pop("attention_factor", None)
    part, all_parts = rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
    if sharpness is None and part and all_parts:
        sharpness = (0.1 * part * math.log(factor) + 1.0) / (0.1 * all_parts * math.log(factor) + 1.0)
    return YarnScaling(
        factor=factor,
        original_length=int(rope.pop("original_max_position_embeddings", c("max_position_embeddings"))),
        fast=float(rope.pop("beta_fast", None) or 32.0),
        slow=float(rope.pop("beta_slow", None) or 1.0),
        sharpness=None if sharpness is None else float(sharpness),
        truncate=bool(rope.pop("truncate", True)),
    )


def _read_native(c: _Keys) -> dict[str, Any]:
    """Our own fields, for models that no family of Hugging Face has."""
    fields = dict(c("model"))
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    if unknown := sorted(fields.keys() - known):
        raise ValueError(f"config.json: a jaxlm model has no field {unknown[0]!r}: written by another version")
    fields |= {"windows": tuple(fields["windows"]), "positions": _read_kind(fields["positions"])}
    return fields | {"vocab_size": c.size("vocab_size")}


def _read_kind(value: Any) -> Any:
    """A kind of positions, or a scaling, from `{"kind": its class, ...}`."""
    if not isinstance(value, dict):
        return value
    fields = {name: _read_kind(inner) for name, inner in value.items() if name != "kind"}
    if value.get("kind") not in KINDS:
        raise ValueError(f"config.json: positions of kind {value.get('kind')!r} are unknown: {', '.join(KINDS)}")
    try:
        return KINDS[value["kind"]](**fields)
    except TypeError as error:
        raise ValueError(f"config.json: {value['kind']} of another version: {error}") from error


def _read_rms_decoder(c: _Keys, activation: str = "hidden_act") -> dict[str, Any]:
    """What all families but GPT-2 share."""
    bias = bool(c("attention_bias"))
    return _read_rope(c) | {
        "vocab_size": c.size("vocab_size"),
        "width": c.size("hidden_size"),
        "num_layers": c.size("num_hidden_layers"),
        "num_heads": c.size("num_attention_heads"),
        "num_kv_heads": c.size_or_none("num_key_value_heads"),
        "head_width": c.size_or_none("head_dim"),
        "mlp_width": c.size("intermediate_size"),
        "max_length": c.size("max_position_embeddings"),
        "norm_epsilon": c("rms_norm_eps"),
        "activation": c.activation(activation),
        "attention_bias": bias,
        "attention_out_bias": bias,
        "tied": bool(c("tie_word_embeddings")),
    }


def _period(windows: list[int | None]) -> tuple[int | None, ...]:
    """The shortest tuple that gives `windows` when repeated."""
    sizes = range(1, len(windows) + 1)
    size = next(n for n in sizes if all(w == windows[i % n] for i, w in enumerate(windows)))
    return tuple(windows[:size])


def _read_windows(c: _Keys, num_layers: int, window: int | None, default: list[str]) -> tuple[int | None, ...]:
    """Windows by layer from `layer_types`."""
    kinds = c("layer_types")
    kinds = default if kinds is None else kinds
    if len(kinds) != num_layers or set(kinds) - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"config.json: layer_types {kinds!r} must name {num_layers} layers, full_attention or sliding_attention"
        )
    if window is None and "sliding_attention" in kinds:
        raise ValueError("config.json: layer_types has sliding_attention but there is no sliding_window in use")
    return _period([window if kind == "sliding_attention" else None for kind in kinds])


def _read_llama(c: _Keys) -> dict[str, Any]:
    return _read_rms_decoder(c) | {"mlp_bias": bool(c("mlp_bias"))}


def _read_mistral(c: _Keys) -> dict[str, Any]:
    return _refuse_bias(c, _read_rms_decoder(c)) | {"windows": (c.size_or_none("sliding_window"),)}


def _read_qwen2(c: _Keys) -> dict[str, Any]:
    return _refuse_bias(c, _read_qwen(c)) | {"attention_bias": True}


def _read_qwen3(c: _Keys) -> dict[str, Any]:
    return _read_qwen(c) | {"query_key_norm": "head"}


def _read_qwen(c: _Keys) -> dict[str, Any]:
    fields = _read_rms_decoder(c)
    window, first = c.size_or_none("sliding_window"), c("max_window_layers")
    window = window if c("use_sliding_window") else None
    layers = range(fields["num_layers"])
    default = ["sliding_attention" if window is not None and i >= first else "full_attention" for i in layers]
    return fields | {"windows": _read_windows(c, fields["num_layers"], window, default)}


def _refuse_bias(c: _Keys, fields: dict[str, Any]) -> dict[str, Any]:
    """For families whose attention has no bias option: transformers would not read it."""
    if fields["attention_bias"]:
        raise ValueError(f"config.json: attention_bias = true is not supported for {c.family}: it has no such option")
    return fields


def _read_olmo2(c: _Keys) -> dict[str, Any]:
    return _read_rms_decoder(c) | {"norm_placement": "post", "query_key_norm": "full"}


def _read_gemma2(c: _Keys) -> dict[str, Any]:
    c("hidden_act")  # an old name that transformers carries and does not read
    fields = _read_rms_decoder(c, "hidden_activation")
    default = ["full_attention" if i % 2 else "sliding_attention" for i in range(fields["num_layers"])]
    return fields | {
        "windows": _read_windows(c, fields["num_layers"], c.size_or_none("sliding_window"), default),
        "norm_offset": 1.0,
        "norm_placement": "both",
        "attention_scale": float(c("query_pre_attn_scalar")) ** -0.5,
        "attention_softcap": c("attn_logit_softcapping"),
        "logit_softcap": c("final_logit_softcapping"),
        "embedding_scale": float(fields["width"]) ** 0.5,
    }


def _read_gpt2(c: _Keys) -> dict[str, Any]:
    return {
        "vocab_size": c.size("vocab_size"),
        "width": c.size("n_embd"),
        "num_layers": c.size("n_layer"),
        "num_heads": c.size("n_head"),
        "mlp_width": c.size_or_none("n_inner"),
        "max_length": c.size("n_positions"),
        "positions": Learned(),
        "norm": "layer",
        "norm_epsilon": c("layer_norm_epsilon"),
        "activation": c.activation("activation_function"),
        "gated": False,
        "attention_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "attention_scale": None if c("scale_attn_weights") else 1.0,
        "tied": bool(c("tie_word_embeddings")),
    }


_READERS: dict[str, Callable[[_Keys], dict[str, Any]]] = {
    "llama": _read_llama,
    "mistral": _read_mistral,
    "qwen2": _read_qwen2,
    "qwen3": _read_qwen3,
    "olmo2": _read_olmo2,
    "gemma2": _read_gemma2,
    "gpt2": _read_gpt2,
    "jaxlm": _read_native,
}


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a parsed config.json.

    Raises: ValueError with key, value and remedy for an unknown family and for any feature that jaxlm would drop.
    """
    family = find_family(values.get("model_type"))
    for architecture in values.get("architectures") or ():
        if architecture not in (family.architecture, family.bare):
            raise ValueError(
                f"config.json: architecture {architecture!r} is not a {family.name} decoder: "
                f"jaxlm reads {family.architecture}"
            )
    if values.get("auto_map"):
        raise ValueError(f"config.json: auto_map = {values['auto_map']!r} is not supported: {REMEDIES['auto_map']}")
    keys = _Keys(values, family.name)
    fields = _READERS[family.name](keys)
    keys.refuse_the_rest()
    config = ModelConfig(**fields)
    return dataclasses.replace(
        config, num_kv_heads=config.kv_heads, head_width=config.head_size, mlp_width=config.mlp_size
    )


def override(config: ModelConfig, changes: Mapping[str, Any]) -> ModelConfig:
    """`config` with other fields; an unknown name is refused with the nearest one."""
    known = [field.name for field in dataclasses.fields(ModelConfig)]
    for name in changes:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f": it has {', '.join(known)}"
            raise ValueError(f"ModelConfig has no field {name!r}{hint}")
    return dataclasses.replace(config, **changes)
