# SPDX-License-Identifier: Apache-2.0
"""Preparation: rows that hold each record once, a key that names everything, folders whole or not at all."""

import dataclasses
import json
import logging
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data import preparation, procedural
from jaxlm.data import prepared as prepared_module
from jaxlm.data.config import DataConfig, JsonLines, Procedural, Rows, Task
from jaxlm.data.encode import Encoder
from jaxlm.data.preparation import prepare
from jaxlm.data.prepared import open_prepared
from jaxlm.data.records import parse
from jaxlm.data.tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer()


def rows_of(prepared, task=0):
    return [prepared.row(task, index) for index in range(prepared.num_rows(prepared.task_names[task]))]


def given_rows(*records, **options):
    return DataConfig(**{"tasks": (Task(name="given", train=Rows(records=records)),), "length": 32, **options})


records = st.lists(
    st.tuples(st.text("abc", min_size=1, max_size=9), st.text("xyz", min_size=1, max_size=9)), min_size=1, max_size=25
)


@settings(deadline=None, max_examples=25)
@given(pairs=records, packing=st.sampled_from(["first_fit", "none"]))
def test_the_rows_hold_each_record_exactly_once_and_no_target_crosses_a_boundary(tmp_path_factory, pairs, packing):
    config = given_rows(*({"prompt": p, "completion": c} for p, c in pairs), packing=packing)
    prepared = prepare(config, TOKENIZER, split="train", directory=tmp_path_factory.mktemp("data"))
    encoder = Encoder(TOKENIZER)
    seen = []
    for row in rows_of(prepared):
        segments = range(1, row["segment_ids"].max() + 1)
        assert packing == "first_fit" or len(segments) == 1
        for segment in segments:
            inside = row["segment_ids"] == segment
            (record,) = set(row["record_ids"][inside].tolist())
            prompt, completion = pairs[record]
            encoded = encoder.encode(parse({"prompt": prompt, "completion": completion}))
            assert row["tokens"][inside].tolist() == encoded.tokens.tolist()
            assert row["loss_weights"][inside].tolist() == encoded.trained.tolist()
            assert row["positions"][inside].tolist() == list(range(inside.sum()))
            assert row["loss_weights"][inside][0] == 0
            seen.append(record)
        padding = row["segment_ids"] == 0
        assert (row["record_ids"][padding] == -1).all() and (row["loss_weights"][padding] == 0).all()
        assert (np.diff(np.flatnonzero(~padding)) == 1).all()
    assert sorted(seen) == list(range(len(pairs)))


def test_a_split_text_has_each_token_but_its_first_as_a_target_once(tmp_path):
    text = "abcdefghij" * 8 + "k"
    config = given_rows({"text": text}, {"text": "short"}, on_long="split")
    prepared = prepare(config, TOKENIZER, split="train", directory=tmp_path)
    targets = [
        row["tokens"][(row["loss_weights"] > 0) & (row["record_ids"] == 0)].tolist() for row in rows_of(prepared)
    ]
    expected = [*text[1:].encode(), TOKENIZER.eos_token_id]
    assert [token for part in targets for token in part] == expected
    assert prepared.counts["given"]["trained_tokens"] == len(expected) + len("short")


def test_preparing_twice_writes_the_same_bytes_and_the_second_time_nothing(tmp_path):
    config = DataConfig(tasks=(Task(name="a", train=Procedural(generator="recall", size=50)),), length=64)
    one, two = (prepare(config, TOKENIZER, split="train", directory=tmp_path / name) for name in "ab")
    assert one.manifest == two.manifest
    with mock.patch.object(preparation, "_write_task", side_effect=AssertionError("the cache was missed")):
        again = prepare(config, TOKENIZER, split="train", directory=tmp_path / "a")
    assert again.manifest == one.manifest
    assert [path.name for path in (tmp_path / "a").iterdir()] == [f"train-{one.key}"]


def base_config(path):
    path.write_text(json.dumps({"prompt": "a=", "completion": "b"}) + "\n")
    tasks = (
        Task(name="file", train=JsonLines(path=str(path)), test=Rows(records=({"text": "other"},))),
        Task(name="made", train=Procedural(generator="addition", size=20)),
    )
    return DataConfig(tasks=tasks, length=48)


def other_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("user", "human") + " "
    return tokenizer


def other_vocabulary():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<more>"])
    return tokenizer


def other_eos():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<|pad|>"
    return tokenizer


def task_changed(index, **change):
    def changed(config):
        tasks = list(config.tasks)
        tasks[index] = dataclasses.replace(tasks[index], **change)
        return dataclasses.replace(config, tasks=tuple(tasks))

    return changed


INGREDIENTS = {
    "length": lambda config: dataclasses.replace(config, length=49),
    "packing": lambda config: dataclasses.replace(config, packing="none"),
    "prompts": lambda config: dataclasses.replace(config, prompts="chat"),
    "on_bad": lambda config: dataclasses.replace(config, on_bad="skip"),
    "on_long": lambda config: dataclasses.replace(config, on_long="skip"),
    "task name": task_changed(0, name="folder"),
    "task order": lambda config: dataclasses.replace(config, tasks=config.tasks[::-1]),
    "generator": task_changed(1, train=Procedural(generator="recall", size=20)),
    "generator's size": task_changed(1, train=Procedural(generator="addition", size=21)),
    "generator's seed": task_changed(1, train=Procedural(generator="addition", size=20, seed=1)),
    "generator's options": task_changed(1, train=Procedural(generator="addition", size=20, options={"digits": 1})),
}


@pytest.mark.parametrize("name", INGREDIENTS)
def test_changing_any_one_ingredient_of_the_config_changes_the_key(tmp_path, name):
    config = base_config(tmp_path / "a.jsonl")
    changed = INGREDIENTS[name](config)
    keys = {prepare(each, TOKENIZER, split="train", directory=tmp_path).key for each in (config, changed)}
    assert len(keys) == 2


@pytest.mark.parametrize("tokenizer", [other_template, other_vocabulary, other_eos])
def test_changing_the_tokenizer_changes_the_key(tmp_path, tokenizer):
    config = base_config(tmp_path / "a.jsonl")
    keys = {prepare(config, each, split="train", directory=tmp_path).key for each in (TOKENIZER, tokenizer())}
    assert len(keys) == 2


def test_changing_the_file_the_code_or_the_split_changes_the_key(tmp_path, monkeypatch):
    config = base_config(tmp_path / "a.jsonl")
    keys = [prepare(config, TOKENIZER, split="train", directory=tmp_path).key]
    keys.append(prepare(config, TOKENIZER, split="test", directory=tmp_path).key)
    (tmp_path / "a.jsonl").write_text('{"prompt": "a=", "completion": "c"}\n')
    keys.append(prepare(config, TOKENIZER, split="train", directory=tmp_path).key)
    keys.append(prepare(config, TOKENIZER, split="test", directory=tmp_path).key)  # what is dropped depends on it
    kept = dataclasses.replace(config, test_overlap="keep")
    keys.append(prepare(kept, TOKENIZER, split="test", directory=tmp_path).key)
    monkeypatch.setattr(procedural, "VERSION", procedural.VERSION + 1)
    keys.append(prepare(config, TOKENIZER, split="train", directory=tmp_path).key)
    for module in (preparation, prepared_module):
        monkeypatch.setattr(module, "FORMAT", 1_000)
    keys.append(prepare(config, TOKENIZER, split="train", directory=tmp_path).key)
    assert len(set(keys)) == 7


def test_weights_of_the_mixture_do_not_change_the_key(tmp_path):
    config = base_config(tmp_path / "a.jsonl")
    changed = task_changed(0, weight=2.0)(config)
    keys = {prepare(each, TOKENIZER, split="train", directory=tmp_path).key for each in (config, changed)}
    assert len(keys) == 1


def test_test_questions_seen_in_training_are_dropped_and_counted(tmp_path):
    train = Rows(records=({"prompt": "1+1=", "completion": "2"}, {"prompt": "1+2=", "completion": "3"}))
    test = Rows(records=({"prompt": "1+2=", "completion": "3"}, {"prompt": "2+2=", "completion": "4"}))
    config = DataConfig(tasks=(Task(name="sum", train=train, test=test), Task(name="none", train=train)), length=16)
    prepared = prepare(config, TOKENIZER, split="test", directory=tmp_path)
    assert prepared.counts["sum"]["records"] == 1
    assert prepared.counts["sum"]["skipped"] == {"seen in training": {"count": 1, "first": "given record 0"}}
    assert [row["record_ids"].max() for row in rows_of(prepared)] == [1]
    assert prepared.task_names == ("sum", "none") and prepared.num_rows("none") == 0
    kept = prepare(dataclasses.replace(config, test_overlap="keep"), TOKENIZER, split="test", directory=tmp_path)
    assert kept.counts["sum"]["records"] == 2
    with pytest.raises(ValueError, match="'sum' has no usable record: 1 seen in training"):
        none_left = Task(name="sum", train=train, test=Rows(records=test.records[:1]))
        prepare(DataConfig(tasks=(none_left,)), TOKENIZER, split="test", directory=tmp_path)


def test_a_split_that_no_task_has_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no task has a test source: given"):
        prepare(given_rows({"text": "abc"}), TOKENIZER, split="test", directory=tmp_path)


BAD = {  # a line of a file -> reason, part of the message
    '{"prompt": "a", "completion": "b"': ("broken line", "not a JSON object"),
    '{"prompt": "a", "completion": "\xff"}': ("broken line", "not a JSON object"),
    '["a", "b"]': ("not an object", "got list"),
    '{"prompt": "a"}': ("missing field", "field 'completion' is missing"),
    '{"question": "a", "answer": "b"}': ("missing field", r"this one has \['answer', 'question'\]"),
    '{"prompt": "a", "completion": 7}': ("wrong type", "'completion' must be text, got int"),
    '{"prompt": "a", "completion": " "}': ("empty completion", "completion is empty"),
    '{"prompt": "", "completion": "b"}': ("empty prompt", "prompt is empty"),
    '{"text": "  "}': ("empty text", "text is empty"),
    '{"messages": "hi"}': ("wrong type", "'messages' must be a list"),
    '{"messages": [7]}': ("wrong type", "message 0 must be an object"),
    '{"messages": [{"role": "bot", "content": "b"}]}': ("unknown role", "unknown role 'bot'"),
    '{"messages": [{"role": "user"}]}': ("missing field", "message 0 has no 'content'"),
    '{"messages": [{"role": "user", "content": ["a"]}]}': ("wrong type", "'content' of message 0 must be text"),
    '{"messages": [{"role": "user", "content": "b"}]}': ("no trainable token", "no message of the assistant"),
    '{"messages": []}': ("no trainable token", "no message of the assistant"),
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\\n"}]}': (
        "empty completion",
        "message 1 of the assistant is empty",
    ),
    '{"messages": [{"role": "assistant", "content": "a", "tool_calls": []}]}': ("unknown field", "tool_calls"),
    '{"prompt": "abcdefghijklmno", "completion": "abcdefghijklmnopqrst"}': (
        "too long",
        "36 tokens are longer than .* 32",
    ),
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_record_is_named_by_file_and_line_or_skipped_and_counted(tmp_path, caplog, line):
    reason, message = BAD[line]
    path = tmp_path / "records.jsonl"
    good = json.dumps({"prompt": "a", "completion": "b"}).encode()
    path.write_bytes(b"\n".join([good, b"", line.encode("latin-1"), line.encode("latin-1"), good, b""]))
    config = DataConfig(tasks=(Task(name="file", train=JsonLines(path=str(path))),), length=32)
    with pytest.raises(ValueError, match=rf"records\.jsonl:3: .*{message}"):
        prepare(config, TOKENIZER, split="train", directory=tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []  # nothing half-written is left
    skipping = dataclasses.replace(config, on_bad="skip", on_long="skip")
    with caplog.at_level(logging.WARNING):
        prepared = prepare(skipping, TOKENIZER, split="train", directory=tmp_path / "data")
    skipped = prepared.counts["file"]["skipped"]
    assert prepared.counts["file"]["records"] == 2 and list(skipped) == [reason] and skipped[reason]["count"] == 2
    assert "records.jsonl:3: " in skipped[reason]["first"] and "records.jsonl:3: " in caplog.text
    assert f"{reason} 2" in prepared.summary()
    assert prepared.describe(0, 4) == f"{path}:5"
    path.write_bytes(line.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"'file' has no usable record: 1 {reason}"):
        prepare(skipping, TOKENIZER, split="train", directory=tmp_path / "data")


def test_only_texts_are_split(tmp_path):
    config = given_rows({"prompt": "a" * 20, "completion": "b" * 20}, on_long="split")
    with pytest.raises(ValueError, match=r"given record 0: 41 tokens are longer than the window of 32"):
        prepare(config, TOKENIZER, split="train", directory=tmp_path)


def test_an_empty_source_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'given' has no usable record: its source is empty"):
        prepare(given_rows(), TOKENIZER, split="train", directory=tmp_path)


def test_the_sample_shows_what_is_trained(tmp_path):
    prepared = prepare(given_rows({"prompt": "1+1=", "completion": " 2"}), TOKENIZER, split="train", directory=tmp_path)
    assert prepared.sample == "1+1=[[ 2<|im_end|>]]"
    assert prepared.sample in prepared.summary() and prepared.key in prepared.summary()


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a missing file": (lambda folder: (folder / "0.tokens.npy").unlink(), "0.tokens.npy is missing"),
    "a cut file": (lambda folder: (folder / "0.trained.npy").write_bytes(b"x"), "0.trained.npy has 1 bytes"),
    "a flipped bit": (lambda folder: flip(folder / "0.segments.npy"), "content of .*0.segments.npy"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "holds no manifest.json"),
    "a cut manifest": (
        lambda folder: (folder / "manifest.json").write_text('{"format": 1,'),
        "manifest.json is damaged",
    ),
    "another manifest": (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    "another format": (lambda folder: (folder / "manifest.json").write_text('{"format": 0}'), "has format 0"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_data_is_refused_with_the_remedy(tmp_path, damage):
    harm, message = DAMAGE[damage]
    folder = prepare(given_rows({"text": "abc"}), TOKENIZER, split="train", directory=tmp_path).folder
    open_prepared(folder, check="digest")
    harm(folder)
    with pytest.raises(ValueError, match=f"{message}.*prepare"):
        open_prepared(folder, check="digest")


def test_two_processes_may_prepare_at_once(tmp_path):
    config = given_rows({"text": "abc"})
    write = preparation._write_task

    def slowly(*args):
        if not list(tmp_path.glob("train-*")):
            with mock.patch.object(preparation, "_write_task", write):
                prepare(config, TOKENIZER, split="train", directory=tmp_path)
        return write(*args)

    with mock.patch.object(preparation, "_write_task", slowly):
        prepared = prepare(config, TOKENIZER, split="train", directory=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"train-{prepared.key}"]


def test_opening_needs_no_source_package_and_no_tokenizer(tmp_path):
    folder = prepare(given_rows({"text": "abc"}), TOKENIZER, split="train", directory=tmp_path).folder
    code = (
        "import sys\n"
        "from jaxlm.data import open_prepared\n"
        f"print(open_prepared({str(folder)!r}).row(0, 0)['tokens'][:3].tolist())\n"
        "heavy = {'transformers', 'tokenizers', 'datasets', 'pyarrow', 'grain', 'jax', 'reasoning_gym'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[97, 98, 99]\n", done.stderr
