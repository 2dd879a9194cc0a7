# SPDX-License-Identifier: Apache-2.0
"""config.json to ModelConfig and back: nothing is dropped in silence."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxlm import checkpoints
from jaxlm.checkpoints import load_config
from jaxlm.checkpoints.config_reading import read_config
from jaxlm.checkpoints.config_writing import write_config
from jaxlm.nn import (
    Alibi,
    DynamicScaling,
    Hope,
    Learned,
    LinearScaling,
    Llama3Scaling,
    Model,
    ModelConfig,
    Nope,
    Rope,
    Xpos,
    YarnScaling,
)

LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, ["longrope", "llama3"]),
        ({"rope_scaling": {"type": "dynamic"}}, ["dynamic", "factor"]),
        ({"rope_scaling": {"type": "linear"}}, ["linear", "factor"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}}, ["beta_fast"]),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": YARN}, ["differ"]),
        ({"rope_theta": "10k"}, ["rope_theta", "10k"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"num_experts": 8}, ["num_experts", "8", "experts"]),
        ({"hidden_act": "relu2"}, ["relu2", "silu"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config", "dequantised"]),
        ({"auto_map": {"AutoModel": "evil.Model"}}, ["auto_map", "never"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification"]),
        ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel"]),
        ({"model_type": "mamba"}, ["mamba", "llama", "gpt2"]),
        ({"model_type": None}, ["None", "llama"]),
        ({"residual_multiplier": 0.2}, ["residual_multiplier", "0.2", "config.json"]),
        ({"sliding_window": 128}, ["sliding_window", "128"]),
        ({"num_hidden_layers": "2"}, ["num_hidden_layers", "'2'"]),
        ({"num_key_value_heads": 0}, ["num_key_value_heads", "0"]),
        ({"model_type": "mistral", "attention_bias": True}, ["attention_bias", "mistral"]),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, ["sliding_window"]),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, ["layer_types", "2 layers"]),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
    ],
)
def test_a_feature_that_would_be_dropped_is_refused_by_name(changes, words):
    with pytest.raises(ValueError) as caught:
        read_config(LLAMA | changes)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_missing_size_is_named():
    with pytest.raises(ValueError, match="vocab_size"):
        read_config({key: value for key, value in LLAMA.items() if key != "vocab_size"})


def test_what_is_switched_off_or_changes_no_logit_passes():
    off = {"num_experts": None, "rope_interleaved": False, "quantization_config": {}, "use_cache": False}
    assert read_config(LLAMA | off | {"attention_dropout": 0.1, "torch_dtype": "bfloat16"}) == read_config(LLAMA)


@pytest.mark.parametrize(
    ("rope", "base", "scaling"),
    [
        ({}, 10_000.0, None),
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}, 5e5, LinearScaling(factor=2.0)),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 32.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            5e5,
            Llama3Scaling(factor=32.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=8192),
        ),
    ],
)
def test_rope_is_read_in_its_old_and_new_form(rope, base, scaling):
    config = read_config(LLAMA | rope)
    assert config.positions == Rope(base=base, scaling=scaling)


def test_windows_follow_the_layers():
    qwen = LLAMA | {"model_type": "qwen2", "num_hidden_layers": 4, "sliding_window": 8, "max_window_layers": 3}
    assert read_config(qwen).layer_windows == (None,) * 4
    assert read_config(qwen | {"use_sliding_window": True}).layer_windows == (None, None, None, 8)
    gemma = LLAMA | {"model_type": "gemma2", "num_hidden_layers": 4, "sliding_window": 8}
    assert read_config(gemma).windows == (8, None)
    assert read_config(LLAMA | {"model_type": "mistral"}).windows == (4096,)
    assert read_config(LLAMA | {"model_type": "mistral", "sliding_window": None}).windows == (None,)


def test_writing_finds_the_family_that_expresses_the_model():
    config = ModelConfig(vocab_size=64, width=32, num_layers=2, num_heads=4)
    assert write_config(config)["model_type"] == "llama"
    assert write_config(dataclasses.replace(config, windows=(8,)))["model_type"] == "mistral"
    assert write_config(dataclasses.replace(config, attention_bias=True))["model_type"] == "qwen2"
    assert write_config(dataclasses.replace(config, query_key_norm="head", windows=(8, None)))["model_type"] == "qwen3"
    assert write_config(config, family="mistral")["sliding_window"] is None


def test_a_model_of_no_family_gets_our_own_names_and_a_family_asked_for_refuses_it_with_the_field():
    config = ModelConfig(vocab_size=64, width=32, num_layers=2, num_heads=4, positions=Nope(), windows=(8, None))
    values = write_config(config)
    assert values["model_type"] == "jaxlm" and values["vocab_size"] == 64  # which the tokenizer is checked against
    with pytest.raises(ValueError, match=r"llama cannot hold .*positions=Nope"):
        write_config(config, family="llama")
    with pytest.raises(ValueError, match="windows"):
        write_config(dataclasses.replace(config, positions=Rope(), windows=(8,)), family="llama")


POSITIONS = [
    Rope(base=500.0, scaling=YarnScaling(factor=4.0, original_length=64, sharpness=1.1, truncate=False)),
    Rope(scaling=DynamicScaling(factor=2.0, original_length=64)),
    Rope(scaling=LinearScaling(factor=2.0)),
    Learned(),
    Nope(),
    Alibi(),
    Xpos(scale_base=100.0),
    Hope(theta_scale=0.05, damping="per_pair", learn_gap="head", gap_max=1.0, slopes="learned", rotating=0.5),
]


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_every_kind_of_positions_is_stored_and_comes_back_the_same(positions, tmp_path):
    config = ModelConfig(
        vocab_size=64, width=32, num_layers=2, num_heads=4, num_kv_heads=2, max_length=64, positions=positions,
        attention_sink=isinstance(positions, Hope),
    )  # fmt: skip
    assert read_config(json.loads(json.dumps(write_config(config)))).positions == positions
    model = Model(config)
    params = model.init(jax.random.key(0))
    checkpoints.save(tmp_path / "model", model, params)
    loaded, same = checkpoints.load(tmp_path / "model")
    assert loaded.config.positions == positions
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_our_own_file_of_another_version_is_refused():
    config = ModelConfig(vocab_size=64, width=32, num_layers=2, num_heads=4, positions=Nope())
    values = write_config(config)
    with pytest.raises(ValueError, match="has no field 'depth'"):
        read_config(values | {"model": values["model"] | {"depth": 3}})
    with pytest.raises(ValueError, match="kind 'Spiral' are unknown"):
        read_config(values | {"model": values["model"] | {"positions": {"kind": "Spiral"}}})
    with pytest.raises(ValueError, match="Alibi of another version"):
        read_config(values | {"model": values["model"] | {"positions": {"kind": "Alibi", "steep": 1}}})


def test_fields_of_the_computation_are_not_part_of_a_checkpoint():
    config = ModelConfig(vocab_size=64, width=32, num_layers=2, num_heads=4)
    fast = dataclasses.replace(config, dtype="bfloat16", remat="full", adapter_scale=2.0)
    assert write_config(config) == write_config(fast)


def test_an_unknown_override_suggests_the_nearest(golden):
    with pytest.raises(ValueError, match="did you mean 'num_layers'"):
        load_config(golden["llama"], num_layer=3)
    assert load_config(golden["llama"], dtype="bfloat16").dtype == "bfloat16"


@pytest.mark.parametrize("content", ["{", "[]", None])
def test_a_broken_config_names_its_file(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_config(tmp_path)


def test_reading_a_config_does_not_import_jax(golden):
    code = f"import sys; from jaxlm.checkpoints import load_config; load_config({str(golden['qwen3'])!r}); "
    subprocess.run([sys.executable, "-c", code + "assert 'jax' not in sys.modules"], check=True)


def test_written_configs_are_json(golden):
    for folder in golden.values():
        json.dumps(write_config(load_config(folder)))
