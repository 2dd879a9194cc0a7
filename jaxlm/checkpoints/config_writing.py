# SPDX-License-Identifier: Apache-2.0
"""ModelConfig to config.json: the first family that expresses a model without loss. No jax."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxlm.checkpoints.config_reading import read_config
from jaxlm.checkpoints.families import FAMILIES, find_family
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.position_kinds import DynamicScaling, LinearScaling, Llama3Scaling, Rope, YarnScaling

_WRITE_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_RUNTIME = ("dtype", "remat", "attention", "adapter_scale")  # fields that say how to compute, not what


def _write_rope(config: ModelConfig) -> dict[str, Any]:
    kind = config.positions
    if not isinstance(kind, Rope):
        return {"rope_type": "default", "rope_theta": 10_000.0}  # not what the model has: the family is refused
    scaling = kind.scaling
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": kind.base}
    if isinstance(scaling, LinearScaling):
        rope |= {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, DynamicScaling):  # reading it back, the original length must be the model's own
        rope |= {"rope_type": "dynamic", "factor": scaling.factor}
    if isinstance(scaling, YarnScaling):
        rope |= {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_length,
            "beta_fast": scaling.fast,
            "beta_slow": scaling.slow,
            "attention_factor": scaling.sharpness,
            "truncate": scaling.truncate,
        }
    if isinstance(scaling, Llama3Scaling):
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    return rope


def _write_windows(config: ModelConfig) -> dict[str, Any]:
    windows = config.layer_windows
    sizes = [window for window in windows if window is not None]
    return {
        "sliding_window": sizes[0] if sizes else None,
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }


def _write_rms_decoder(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.mlp_size,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_epsilon,
        "hidden_act": _WRITE_ACTIVATIONS[config.activation],
        "rope_parameters": _write_rope(config),
        "tie_word_embeddings": config.tied,
    }


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    return _write_rms_decoder(config) | {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


def _write_mistral(config: ModelConfig) -> dict[str, Any]:
    return _write_rms_decoder(config) | {"sliding_window": config.layer_windows[0]}


def _write_qwen2(config: ModelConfig) -> dict[str, Any]:
    windows = config.layer_windows
    first = next((i for i, window in enumerate(windows) if window is not None), len(windows))
    use = {"use_sliding_window": first < len(windows), "max_window_layers": first}
    return _write_rms_decoder(config) | _write_windows(config) | use


def _write_qwen3(config: ModelConfig) -> dict[str, Any]:
    return _write_qwen2(config) | {"attention_bias": config.attention_bias}


def _write_olmo2(config: ModelConfig) -> dict[str, Any]:
    return _write_rms_decoder(config) | {"attention_bias": config.attention_bias}


def _write_gemma2(config: ModelConfig) -> dict[str, Any]:
    scalar = (config.head_size**-0.5 if config.attention_scale is None else config.attention_scale) ** -2
    return (
        _write_rms_decoder(config)
        | _write_windows(config)
        | {
            "attention_bias": config.attention_bias,
            "hidden_activation": _WRITE_ACTIVATIONS[config.activation],
            "query_pre_attn_scalar": round(scalar) if math.isclose(scalar, round(scalar), rel_tol=1e-6) else scalar,
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.logit_softcap,
        }
    )


def _write_gpt2(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.width,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_size,
        "n_positions": config.max_length,
        "activation_function": "gelu_new" if config.activation == "gelu_tanh" else config.activation,
        "layer_norm_epsilon": config.norm_epsilon,
        "scale_attn_weights": config.attention_scale is None,
        "tie_word_embeddings": config.tied,
    }


def _write_native(config: ModelConfig) -> dict[str, Any]:
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in _RUNTIME}
    fields |= {"positions": _write_kind(config.positions), "windows": list(config.windows)}
    return {"vocab_size": fields.pop("vocab_size"), "model": fields}


def _write_kind(value: Any) -> Any:
    if not dataclasses.is_dataclass(value):
        return value
    fields = {f.name: _write_kind(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return {"kind": type(value).__name__} | fields


_WRITERS: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "llama": _write_llama,
    "mistral": _write_mistral,
    "qwen2": _write_qwen2,
    "qwen3": _write_qwen3,
    "olmo2": _write_olmo2,
    "gemma2": _write_gemma2,
    "gpt2": _write_gpt2,
    "jaxlm": _write_native,
}


def _meaning(config: ModelConfig) -> dict[str, Any]:
    """The fields that decide what the model computes, with None resolved, so that equal models compare equal."""
    fields = dataclasses.asdict(config)
    for name in _RUNTIME:
        del fields[name]
    scale = config.head_size**-0.5 if config.attention_scale is None else config.attention_scale
    return fields | {
        "positions": config.positions,
        "num_kv_heads": config.kv_heads,
        "head_width": config.head_size,
        "mlp_width": config.mlp_size,
        "windows": config.layer_windows,
        "attention_scale": scale,
    }


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    return a == b


def _differences(config: ModelConfig, values: Mapping[str, Any]) -> list[str]:
    """What is lost when `config` goes through `values`, as `field=ours (theirs)`."""
    try:
        there = _meaning(read_config(values))
    except ValueError as error:
        return [str(error)] * 3
    here = _meaning(config)
    keys = sorted(here.keys() | there.keys())
    return [f"{k}={here.get(k)!r} (not {there.get(k)!r})" for k in keys if not _equal(here.get(k), there.get(k))]


def write_config(config: ModelConfig, *, family: str | None = None) -> dict[str, Any]:
    """config.json of a model, for the named family or the first one that expresses it without loss.

    A config fits a family when reading what was written gives the same model; fields of the computation (dtype, remat,
    attention, adapter_scale) are not part of a checkpoint.  A model of no Hugging Face family (another kind of
    positions, say) gets model_type "jaxlm" and our own names; jaxlm loads it, transformers does not.

    Raises: ValueError that names each field the family asked for cannot express.
    """
    found: list[tuple[int, str, list[str]]] = []
    for name in [find_family(family).name] if family else FAMILIES:
        values = {
            "model_type": name,
            "architectures": [FAMILIES[name].architecture],
            "dtype": "float32",
            "use_cache": True,
        } | _WRITERS[name](config)
        lost = _differences(config, values)
        if not lost:
            return values
        found.append((len(lost), name, lost))
    _, name, lost = min(found, key=lambda item: item[0])
    raise ValueError(f"{name} cannot hold {'; '.join(lost)}")
