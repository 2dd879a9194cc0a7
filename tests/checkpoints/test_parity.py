# SPDX-License-Identifier: Apache-2.0
"""Every family gives transformers' logits and tensors: from stored files everywhere, from live torch where it is."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxlm import checkpoints

VARIANTS = [
    *("gemma2", "gpt2", "llama", "llama_bias", "llama_linear", "llama_scaled", "llama_tied"),
    *("mistral", "olmo2", "qwen2", "qwen2_window", "qwen3"),
]


def test_the_list_of_variants_is_complete(golden):
    assert sorted(golden) == VARIANTS, "a folder in golden/ is not tested, or the other way round"


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_that_transformers_gave(variant, golden, logits_of):
    """At every real position: a full row, two packed texts, padding on either side, windows shorter than the row."""
    expected = np.load(golden[variant] / "expected.npz")
    model, params = checkpoints.load(golden[variant])
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    np.testing.assert_allclose(logits_of(model, params, expected), expected["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_saving_gives_back_the_tensors_it_was_loaded_from(variant, golden, tmp_path):
    model, params = checkpoints.load(golden[variant])
    family = json.loads((golden[variant] / "config.json").read_text())["model_type"]
    checkpoints.save(tmp_path / "out", model, params, family=family)
    before, after = (load_file(folder / "model.safetensors") for folder in (golden[variant], tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert after[name].dtype == np.float32
        np.testing.assert_array_equal(values.astype(np.float32), after[name])
    assert checkpoints.load_config(tmp_path / "out") == checkpoints.load_config(golden[variant])


@pytest.mark.parametrize("variant", VARIANTS)
def test_live_torch_gives_the_same_logits_and_loads_what_we_save(variant, maker, logits_of, tmp_path):
    import torch
    import transformers

    theirs = maker.make_model(variant, seed=7)
    batch = maker.make_batch(seed=7)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    model, params = checkpoints.load(tmp_path / "theirs")
    expected = maker.reference_logits(theirs, batch)
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    np.testing.assert_allclose(logits_of(model, params, batch), expected, rtol=0, atol=1e-4)

    checkpoints.save(tmp_path / "ours", model, params, family=theirs.config.model_type, max_shard_bytes=20_000)
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists()
    back, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    ours = back.state_dict()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours[name]), name
    np.testing.assert_array_equal(maker.reference_logits(back.eval(), batch), expected)
