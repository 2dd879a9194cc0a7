# SPDX-License-Identifier: Apache-2.0
"""DPO: pairs stay together, the reference is where training began, the margin grows."""

import dataclasses
import functools
import json

import numpy as np
import pytest

from jaxlm.data.config import DataConfig, JsonLines, Procedural, ProceduralPairs, Rows, Task
from jaxlm.data.preparation import prepare
from jaxlm.data.procedural import GENERATORS, Pairs, score
from jaxlm.data.records import BadRecord, parse
from jaxlm.data.tokenizers import byte_tokenizer
from jaxlm.methods.dpo import Dpo, answer_log_probs, referred
from jaxlm.nn.config import Lora
from jaxlm.train.options import AdamW

pytestmark = pytest.mark.usefixtures("quick_compiles")
TINY = Dpo(optimizer=AdamW(learning_rate=1e-2, schedule="constant", warmup=0.0))
PAIRS = ProceduralPairs(generator="copying", size=40, options={"length": 3})


@pytest.fixture
def job_of(spring):
    """A job as a run makes it."""
    return functools.partial(spring.decoder_job, train=PAIRS, length=72, packing="first_fit", batch_size=8)


@pytest.mark.parametrize("packing", ["first_fit", "none"])
def test_a_pair_is_two_segments_of_one_row_chosen_first(packing, tmp_path):
    file = tmp_path / "pairs.jsonl"
    records = [{"prompt": "p" * n + "=", "chosen": "c" * n, "rejected": "r" * (n + 1)} for n in (3, 1, 2, 3)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    task = Task(name="a", train=JsonLines(path=str(file)))
    config = DataConfig(tasks=(task,), length=40, packing=packing)
    prepared = prepare(config, byte_tokenizer(), split="train", directory=tmp_path)
    seen = []
    for row in (prepared.row(0, index) for index in range(prepared.num_rows("a"))):
        for segment in range(1, row["segment_ids"].max() + 1):
            inside = row["segment_ids"] == segment
            (record,) = set(row["record_ids"][inside].tolist())
            answer = records[record]["chosen" if segment % 2 else "rejected"]
            told = bytes(row["tokens"][inside & (row["tokens"] < 256)].tolist()).decode()
            assert told == records[record]["prompt"] + answer
            assert row["loss_weights"][inside].sum() == len(answer) + 1 and row["positions"][inside][0] == 0
            seen.append((record, bool(segment % 2)))
    assert sorted(seen) == sorted((n, first) for n in range(4) for first in (False, True))
    assert prepared.num_rows("a") == (4 if packing == "none" else 2)
    assert prepared.counts["a"]["records"] == 4 and "[[ccc" in prepared.sample and "[[rrrr" in prepared.sample


def test_a_pair_longer_than_a_row_is_refused_whole(tmp_path):
    pair = {"prompt": "a=", "chosen": "b" * 10, "rejected": "c" * 10}
    config = DataConfig(tasks=(Task(name="a", train=Rows(records=(pair,))),), length=25)
    with pytest.raises(ValueError, match="record 0: 26 tokens are longer than the window of 25"):
        prepare(config, byte_tokenizer(), split="train", directory=tmp_path)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "a", "chosen": "b"}, "missing field"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "equal answers"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "empty completion"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "empty prompt"),
    ],
)
def test_a_pair_without_a_preference_is_refused(record, reason):
    with pytest.raises(BadRecord) as error:
        parse(record)
    assert error.value.reason == reason


@pytest.mark.parametrize("generator", sorted(GENERATORS))
def test_the_rejected_answer_of_an_exercise_is_wrong_in_one_letter(generator):
    for pair in list(map(Pairs(ProceduralPairs(generator=generator, size=50)).__getitem__, range(50))):
        right, wrong = pair["chosen"], pair["rejected"]
        assert sum(a != b for a, b in zip(right, wrong, strict=True)) == 1
        assert score(right, {"completion": right}) == 1 and score(wrong, {"completion": right}) == 0


def test_the_reference_is_where_training_began(job_of, spring):
    """So that before any update every margin is 0 and the loss is log 2, adapters or not."""
    for method in (TINY, dataclasses.replace(TINY, lora=Lora(rank=2))):
        reporter = spring.Heard()
        job = job_of(method, reporter=reporter, steps=2)
        before = spring.bits(job.params)
        method.run(job)
        first, second = reporter.updates()
        assert first["loss"] == pytest.approx(np.log(2), abs=1e-6) and abs(first["margin"]) < 1e-5
        assert second["loss"] != first["loss"] and spring.bits(job.params) == before


def test_the_reference_column_is_what_the_model_gives_each_token(job_of):
    job = job_of(TINY)
    batch = next(referred(job.model, job.params, job.mesh, job.batches(), None))
    row = np.flatnonzero(batch["segment_ids"][0] == 2)
    logits = job.model.logits(job.params, job.model.apply(job.params, batch["tokens"][:1, row]))[0]
    log_probs = np.asarray(logits) - np.log(np.sum(np.exp(np.asarray(logits, np.float64)), axis=-1, keepdims=True))
    expected = log_probs[np.arange(len(row) - 1), batch["tokens"][0, row[1:]]]
    np.testing.assert_allclose(np.asarray(batch["reference_log_probs"])[0, row[1:]], expected, rtol=1e-4)
    again = answer_log_probs(job.model, job.params, batch)
    np.testing.assert_allclose(again, batch["reference_log_probs"], rtol=1e-4, atol=1e-5)


def test_parts_of_a_batch_and_devices_change_nothing(job_of, spring):
    found = []
    for options in ({}, {"micro_batches": 4}, {"devices": 8}):
        reporter = spring.Heard()
        TINY.run(job_of(TINY, reporter=reporter, steps=2, **options))
        found.append(reporter.updates()[1])
    for other in found[1:]:
        for name in ("loss", "margin", "accuracy", "chosen_gain", "gradient_norm"):
            np.testing.assert_allclose(other[name], found[0][name], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("options", [{"smoothing": 0.1}, {"kind": "ipo", "beta": 0.5}], ids=str)
def test_the_margin_grows(options, job_of, spring):
    reporter, method = spring.Heard(), dataclasses.replace(TINY, **options)
    method.run(job_of(method, reporter=reporter, steps=30))
    first, last = reporter.updates()[0], reporter.updates()[-1]
    assert last["loss"] < first["loss"] and last["accuracy"] > 0.6
    assert last["margin"] > 0.3 and last["margin"] == pytest.approx(
        last["chosen_gain"] - last["rejected_gain"], abs=1e-3
    )


def test_a_run_that_was_stopped_equals_one_that_was_not(tmp_path, job_of, spring):
    whole = TINY.run(job_of(TINY))
    TINY.run(job_of(TINY, steps=2, directory=str(tmp_path)))
    assert spring.bits(TINY.run(job_of(TINY, directory=str(tmp_path)))) == spring.bits(whole)


def test_what_cannot_work_is_refused(job_of):
    with pytest.raises(ValueError, match="beta must be positive, got 0"):
        Dpo(beta=0)
    with pytest.raises(ValueError, match=r"smoothing must be in \[0, 0.5\), got 0.5"):
        Dpo(smoothing=0.5)
    with pytest.raises(ValueError, match=r"smoothing is of the sigmoid loss, ipo has none, got 0\.1"):
        Dpo(kind="ipo", smoothing=0.1)
    exercises = Procedural(generator="copying", size=40)
    with pytest.raises(ValueError, match="records that are no pairs of answers"):
        TINY.run(job_of(TINY, train=exercises))
