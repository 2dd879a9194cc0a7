# SPDX-License-Identifier: Apache-2.0
"""Sources: numbered records, the place of each, and what is wrong told by name."""

import gzip
import json
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from jaxlm.data.config import DataConfig, Hub, JsonLines, Parquet, Procedural, ReasoningGym, Rows, Task
from jaxlm.data.records import BadRecord, describe
from jaxlm.data.sources import open_source

RECORDS = [{"prompt": f"{i}=", "completion": str(i)} for i in range(5)]


def read(source):
    reader = open_source(source)
    return [(describe(reader.places, index), record) for index, record in reader.records()]


def test_lines_are_numbered_as_an_editor_does(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(["", json.dumps(RECORDS[0]), "  ", json.dumps(RECORDS[1])]))
    assert read(JsonLines(path=str(path))) == [(f"{path}:2", RECORDS[0]), (f"{path}:4", RECORDS[1])]


def test_a_pattern_reads_its_files_in_order_also_packed_ones(tmp_path):
    (tmp_path / "b.jsonl").write_text(json.dumps(RECORDS[2]) + "\n")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(record) + "\n" for record in RECORDS[:2]))
    found = read(JsonLines(path=str(tmp_path / "*.jsonl*")))
    assert found == [
        (f"{tmp_path}/a.jsonl.gz:1", RECORDS[0]),
        (f"{tmp_path}/a.jsonl.gz:2", RECORDS[1]),
        (f"{tmp_path}/b.jsonl:1", RECORDS[2]),
    ]


def test_parquet_gives_its_rows(tmp_path):
    path = str(tmp_path / "a.parquet")
    chats = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    for records in (RECORDS, chats):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
        assert read(Parquet(path=path)) == [(f"{path} row {i}", record) for i, record in enumerate(records)]


@pytest.mark.parametrize("saved", ["files", "disk"])
def test_a_local_data_set_is_read_by_its_folder(tmp_path, monkeypatch, saved):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    if saved == "disk":
        datasets.Dataset.from_list(RECORDS).save_to_disk(folder)
    else:
        folder.mkdir()
        (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    source = Hub(name=str(folder), split="train")
    assert read(source) == [(f"{folder}[train] row {i}", record) for i, record in enumerate(RECORDS)]
    assert open_source(source).identity == open_source(source).identity


def test_fields_are_renamed_and_a_missing_one_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "a", "answer": "b", "id": 1}\n{"question": "a"}\n')
    (_, good), (_, bad) = read(JsonLines(path=str(path), fields={"prompt": "question", "completion": "answer"}))
    assert good == {"prompt": "a", "completion": "b"}
    assert isinstance(bad, BadRecord) and "'answer' is missing" in str(bad)


def test_given_and_made_records_are_numbered_from_zero():
    assert read(Rows(records=(RECORDS[0],))) == [("given record 0", RECORDS[0])]
    assert [place for place, _ in read(Procedural(generator="sorting", size=2, seed=7))] == [
        "sorting of seed 7 item 0",
        "sorting of seed 7 item 1",
    ]


@pytest.mark.parametrize("source", [JsonLines(path="nowhere/*.jsonl"), Parquet(path="nowhere.parquet")])
def test_a_missing_file_is_named(source):
    with pytest.raises(ValueError, match="no file matches 'nowhere"):
        open_source(source)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r"'chain_sum' needs the package reasoning-gym: pip install 'jaxlm\[tasks\]'"):
        open_source(ReasoningGym(generator="chain_sum", size=1))


def test_generators_without_an_answer_are_refused_by_name():
    for name in ("boxnet", "rush_hour"):
        with pytest.raises(ValueError, match=f"{name!r} stores no answer"):
            open_source(ReasoningGym(generator=name, size=1))


@pytest.mark.parametrize("name", ["chain_sum", "propositional_logic", "countdown"])
def test_reasoning_gym_gives_the_stored_answer_and_runs_no_scorer(name, monkeypatch):
    reasoning_gym = pytest.importorskip("reasoning_gym")
    refuse = pytest.fail
    monkeypatch.setattr(reasoning_gym.dataset.ProceduralDataset, "score_answer", lambda *args, **kw: refuse("scored"))
    found = [record for _, record in read(ReasoningGym(generator=name, size=3, seed=1))]
    items = list(reasoning_gym.create_dataset(name, size=3, seed=1))
    expected = [item["answer"] or item["metadata"]["example_answer"] for item in items]
    assert [record["completion"] for record in found] == [answer.strip() for answer in expected]
    assert all(record["prompt"].endswith("\n") for record in found)


def test_seeds_of_reasoning_gym_that_share_items_are_refused():
    def task(seed):
        return Task(
            name="sums",
            train=ReasoningGym(generator="chain_sum", size=1000),
            test=ReasoningGym(generator="chain_sum", size=100, seed=seed),
        )

    for seed in (0, 999, -99):
        with pytest.raises(ValueError, match=r"share items; set the test seed to 10\*\*7"):
            task(seed)
    assert task(1000).test.seed == 1000


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Task(name="a/b", train=Rows(records=())), "without '/', got 'a/b'"),
        (lambda: Task(name="a", train=Rows(records=()), weight=0.0), "weight of task 'a' must be positive"),
        (lambda: DataConfig(tasks=()), "name at least one Task"),
        (lambda: DataConfig(tasks=(Task(name="a", train=Rows(records=())),) * 2), r"got \['a'\] twice"),
        (lambda: DataConfig(tasks=(Task(name="a", train=Rows(records=())),), length=1), "at least 2 tokens, got 1"),
    ],
)
def test_a_config_that_means_nothing_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
