# SPDX-License-Identifier: Apache-2.0
"""Batches: exact resume, one order for any number of processes, shares as asked."""

import json
from collections import Counter
from itertools import chain

import numpy as np
import pytest

from jaxlm.data.config import DataConfig, Procedural, Task
from jaxlm.data.preparation import prepare
from jaxlm.data.stream import batches, finite_batches
from jaxlm.data.tokenizers import byte_tokenizer


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    tasks = tuple(
        Task(name=name, train=Procedural(generator=name, size=size))
        for name, size in (("sorting", 60), ("recall", 90), ("addition", 70))
    )
    config = DataConfig(tasks=tasks, length=64)
    return prepare(config, byte_tokenizer(), split="train", directory=tmp_path_factory.mktemp("data"))


@pytest.fixture
def stream(prepared):
    """`batches` of the prepared data whose threads end with the test."""
    opened = []

    def open_stream(**options):
        opened.append(batches(prepared, **{"batch_size": 8, "seed": 0, **options}))
        return opened[-1]

    yield open_stream
    for each in opened:
        each.close()


def row_names(batch):
    """Which rows a batch holds: (task, first record) of each."""
    return [
        (int(task), int(record))
        for task, record in zip(batch["task_ids"][:, 0], batch["record_ids"][:, 0], strict=True)
    ]


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_batches_have_the_shapes_and_kinds_of_the_contract(stream):
    kinds = {name: (array.dtype.name, array.shape) for name, array in next(stream()).items()}
    names = ("tokens", "positions", "segment_ids", "task_ids", "record_ids")
    assert kinds == {**{name: ("int32", (8, 64)) for name in names}, "loss_weights": ("float32", (8, 64))}


@pytest.mark.parametrize("step", [0, 1, 3, 11, 40])
def test_a_resumed_stream_equals_the_uninterrupted_one(stream, step):
    whole = stream()
    for _ in range(step):
        next(whole)
    state = json.loads(json.dumps(whole.get_state()))
    expected = [next(whole) for _ in range(5)]
    fresh, used = stream(), stream()
    next(used)
    for resumed in (fresh, used, whole):
        resumed.set_state(state)
        assert all(equal(next(resumed), batch) for batch in expected)
        assert resumed.get_state()["step"] == step + 5


def test_resuming_far_on_reads_no_skipped_row(prepared, monkeypatch):
    read = []
    row = type(prepared).row
    monkeypatch.setattr(type(prepared), "row", lambda self, *index: read.append(index) or row(self, *index))
    resumed = batches(prepared, batch_size=8, seed=0, threads=2, ahead=4)
    resumed.set_state({**resumed.get_state(), "step": 1_000_000})
    next(resumed)
    resumed.close()
    # The batch that was taken, those kept ready, and what the threads have in hand when they are told to end.
    assert len(read) <= 8 * (1 + 4 + 2)


def shares(batch_size, count):
    """Rows of each of so many processes."""
    return np.split(np.arange(batch_size), count)


@pytest.mark.parametrize("count", [2, 4])
def test_a_step_is_the_same_rows_in_the_same_order_for_any_number_of_processes(stream, count):
    one = stream()
    many = [stream(part=part) for part in shares(8, count)]
    for _ in range(12):
        parts = [next(each) for each in many]
        assert all(len(part["tokens"]) == 8 // count for part in parts)
        assert list(chain.from_iterable(map(row_names, parts))) == row_names(next(one))
    assert all(each.get_state() == one.get_state() for each in many)


def test_a_part_is_any_rows_of_a_batch(stream):
    one, some = stream(), stream(part=[6, 1, 2])
    for _ in range(12):
        names = row_names(next(one))
        assert row_names(next(some)) == [names[6], names[1], names[2]]


def test_a_state_moves_between_numbers_of_processes(stream):
    two = [stream(part=part) for part in shares(8, 2)]
    for each in two:
        next(each)
    one = stream()
    one.set_state(two[0].get_state())
    assert row_names(next(one)) == list(chain.from_iterable(row_names(next(each)) for each in two))


def test_rows_come_in_proportion_to_the_weights(stream):
    weights = {"sorting": 3.0, "recall": 1.0, "addition": 0.5, "unused": 1.0}
    mixed = stream(weights=weights)
    drawn = Counter(int(task) for _ in range(90) for task in next(mixed)["task_ids"][:, 0])
    assert drawn == {0: 480, 1: 160, 2: 80}


def test_every_epoch_has_each_row_once_in_another_order(prepared, stream):
    rows = prepared.num_rows("recall")
    drawn = stream(tasks=["recall"], batch_size=1)
    epochs = [[row_names(next(drawn))[0] for _ in range(rows)] for _ in range(3)]
    assert all(len(set(epoch)) == rows for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_seed_decides_the_order(stream):
    assert equal(next(stream()), next(stream()))
    assert not equal(next(stream()), next(stream(seed=1)))


def test_another_task_leaves_the_order_of_the_first_alone(stream):
    alone, together = stream(tasks=["recall"], batch_size=4), stream(tasks=["recall", "sorting"])
    for _ in range(5):
        assert [name for name in row_names(next(together)) if name[0] == 1] == row_names(next(alone))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("batch_size", [2, 6, 64])
def test_finite_batches_hold_each_row_once_and_fill_up_with_weight_zero(prepared, batch_size, count):
    parts = [finite_batches(prepared, batch_size=batch_size, part=part) for part in shares(batch_size, count)]
    assert len({len(part) for part in parts}) == 1
    assert all(len(list(part)) == len(part) for part in parts)
    read = [batch for part in parts for batch in part]
    assert {batch["tokens"].shape for batch in read} == {(batch_size // count, 64)}
    names = [name for batch in read for name in row_names(batch) if name[1] >= 0]
    total = sum(prepared.num_rows(task) for task in prepared.task_names)
    assert len(names) == len(set(names)) == total
    weight = sum(batch["loss_weights"].sum() for batch in read)
    assert weight == sum(count["trained_tokens"] for count in prepared.counts.values())
    assert all((batch["loss_weights"][batch["segment_ids"] == 0] == 0).all() for batch in read)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"part": [0, 8]}, r"part must be indices in \[0, 8\), each once, at least one; got \[0, 8\]"),
        ({"part": [1, 1]}, r"each once, at least one; got \[1, 1\]"),
        ({"part": []}, r"at least one; got \[\]"),
        ({"tasks": ["sort"]}, "no task 'sort'.*sorting, recall, addition"),
        ({"tasks": []}, "no task to draw from"),
        ({"weights": {"sorting": 1.0, "recall": 0.0, "addition": 1.0}}, "task 'recall' needs a positive weight, got 0"),
        ({"weights": {"sorting": 1.0}}, "task 'recall' needs a positive weight, got None"),
    ],
)
def test_what_cannot_be_drawn_is_refused(stream, options, message):
    with pytest.raises(ValueError, match=message):
        stream(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"seed": 1}, "seed 1, this stream 0"), ({"batch_size": 4}, "batch_size 4"), ({"other": 1}, "not the state")],
)
def test_the_state_of_another_order_is_refused(stream, change, message):
    with pytest.raises(ValueError, match=message):
        stream().set_state({**stream().get_state(), **change})


def test_tasks_of_one_size_are_shuffled_each_in_its_own_way(tmp_path):
    source = Procedural(generator="recall", size=90)
    config = DataConfig(tasks=(Task(name="a", train=source), Task(name="b", train=source)), length=32)
    prepared = prepare(config, byte_tokenizer(), split="train", directory=tmp_path)
    drawn = batches(prepared, batch_size=20, seed=0)
    names = row_names(next(drawn))
    drawn.close()
    assert [record for task, record in names if task == 0] != [record for task, record in names if task == 1]
