# SPDX-License-Identifier: Apache-2.0
"""Laws of a whole run: from a config to a directory that can be resumed, loaded and read."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import checkpoints
from jaxlm.config import RunConfig
from jaxlm.data import DataConfig, JsonLines, Procedural, Task
from jaxlm.data.preparation import prepare
from jaxlm.methods import METHODS, Sft
from jaxlm.nn import Lora, ModelConfig
from jaxlm.overrides import override
from jaxlm.run import load_tokenizer, run
from jaxlm.train import AdamW, MeshOptions, RunOptions
from jaxlm.train.reporter import read_metrics


def exercises(generator, **options):
    return Task(
        name=generator,
        train=Procedural(generator=generator, size=200, options=options),
        test=Procedural(generator=generator, size=16, seed=1, options=options),
    )


def config(directory, **changes):
    whole = RunConfig(
        model=ModelConfig(vocab_size=264, width=32, num_layers=2, num_heads=2, mlp_width=64),
        tokenizer="bytes",
        data=DataConfig(tasks=(exercises("maximum", count=2), exercises("counting", length=4)), length=48),
        method=Sft(optimizer=AdamW(learning_rate=3e-3)),
        run=RunOptions(steps=6, batch_size=8, log_every=2, save_every=3, directory=str(directory)),
    )
    return dataclasses.replace(whole, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that is done, and its result; tests that change the directory do so with a copy."""
    directory = tmp_path_factory.mktemp("finished")
    return directory, run(config(directory))


def reported(directory, kind):
    return [line["step"] for line in read_metrics(directory) if line["kind"] == kind]


def test_a_run_lowers_the_loss_of_every_task_and_leaves_a_model_that_loads(finished):
    directory, result = finished
    for task in ("maximum", "counting"):
        assert result.after[f"loss/{task}"] < result.before[f"loss/{task}"]
    model, params = checkpoints.load(directory / "model")
    ours = jax.tree.map(np.asarray, result.params)
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(1, 12)
    np.testing.assert_array_equal(
        model.logits(params, model.apply(params, tokens)),
        result.model.logits(ours, result.model.apply(ours, tokens)),
    )
    assert len(checkpoints.load_tokenizer(directory / "model")) <= model.config.vocab_size
    assert {"config.json", "metrics.jsonl", "summary.json", "report.html"} <= {p.name for p in directory.iterdir()}
    assert (reported(directory, "train"), reported(directory, "eval")) == ([2, 4, 6], [0, 6])


def test_a_run_that_divides_tokens_learns_what_one_of_whole_rows_learns(finished):
    divided = run(override(config(""), ["mesh.data=2", "mesh.sequence=4"]))
    for when in ("before", "after"):
        whole, cut = (getattr(result, when) for result in (finished[1], divided))
        assert cut == pytest.approx(whole, rel=1e-3), when


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("sft", ["mesh.sequence=8", "data.length=50"], "rows of 50 tokens .* data.length to 48 or 64"),
        ("grpo", ["mesh.sequence=2"], "Grpo cannot divide the tokens of rows, it samples with a cache: set mesh.seq"),
        ("r_capsule", ["mesh.sequence=2"], "RCapsule cannot divide .*: set mesh.sequence=1"),
    ],
)
def test_a_run_that_cannot_divide_tokens_is_refused_before_it_compiles(method, fields, message):
    with pytest.raises(ValueError, match=message):
        run(override(config("", method=METHODS[method]()), fields))


def test_the_same_command_goes_on_to_more_steps_and_a_finished_run_changes_nothing(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    longer = config(tmp_path, run=dataclasses.replace(config(tmp_path).run, steps=8))
    first = run(longer)
    assert (reported(tmp_path, "train"), reported(tmp_path, "eval")) == ([2, 4, 6, 8], [0, 6, 8])
    again = run(longer)
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    assert (first.before, first.after) == (again.before, again.after)
    assert reported(tmp_path, "train") == [2, 4, 6, 8]
    once = finished[1].goodput
    assert [spent.lives for spent in (once, first.goodput, again.goodput)] == [1, 2, 3]
    assert 0 < once.wall < first.goodput.wall < again.goodput.wall and again.goodput.repeated == 0
    assert 0 < once.seconds["step"] < first.goodput.seconds["step"] == again.goodput.seconds["step"]
    assert f"goodput {100 * again.goodput.share:.1f} %" in (tmp_path / "report.html").read_text()


def test_every_mesh_ends_with_the_same_losses(finished):
    mixed = run(config("", mesh=MeshOptions(data=2, fsdp=2, tensor=2)))
    for name, value in finished[1].after.items():
        assert mixed.after[name] == pytest.approx(value, rel=1e-4, abs=1e-6)


def test_adapters_are_merged_and_the_drift_of_the_merge_is_reported(tmp_path):
    method = Sft(optimizer=AdamW(learning_rate=1e-2), lora=Lora(rank=2))
    result = run(config(tmp_path, method=method))
    shapes = jax.eval_shape(result.model.init, jax.random.key(0))
    assert jax.tree.structure(shapes) == jax.tree.structure(result.params)
    assert result.after["loss"] < result.before["loss"]
    merge = [line for line in read_metrics(tmp_path) if line.get("name") == "merge"]
    assert len(merge) == 1 and 0 <= merge[0]["logit_drift"] < 1e-4


def test_a_directory_with_a_run_of_another_config_is_refused(finished):
    with pytest.raises(ValueError, match=r"model\.width was 32 and is now 16"):
        run(config(finished[0], model=ModelConfig(vocab_size=264, width=16, num_layers=2, num_heads=2, mlp_width=64)))


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocab_size 100: set it to at least"):
        run(config(tmp_path, model=ModelConfig(vocab_size=100, width=16, num_layers=2, num_heads=2)))


def test_prepared_data_needs_no_source(tmp_path):
    source = tmp_path / "records.jsonl"
    source.write_text("\n".join(json.dumps({"prompt": f"{i}+1=", "completion": str(i + 1)}) for i in range(40)))
    data = DataConfig(
        tasks=(Task(name="sum", train=JsonLines(path=str(source)), test=JsonLines(path=str(source))),),
        length=32,
        test_overlap="keep",
    )
    tokenizer = load_tokenizer(config(""))
    for split in ("train", "test"):
        prepare(data, tokenizer, split=split, directory=tmp_path / "prepared")
    source.unlink()
    other = config(tmp_path / "other", data=data, prepared=str(tmp_path / "prepared"))
    assert run(other).after["loss"] > 0
    with pytest.raises(ValueError, match="prepared with length 32, the config has 64: prepare it again"):
        run(config(tmp_path / "third", data=dataclasses.replace(data, length=64), prepared=other.prepared))
    tokenizer.chat_template = "another"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="prepared with tokenizer"):
        run(config(tmp_path / "fourth", data=data, prepared=other.prepared, tokenizer=str(tmp_path / "tokenizer")))
