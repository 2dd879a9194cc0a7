# SPDX-License-Identifier: Apache-2.0
"""Folders of safetensors: what is wrong with one is said, what is right is read in slices and written whole."""

import json
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from jaxlm import checkpoints
from jaxlm.checkpoints import export, safetensors_folder
from jaxlm.data.tokenizers import byte_tokenizer
from jaxlm.nn import Model, ModelConfig
from jaxlm.weights.names import named_leaves


def change(folder, edit):
    """Rewrites the tensors of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def untied(folder):
    """Adds a head that is not the embedding."""
    return change(folder, lambda t: t.update({"lm_head.weight": -t["model.embed_tokens.weight"]}))


NORM = "model.norm.weight"
EDITS = {
    "a missing tensor": (lambda t: t.pop(NORM), ["lacks", NORM]),
    "an extra tensor": (lambda t: t.update({"model.extra.weight": t[NORM]}), ["unknown", "model.extra.weight"]),
    "a reshaped tensor": (lambda t: t.update({NORM: t[NORM][:-1]}), ["shape", NORM, "(23,)", "(24,)"]),
    "a padded vocabulary": (
        lambda t: [
            t.update({k: np.pad(t[k], ((0, 16), (0, 0)))}) for k in ("model.embed_tokens.weight", "lm_head.weight")
        ],
        ["80 rows", "vocab_size 64", "vocab_size=80"],
    ),
    "no head": (lambda t: t.pop("lm_head.weight"), ["lm_head.weight", "tied=True"]),
    "quantised weights": (lambda t: t.update({NORM: t[NORM].astype(np.int8)}), [NORM, "I8", "dequantised"]),
}


@pytest.mark.parametrize("what", EDITS)
def test_a_wrong_tensor_is_named(what, altered):
    edit, words = EDITS[what]
    with pytest.raises(ValueError) as caught:
        checkpoints.load(change(altered("llama"), edit))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_padded_vocabulary_can_be_kept(altered):
    folder = change(altered("llama"), EDITS["a padded vocabulary"][0])
    model, params = checkpoints.load(folder, vocab_size=80)
    assert params["embed"]["table"].shape == (80, 24) and params["head"]["kernel"].shape == (24, 80)
    assert model.config.vocab_size == 80


def test_a_missing_shard_is_named(golden, tmp_path):
    checkpoints.save(tmp_path / "a", *checkpoints.load(golden["llama"]), max_shard_bytes=20_000)
    shards = sorted((tmp_path / "a").glob("*.safetensors"))
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors" and len(shards) > 1
    shards[1].unlink()
    with pytest.raises(ValueError, match=rf"{shards[1].name} is missing"):
        checkpoints.load(tmp_path / "a")


def test_a_cut_off_file_is_named(altered):
    folder = altered("llama")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        checkpoints.load(folder)


def test_a_tensor_that_is_not_where_the_index_says_is_named(altered):
    folder = altered("llama")
    index = {"weight_map": {NORM: "model.safetensors", "model.gone": "model.safetensors"}}
    (folder / safetensors_folder.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lacks 'model\.gone'"):
        checkpoints.load(folder)


def test_an_index_cannot_point_out_of_its_folder(altered):
    folder = altered("llama")
    (folder / safetensors_folder.INDEX).write_text(json.dumps({"weight_map": {NORM: "../other.safetensors"}}))
    with pytest.raises(ValueError, match="outside"):
        checkpoints.load(folder)


def test_a_pickle_is_never_opened(altered):
    folder = altered("llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*pickle.*safetensors"):
        checkpoints.load(folder)


@pytest.mark.parametrize("place", ["nowhere", "empty"])
def test_what_is_no_checkpoint_is_said(tmp_path, place):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=place):
        checkpoints.load(tmp_path / place)


def test_a_tied_checkpoint_may_carry_its_head_if_it_is_the_embedding(altered):
    folder = change(altered("qwen2"), lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert "head" not in checkpoints.load(folder)[1]
    with pytest.raises(ValueError, match=r"lm_head\.weight differs.*tied=False"):
        checkpoints.load(untied(folder))
    params = checkpoints.load(folder, tied=False)[1]
    np.testing.assert_array_equal(params["head"]["kernel"], -params["embed"]["table"].T)


def test_untying_starts_from_the_embedding(golden):
    _, params = checkpoints.load(golden["qwen3"], tied=False)
    np.testing.assert_array_equal(params["head"]["kernel"], params["embed"]["table"].T)


@pytest.mark.parametrize("variant", ["llama_tied", "gpt2"])
def test_names_without_the_outer_class_are_read(variant, golden, altered):
    def strip(tensors):
        for name in list(tensors):
            tensors[name.split(".", 1)[1]] = tensors.pop(name)

    _, whole = checkpoints.load(golden[variant])
    _, bare = checkpoints.load(change(altered(variant), strip))
    jax.tree.map(np.testing.assert_array_equal, whole, bare)


def test_buffers_of_old_checkpoints_are_ignored(altered):
    folder = change(
        altered("gpt2"), lambda t: t.update({"transformer.h.0.attn.bias": np.ones((1, 1, 32, 32), np.uint8)})
    )
    checkpoints.load(folder)


def over_all_devices(shapes):
    """Shards every leaf over 2 x 4 devices along its last two dimensions where they divide."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def spec(leaf):
        names = [None] * leaf.ndim
        for place, axis, size in ((-1, "b", 4), (-2, "a", 2)):
            if leaf.ndim >= -place and leaf.shape[place] % size == 0:
                names[place] = axis
        return NamedSharding(mesh, PartitionSpec(*names))

    return jax.tree.map(spec, shapes)


@pytest.mark.parametrize("variant", ["gpt2", "gemma2", "llama"])
def test_a_sharded_load_has_the_same_values_and_reads_only_slices(variant, golden, monkeypatch):
    _, whole = checkpoints.load(golden[variant])
    largest, read = [], safetensors_folder.SafetensorsFolder.read

    def watched(self, name, index):
        piece = read(self, name, index)
        largest.append((name, piece.size, int(np.prod(self.shapes[name]))))
        return piece

    monkeypatch.setattr(safetensors_folder.SafetensorsFolder, "read", watched)
    _, params = checkpoints.load(golden[variant], shardings=over_all_devices)
    jax.tree.map(np.testing.assert_array_equal, whole, params)
    kernels = [(piece, size) for name, piece, size in largest if "proj.weight" in name or "c_" in name]
    assert kernels and all(piece * 2 <= size for piece, size in kernels)
    assert len(params["embed"]["table"].sharding.device_set) == 8


def test_saving_from_eight_devices_equals_saving_from_one(golden, tmp_path):
    model, whole = checkpoints.load(golden["gpt2"])
    _, sharded = checkpoints.load(golden["gpt2"], shardings=over_all_devices)
    checkpoints.save(tmp_path / "one", model, whole)
    checkpoints.save(tmp_path / "eight", model, sharded)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "eight/model.safetensors").read_bytes()


def test_nothing_is_overwritten_and_nothing_half_written_stays(golden, tmp_path, monkeypatch):
    model, params = checkpoints.load(golden["llama"])
    target = tmp_path / "out"
    target.mkdir()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(export, "save_file", full)
        checkpoints.save(target, model, params)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not any(target.iterdir())
    checkpoints.save(target, model, params)
    with pytest.raises(ValueError, match="not an empty folder"):
        checkpoints.save(target, model, params)


def test_parameters_of_another_model_are_refused(golden, tmp_path):
    model, params = checkpoints.load(golden["llama"])
    with pytest.raises(ValueError, match=r"final_norm/scale is \(5,\), the model's config makes it \(24,\)"):
        checkpoints.save(tmp_path / "out", model, params | {"final_norm": {"scale": np.zeros(5, np.float32)}})
    with pytest.raises(ValueError, match=r"head/kernel is absent"):
        checkpoints.save(tmp_path / "out", model, {key: params[key] for key in params if key != "head"})
    with pytest.raises(ValueError, match="merge_lora"):
        adapted = params | {"head": params["head"] | {"lora_a": np.zeros((24, 2)), "lora_b": np.zeros((2, 64))}}
        checkpoints.save(tmp_path / "out", model, adapted)
    assert not any(tmp_path.iterdir())


def test_tokenizer_and_ids_travel_along(tmp_path):
    tokenizer = byte_tokenizer()
    model = Model(ModelConfig(vocab_size=259, width=16, num_layers=2, num_heads=2))
    params = model.init(jax.random.key(0))
    checkpoints.save(tmp_path / "a", model, params, tokenizer=tokenizer)
    checkpoints.save(tmp_path / "b", model, params, tokenizer=tmp_path / "a")
    for folder in ("a", "b"):
        back = checkpoints.load_tokenizer(tmp_path / folder)
        assert back("Hello <|im_end|>").input_ids == tokenizer("Hello <|im_end|>").input_ids
        assert back.chat_template == tokenizer.chat_template
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert (config["eos_token_id"], config["pad_token_id"]) == (258, 256)
        assert json.loads((tmp_path / folder / "generation_config.json").read_text())["eos_token_id"] == 258
    _, same = checkpoints.load(tmp_path / "b")
    assert named_leaves(same).keys() == named_leaves(params).keys()
    small = Model(ModelConfig(vocab_size=64, width=16, num_layers=2, num_heads=2))
    with pytest.raises(ValueError, match="259 tokens, the model 64"):
        checkpoints.save(tmp_path / "c", small, small.init(jax.random.key(0)), tokenizer=tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_generation_settings_of_the_source_are_kept(golden, tmp_path):
    shutil.copytree(golden["llama"], tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").write_text('{"temperature": 0.6}')
    model, params = checkpoints.load(tmp_path / "source")
    checkpoints.save(tmp_path / "out", model, params, tokenizer=tmp_path / "source")
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == {"temperature": 0.6}
    assert json.loads((tmp_path / "out/config.json").read_text())["bos_token_id"] == 1
