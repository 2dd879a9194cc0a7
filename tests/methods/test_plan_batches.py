# SPDX-License-Identifier: Apache-2.0
"""Rows with room for a capsule: exact places and masks, lengths in buckets, refusals that name the record."""

import dataclasses
import types

import numpy as np
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from jaxlm.data import byte_tokenizer
from jaxlm.methods import RCapsule
from jaxlm.methods.plan_batches import MARKS, PlanBatches, PlanEncoder, add_marks, assemble

METHOD = RCapsule(bucket=8, max_plan=12)
RECORD = {"question": "2+2=", "plan": "add", "steps": "2 4", "answer": "4"}
EOS = 258


def encoded(record=RECORD, **fields):
    method = dataclasses.replace(METHOD, **fields)
    encoder = PlanEncoder(byte_tokenizer(), method.layout)
    return method.layout, encoder, encoder(record, "a.jsonl:7")


def text_of(ids):
    tokenizer = byte_tokenizer()
    add_marks(tokenizer)
    return "".join("E" if i < 0 else tokenizer.decode([i], skip_special_tokens=False) for i in ids)


@pytest.mark.parametrize(
    "fields, text",
    [
        ({}, "2+2=<cap>EE</cap>2 4<ans>4<|im_end|>"),
        ({"num_capsules": 4}, "2+2=<cap>EEEE</cap>2 4<ans>4<|im_end|>"),
        ({"num_capsules": 0}, "2+2=2 4<ans>4<|im_end|>"),
        ({"targets": "answer"}, "2+2=<cap>EE</cap><ans>4<|im_end|>"),
        ({"num_capsules": 0, "targets": "plan_steps_and_answer"}, "2+2=add\n2 4<ans>4<|im_end|>"),
        ({"mode": "parallel"}, "2+2=<cap>EE</cap>2 4<ans>4<|im_end|>"),
        (
            {"prompts": "chat"},
            "<|im_start|>user\n2+2=<|im_end|>\n<|im_start|>assistant\n<cap>EE</cap>2 4<ans>4<|im_end|>",
        ),
    ],
)
def test_a_row_says_what_it_should_and_learns_what_stands_behind_the_capsule(fields, text):
    layout, encoder, record = encoded(**fields)
    batch = assemble([[(3, 5, record)], []], layout, encoder.marks)
    inside = batch["segment_ids"][0] == 1
    assert text_of(batch["tokens"][0, inside]) == text
    learnt = text_of(batch["tokens"][0, batch["loss_weights"][0] > 0])
    asked = text.partition("</cap>" if "cap" in text else "2+2=")[2]
    assert learnt == asked
    assert batch["positions"][0, inside].tolist() == list(range(inside.sum()))
    assert set(batch["task_ids"][0, inside]) == {3} and set(batch["record_ids"][0, inside]) == {5}
    assert (
        not batch["segment_ids"][1].any() and not batch["loss_weights"][1].any() and set(batch["record_ids"][1]) == {-1}
    )
    places = batch["capsule_ids"][0]
    assert places[places > 0].tolist() == list(range(1, layout.num_capsules + 1))
    assert np.array_equal(places > 0, batch["tokens"][0] == -1)


def test_in_steps_every_cap_stands_in_one_column_and_lengths_are_multiples():
    layout, encoder, _ = encoded()
    records = [encoder(RECORD | {"question": q}, "") for q in ("2+2=", "12+12=", "2=")]
    batch = assemble([[(0, i, record)] for i, record in enumerate(records)], layout, encoder.marks)
    P = batch["prompt_mask"].shape[1]
    assert P == 8 and set(batch["tokens"][:, P - 1]) == {encoder.marks.cap}
    assert batch["prompt_mask"].sum(axis=1).tolist() == [5, 7, 3] and batch["tokens"].shape == (3, 8 + 2 + 8)
    with pytest.raises(ValueError, match=r'wants? one: set data.packing="none"'):
        assemble([[(0, 0, records[0]), (0, 1, records[1])]], layout, encoder.marks)


def test_plans_end_with_the_end_marker_and_are_cut_only_when_asked():
    layout, encoder, record = encoded()
    assert text_of(record.plan) == "add<|im_end|>"
    plans = assemble([[(0, 0, record)]], layout, encoder.marks)
    assert plans["plan_tokens"].shape == (1, 1, 8) and plans["plan_mask"].sum() == 4
    layout, encoder, record = encoded(RECORD | {"plan": "add both numbers"}, long_plans="truncate")
    assert assemble([[(0, 0, record)]], layout, encoder.marks)["plan_mask"].sum() == 12


class Source:
    """Rows that name records 0, 1, 2, ... and the records themselves."""

    def __init__(self, *records):
        self.records, self.step = records, 0

    def __call__(self, task_id, record_id):
        return self.records[record_id]

    def everything(self):
        return ((0, i, record) for i, record in enumerate(self.records))

    def __next__(self):
        self.step += 1
        shape, number = (1, 4), (self.step - 1) % len(self.records)
        ones = np.ones(shape, np.int32)
        return {"task_ids": 0 * ones, "segment_ids": ones, "record_ids": number * ones}

    def get_state(self):
        return {"step": self.step}

    def set_state(self, state):
        self.step = state["step"]


def batches(*records, visible=0, **fields):
    source, method = Source(*records), dataclasses.replace(METHOD, visible_plan_steps=visible, **fields)
    place = lambda task, record: f"plans.jsonl:{record + 1}"  # noqa: E731
    made = PlanBatches(method.layout, byte_tokenizer(), source, place, source, visible_plan_steps=visible)
    return types.SimpleNamespace(stream=made, source=source)


def test_the_stream_goes_on_where_it_was_with_the_plan_visible_at_first():
    records = [RECORD | {"question": f"{n}+{n}="} for n in range(5)]
    whole, shown = batches(*records, visible=3).stream, []
    for _ in range(5):
        state = whole.get_state()
        batch = next(whole)
        again = batches(*records, visible=3).stream
        again.set_state(state)
        other = next(again)
        assert all(np.array_equal(batch[name], other[name]) for name in batch)
        shown.append(text_of(batch["tokens"][0, : batch["prompt_mask"].shape[1]][batch["prompt_mask"][0]]))
        assert text_of(batch["plan_tokens"][0, 0, :4]) == "add<|im_end|>" and batch["plan_mask"].sum() == 4
    assert shown == ["0+0=\nadd<cap>", "1+1=\nadd<cap>", "2+2=\nadd<cap>", "3+3=<cap>", "4+4=<cap>"]
    unplanned = next(batches({**RECORD, "plan": ""}, visible=3, recon_weight=0.0).stream)
    assert text_of(unplanned["tokens"][0, :8][unplanned["prompt_mask"][0]]) == "2+2=<cap>", "no plan, no empty line"


@pytest.mark.parametrize(
    "records, fields, message",
    [
        ([RECORD, {**RECORD, "plan": ""}], {}, r"plans.jsonl:2: the record has no plan, and recon_weight > 0"),
        (
            [RECORD, {**RECORD, "plan": "add them all up"}],
            {},
            r"1 of 2 plans are longer than max_plan 12 tokens, the longest \(plans.jsonl:2\) has 16",
        ),
        ([{"prompt": "2+2=", "completion": "4"}], {}, r"plans.jsonl:1: r_capsule wants 'question'"),
        ([{**RECORD, "steps": "say <cap>"}], {}, r"plans.jsonl:1: steps holds '<cap>'"),
        ([{**RECORD, "steps": "say <ans>"}], {"recon": "none"}, r"plans.jsonl:1: steps holds '<ans>'"),
    ],
)
def test_records_that_cannot_be_used_are_named(records, fields, message):
    with pytest.raises(ValueError, match=message):
        stream = batches(*records, **fields).stream
        for _ in records:
            next(stream)


def test_records_without_a_plan_are_fine_where_nothing_rebuilds_it():
    for fields in ({"recon_weight": 0.0}, {"recon": "none"}, {"num_capsules": 0}):
        batch = next(batches({**RECORD, "plan": ""}, **fields).stream)
        assert batch["loss_weights"].any() and "plan_tokens" not in batch


def test_a_tokenizer_that_has_a_mark_as_text_is_refused_and_marks_are_added_once():
    tokenizer = byte_tokenizer()
    assert add_marks(tokenizer) == add_marks(tokenizer) == (259, 260, 261) and len(tokenizer) == 262
    assert tokenizer.decode([259, 50, 261, 260], skip_special_tokens=True) == "2<ans>"
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<cap>": 0, "a": 1}, unk_token="a"))
    with pytest.raises(ValueError, match="already uses '<cap>' as ordinary text"):
        add_marks(PreTrainedTokenizerFast(tokenizer_object=words))
    with pytest.raises(ValueError, match="no eos token"):
        bare = PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 1}, unk_token="a"))
        )
        PlanEncoder(bare, METHOD.layout)
    assert MARKS == ("<cap>", "</cap>", "<ans>")
