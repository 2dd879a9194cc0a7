# SPDX-License-Identifier: Apache-2.0
"""Laws of long texts: parts make up the whole, windows of every length predict the same tokens."""

import itertools
import json

import numpy as np
import pytest

from jaxlm.data import DataConfig, LongText, Rows, Task, byte_tokenizer, prepare, text_tokens, windows_of
from jaxlm.data.sources import open_source


def text_of(source):
    ((_, record),) = open_source(source).records()
    return record["text"]


def test_parts_of_a_text_make_it_up(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(chr(65 + i % 50) for i in range(997)))
    cuts = (0.0, 0.3, 0.85, 1.0)
    parts = [text_of(LongText(path=str(path), begin=a, end=b)) for a, b in itertools.pairwise(cuts)]
    assert "".join(parts) == path.read_text() and [len(part) for part in parts] == [299, 548, 150]


def test_a_text_may_lie_in_several_files_in_json_and_in_lines_of_it(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert text_of(LongText(path=str(tmp_path / "*.txt"))) == "a\n\nb"
    whole = tmp_path / "a.json"
    whole.write_text(json.dumps({"text": "one\n"}))
    assert text_of(LongText(path=str(whole))) == "one\n"
    lines = tmp_path / "a.jsonl"
    lines.write_text(json.dumps({"text": "one"}) + "\n" + json.dumps({"text": "two"}) + "\n")
    assert text_of(LongText(path=str(lines))) == "one\n\ntwo"
    lines.write_text(json.dumps({"words": "one"}))
    with pytest.raises(
        ValueError, match=r"a\.jsonl: every line must be an object with a text under 'text', got .*words"
    ):
        open_source(LongText(path=str(lines)))
    with pytest.raises(ValueError, match=r"0 <= begin < end <= 1, got 0\.5 to 0\.5"):
        LongText(begin=0.5, end=0.5)


def test_every_python_brings_a_text():
    assert len(text_of(LongText())) > 300_000
    one, other = (open_source(LongText(begin=b)).identity for b in (0.0, 0.1))
    assert one != other, "prepared rows are kept under the content"


def test_windows_of_all_lengths_predict_the_same_tokens():
    tokens = text_tokens(LongText(end=0.001), byte_tokenizer())
    for length in (1, 4, 64, 256):
        inputs, targets = windows_of(tokens, length, 256)
        assert inputs.shape == targets.shape == (256 // length, length)
        np.testing.assert_array_equal(targets.ravel(), tokens[1:257])
        np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    with pytest.raises(ValueError, match="no whole number of windows of 7"):
        windows_of(tokens, 7, 256)
    with pytest.raises(ValueError, match=f"has {len(tokens)} tokens, {len(tokens) + 1} are needed"):
        windows_of(tokens, 1, len(tokens))


def test_texts_follow_each_other_with_an_end_between(tmp_path):
    tokens = text_tokens(Rows(records=({"text": "ab"}, {"text": "c"})), byte_tokenizer())
    assert tokens.tolist() == [97, 98, 258, 99, 258]
    task = Task(name="text", train=LongText(end=0.01))
    rows = prepare(
        DataConfig(tasks=(task,), length=64, on_long="split"), byte_tokenizer(), split="train", directory=tmp_path
    )
    assert rows.num_rows("text") > 50, "a long text becomes many rows"
