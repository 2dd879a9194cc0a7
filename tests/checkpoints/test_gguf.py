# SPDX-License-Identifier: Apache-2.0
"""GGUF files of the llama architecture, written here with interleaved rows as llama.cpp keeps them."""

import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxlm import checkpoints
from jaxlm.checkpoints import gguf as reader

gguf = pytest.importorskip("gguf")

NAMES = {theirs: ours for ours, theirs in reader._NAMES.items()}
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"


def interleaved(rows, heads):
    """Half-split rotary rows as pairs of neighbours, head by head."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def write(path, folder, *, architecture="llama", quantise=False, pre="smollm", extra=None, bos=False):
    """The tiny checkpoint in `folder` as a GGUF file with a byte-level tokenizer of 64 pieces."""
    writer = gguf.GGUFWriter(path, architecture)
    config = checkpoints.load_config(folder)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.mlp_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_rope_freq_base(config.positions.base)
    writer.add_rope_dimension_count(config.head_size)
    for key, value in (extra or {}).items():
        writer.add_float32(key, value)
    letters = [chr(code) for code in range(ord("!"), ord("!") + 60)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(["<s>", "</s>", *letters, "AB", "ABC"])
    writer.add_token_types([3, 3] + [1] * 62)
    writer.add_token_merges(["A B", "AB C"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_add_bos_token(bos)
    writer.add_chat_template(TEMPLATE)
    for name, values in load_file(folder / "model.safetensors").items():
        values = values.astype(np.float32)
        place, leaf = name.removesuffix(".weight"), ".weight"
        if place.startswith("model.layers."):
            layer, place = place.removeprefix("model.layers.").split(".", 1)
            leaf = f".{leaf[1:]}"
            prefix = f"blk.{layer}."
        else:
            prefix = ""
        if place.endswith(("q_proj", "k_proj")):
            values = interleaved(values, config.num_heads if place.endswith("q_proj") else config.kv_heads)
        if quantise and values.ndim == 2 and values.shape[-1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(prefix + NAMES[place] + leaf, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(prefix + NAMES[place] + leaf, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("variant", ["llama", "llama_tied"])
def test_a_gguf_file_gives_the_logits_of_its_folder(variant, golden, logits_of, tmp_path):
    path = write(tmp_path / "tiny.gguf", golden[variant])
    expected = np.load(golden[variant] / "expected.npz")
    model, params = checkpoints.load(path)
    assert model.config == checkpoints.load_config(golden[variant]) == checkpoints.load_config(path)
    np.testing.assert_allclose(logits_of(model, params, expected), expected["logits"], rtol=0, atol=1e-4)


def test_quantised_tensors_are_dequantised(golden, tmp_path):
    model, exact = checkpoints.load(golden["llama"])
    assert model.config.width % 32, "the tiny checkpoint's rows are too short to be quantised: make them so here"
    wide = {"width": 32, "vocab_size": 64, "num_layers": 2, "num_heads": 4, "mlp_width": 32, "tied": True}
    from jax import random

    from jaxlm.nn import Model, ModelConfig

    model = Model(ModelConfig(**wide))
    exact = model.init(random.key(0))
    checkpoints.save(tmp_path / "folder", model, exact)
    _, rough = checkpoints.load(write(tmp_path / "q8.gguf", tmp_path / "folder", quantise=True))
    for part in ("query", "out"):
        a, b = (p["blocks"]["attention"][part]["kernel"] for p in (exact, rough))
        assert 0 < np.abs(a - b).max() < np.abs(a).max() / 127


def test_the_tokenizer_comes_with_template_and_special_ids(golden, tmp_path):
    path = write(tmp_path / "tiny.gguf", golden["llama"])
    tokenizer = checkpoints.load_tokenizer(path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 1)
    assert len(tokenizer) == 64
    digits = [2 + ord(c) - ord("!") for c in "12"]
    assert tokenizer.encode("<s>12") == [0, *digits]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "12"}], tokenize=False) == "<s>12</s>"
    with_bos = checkpoints.load_tokenizer(write(tmp_path / "bos.gguf", golden["llama"], bos=True))
    assert with_bos.encode("12") == [0, *digits]


def test_converting_writes_a_folder_with_all_of_it(golden, logits_of, tmp_path):
    from jaxlm.checkpoints.convert import convert

    path = write(tmp_path / "tiny.gguf", golden["llama"])
    line = convert(path, tmp_path / "out")
    assert "llama" in line and "parameters" in line
    expected = np.load(golden["llama"] / "expected.npz")
    model, params = checkpoints.load(tmp_path / "out")
    np.testing.assert_allclose(logits_of(model, params, expected), expected["logits"], rtol=0, atol=1e-4)
    assert checkpoints.load_tokenizer(tmp_path / "out").chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"architecture": "mamba"}, "mamba"),
        ({"extra": {"llama.expert_weights_scale": 2.0}}, "llama.expert_weights_scale = 2.0"),
        ({"extra": {"llama.rope.scaling.attn_factor": 2.0}}, "attn_factor"),
    ],
)
def test_what_would_be_dropped_is_refused_by_name(options, word, golden, tmp_path):
    path = write(tmp_path / "tiny.gguf", golden["llama"], **options)
    with pytest.raises(ValueError, match=word):
        checkpoints.load(path)


def test_an_unknown_pre_tokenizer_is_refused(golden, tmp_path):
    with pytest.raises(ValueError, match="'tekken' is not supported"):
        checkpoints.load_tokenizer(write(tmp_path / "tiny.gguf", golden["llama"], pre="tekken"))


def test_a_file_that_is_no_gguf_is_named(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match=r"x\.gguf is not a whole GGUF file"):
        checkpoints.load(tmp_path / "x.gguf")


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxlm\[gguf\]'"):
        checkpoints.load(tmp_path / "x.gguf")
