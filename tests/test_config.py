# SPDX-License-Identifier: Apache-2.0
"""Laws of configs: what is stored reads back, mistakes are named with their place, a directory keeps its run."""

import dataclasses
import json
import textwrap

import pytest

from jaxlm.config import (
    Pretrained,
    RunConfig,
    check_resumable,
    claim_directory,
    diff,
    from_json,
    load_config,
    read_config,
    to_json,
    write_config,
)
from jaxlm.data import DataConfig, JsonLines, Procedural, Rows, Task
from jaxlm.methods import Sft
from jaxlm.nn import Llama3Scaling, Lora, ModelConfig, Rope
from jaxlm.overrides import override
from jaxlm.train import AdamW, MeshOptions, RunOptions


def make_config(**changes):
    scaling = Llama3Scaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=8192)
    fields = {
        "model": ModelConfig(
            vocab_size=320, width=16, num_layers=2, num_heads=2, windows=(4, None), positions=Rope(scaling=scaling)
        ),
        "tokenizer": "bytes",
        "data": DataConfig(
            tasks=(
                Task(name="a", train=Rows(records=({"messages": [{"role": "user", "content": "x"}]},))),
                Task(name="b", train=Procedural(generator="sorting", size=8, options={"count": 3}), weight=0.5),
            )
        ),
        "method": Sft(optimizer=AdamW(learning_rate=1e-3), lora=Lora(rank=2)),
        "run": RunOptions(steps=10),
    }
    return RunConfig(**(fields | changes))


def test_what_is_stored_reads_back_the_same(tmp_path):
    config = make_config()
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    write_config(tmp_path / "run", config)
    assert read_config(tmp_path / "run") == config == load_config(tmp_path / "run")
    assert load_config(tmp_path / "run", ["run.steps=20"]).run.steps == 20


def test_only_classes_of_jaxlm_are_looked_up():
    with pytest.raises(ValueError, match=r"uses os\.system, which is not part of jaxlm: give its config file"):
        from_json({"class": "os.system", "command": "true"})
    with pytest.raises(ValueError, match="MeshOptions has no field 'depth': written by another version"):
        from_json({"class": "jaxlm.train.options.MeshOptions", "depth": 3})
    with pytest.raises(ValueError, match="a config holds numbers, text, tuples and dataclasses, got function"):
        to_json(make_config(method=test_only_classes_of_jaxlm_are_looked_up))


def test_a_directory_keeps_its_run(tmp_path):
    config = make_config(run=RunOptions(steps=10, directory=str(tmp_path / "run")))
    claim_directory(config)
    longer = override(config, ["run.steps=20", "run.log_every=1", "mesh.fsdp=2"])
    claim_directory(longer)
    assert read_config(tmp_path / "run") == longer
    other = override(config, ["method.optimizer.learning_rate=0.5", "data.tasks.1.weight=2"])
    with pytest.raises(ValueError) as error:
        claim_directory(other)
    assert "data.tasks.1.weight was 0.5 and is now 2.0; method.optimizer.learning_rate was 0.001" in str(error.value)
    assert read_config(tmp_path / "run") == longer, "a refused config leaves no trace"


def test_a_class_that_changed_is_a_difference():
    before = make_config()
    after = dataclasses.replace(before, model=Pretrained(path="model"))
    assert diff(before, after)["model.class"] == ("ModelConfig", "Pretrained")
    with pytest.raises(ValueError, match=r"model\.class was 'ModelConfig' and is now 'Pretrained'"):
        check_resumable(before, after)
    check_resumable(before, dataclasses.replace(before, mesh=MeshOptions(fsdp=4)))


def test_a_random_model_needs_a_tokenizer():
    with pytest.raises(ValueError, match='set tokenizer="bytes" or a folder'):
        make_config(tokenizer="")
    assert make_config(tokenizer="", model=Pretrained(path="x", max_length=64)).model.overrides() == {
        "dtype": "float32",
        "remat": "none",
        "attention": "auto",
        "max_length": 64,
    }


def test_unions_of_dataclasses_are_set_from_text():
    config = override(
        make_config(), ["data.tasks.0.test=JsonLines", "data.tasks.0.test.path=a.jsonl", "method.lora.rank=4"]
    )
    assert config.data.tasks[0].test == JsonLines(path="a.jsonl") and config.method.lora.rank == 4
    config = override(make_config(), ["model=Pretrained", "model.path=folder", "tokenizer="])
    assert config.model == Pretrained(path="folder")
    with pytest.raises(ValueError, match="Sft has no field 'optimiser'; did you mean 'optimizer'"):
        override(make_config(), ["method.optimiser.learning_rate=1"])
    with pytest.raises(ValueError, match=r"RunConfig has no field 'steps'; did you mean 'run\.steps'"):
        override(make_config(), ["steps=1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", r"has no function get_config\(\) -> RunConfig"),
        ("def get_config():\n    return 1\n", r"must return a RunConfig, got int"),
        ("def get_config(:\n", r"config\.py, line 1: "),
        (
            "from jaxlm.train import RunOptions\n\ndef get_config():\n    return RunOptions(stpes=1)\n",
            r"line 4: .*stpes",
        ),
        ("def get_config():\n    return RunConfig()\n", r"line 2: name 'RunConfig' is not defined"),
    ],
)
def test_a_mistake_in_a_config_file_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "config.py"
    path.write_text(textwrap.dedent(text))
    with pytest.raises(ValueError, match=message):
        load_config(path)


def test_a_missing_file_names_those_that_are_there(tmp_path):
    (tmp_path / "sft.py").write_text("")
    with pytest.raises(ValueError, match=r"there is no config file .*stf\.py; .* has .*sft\.py"):
        load_config(tmp_path / "stf.py")
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ValueError, match="a config file is Python"):
        load_config(tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"is no run directory: it has no config\.json"):
        load_config(tmp_path)
