# SPDX-License-Identifier: Apache-2.0
"""Scorers in processes of their own: nothing hangs, nothing is mixed up, nothing gets out, keys stay here."""

import importlib
import inspect
import logging
import os
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data.config import ReasoningGym
from jaxlm.data.records import BadRecord
from jaxlm.data.sources import open_source
from jaxlm.rewards import GymMatch, MathMatch, exercises, own_verifier, verify, workers
from jaxlm.rewards.workers import Workers

HOSTILE = {
    "control characters": "".join(map(chr, range(32))) + "\x7f\x85\u200b\u202e",
    "a lone surrogate": "\ud800 5 \udfff",
    "nothing": "",
    "many fractions": "1/" * 50_000,
    "nested fractions": r"\frac{" * 5_000,
    "a long number": "9" * 100_000,
    "code": r"\boxed{__import__('os').system('touch pwned')}",
    "bare code": "__import__('os').system('touch pwned')",
}
PIECES = [
    r"\boxed{",
    r"\frac{",
    r"\sqrt{",
    "}",
    "{",
    "(",
    ")",
    "$",
    "=",
    "-",
    "+",
    ".",
    "/",
    "^",
    "x",
    "9",
    "1",
    "!",
    "[",
    ",",
]
HALF = {"answer": r"\frac{1}{2}"}


@pytest.fixture(scope="module")
def mathematics():
    pytest.importorskip("math_verify", reason="the extra math is not installed")
    return MathMatch(cpu_seconds=1.0)


@pytest.mark.parametrize(
    ("text", "reference", "score"),
    [
        (r"\boxed{0.5}", r"\frac{1}{2}", 1.0),
        ("The answer is $2\\sqrt{2}$.", r"\sqrt{8}", 1.0),
        (r"\boxed{x^2 + 2x + 1}", "(x+1)^2", 1.0),
        ("x^2 + 2x + 1", "(x+1)^2", 1.0),
        (r"\boxed{\{2, 1\}}", r"$\{1, 2\}$", 1.0),
        (r"\boxed{(1,2]}", r"\boxed{(1, 2]}", 1.0),
        (r"\boxed{[1,2]}", r"(1,2]", 0.0),
        ("we get 6", "#### 6", 1.0),
        ("Half of it: 1/2", "0.5", 1.0),
        (r"\boxed{0.6}", "0.5", 0.0),
        ("no idea", "5", 0.0),
        ("", "5", 0.0),
    ],
)
def test_equal_mathematics_is_right_however_it_is_written(mathematics, text, reference, score):
    assert mathematics(text, {"answer": reference}) == score


@pytest.mark.parametrize(
    "text", [r"\boxed{9^{9^{9^9}}}", r"\boxed{1000000!!!}", r"\boxed{" + "{" * 5000 + "}" * 5000 + "}"]
)
def test_what_would_run_for_ever_is_cut_off_and_told_and_the_next_is_scored(mathematics, text, caplog):
    killed, began = mathematics.processes().killed, time.monotonic()
    with caplog.at_level(logging.WARNING, "jaxlm.rewards"):
        assert mathematics(text, HALF) == 0.0
    assert mathematics.processes().killed == killed + 1
    assert "cut off at 1 s" in caplog.text
    assert time.monotonic() - began < 60
    assert mathematics(r"\boxed{0.5}", HALF) == 1.0


@pytest.mark.parametrize("kind", sorted(HOSTILE))
def test_hostile_texts_are_scored(mathematics, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mathematics(HOSTILE[kind], HALF) == 0.0
    assert not list(tmp_path.iterdir()), "a text was run as code"


@settings(max_examples=25, deadline=None)
@given(text=st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=10).map("".join)))
def test_any_text_has_one_score(mathematics, text):
    score = mathematics(text, HALF)
    assert score in (0.0, 1.0) and mathematics(text, HALF) == score


def test_a_record_without_a_reference_is_refused_by_its_place(mathematics):
    with pytest.raises(BadRecord, match="record 1: the record has no 'answer'"):
        verify(mathematics, ["1", "1"], [HALF, {"prompt": "?"}])


def test_it_works_outside_the_main_thread_and_no_answer_is_mixed_up(mathematics):
    numbers = list(range(20))
    scores = {}

    def ask(shift):
        given = [rf"\boxed{{{2 * (number + shift % 2)}/2}}" for number in numbers]
        scores[shift] = verify(mathematics, given, [{"answer": f"{number}.0"} for number in numbers])

    threads = [threading.Thread(target=ask, args=(shift,)) for shift in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {shift: float(of_one.mean()) for shift, of_one in scores.items()} == {0: 1.0, 1: 0.0, 2: 1.0, 3: 0.0}


def test_a_missing_package_names_its_extra(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('no such thing')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(ImportError, match=r"no such thing: pip install 'jaxlm\[math\]'"):
        Workers("math", size=1, cpu_seconds=1.0).ask([{"references": ["1"], "texts": ["1"]}])


def fake_package(folder, monkeypatch, body):
    """Workers whose reasoning-gym is a few lines in a folder: a scorer that does as the test says."""
    lines = ["import os, socket, subprocess, sys, time, json", "class Tasks:"]
    lines += ["    def __getitem__(self, index): return {'question': 'q'}"]
    lines += ["    def score_answer(self, answer, entry):", *(f"        {line}" for line in body)]
    lines += ["def create_dataset(*_, **__): return Tasks()"]
    (folder / "reasoning_gym.py").write_text("\n".join(lines))
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    return Workers("gym", size=1, cpu_seconds=0.5, memory=1 << 30)


SOURCE = {"generator": "g", "size": 1, "seed": 0, "options": {}}
ASKED = {"source": SOURCE, "index": 0, "question": "q", "text": "t"}


@pytest.mark.parametrize(
    ("body", "killed", "raised"),
    [
        (["while True: pass"], 1, 0),
        (["return 9 ** 9 ** 9"], 1, 0),
        (["return len('x' * (1 << 31))"], 1, 0),
        (["os._exit(3)"], 1, 0),
        (["raise RecursionError"], 0, 1),
        (["return 'text'"], 0, 1),
        (["os.system('touch out')"], 0, 1),
        (["subprocess.run(['touch', 'out'])"], 0, 1),
        (["open('out', 'w')"], 0, 1),
        (["os.open('out', os.O_CREAT | os.O_WRONLY)"], 0, 1),
        (["socket.socket().connect(('127.0.0.1', 9))"], 0, 1),
        (["os.kill(os.getppid(), 0)"], 0, 1),
        (["return float('nan')"], 0, 0),
    ],
)
def test_a_scorer_that_misbehaves_costs_its_text_the_score_and_nobody_else(tmp_path, monkeypatch, body, killed, raised):
    processes = fake_package(tmp_path, monkeypatch, ["if answer == 'fine': return 1.0", *body])
    monkeypatch.chdir(tmp_path)
    assert processes.ask([ASKED, {**ASKED, "text": "fine"}, ASKED]) == [0.0, 1.0, 0.0]
    assert (processes.killed, processes.raised) == (2 * killed, 2 * raised)
    assert not (tmp_path / "out").exists()
    processes.close()


def test_a_worker_that_sleeps_is_killed_by_the_clock(tmp_path, monkeypatch):
    processes = fake_package(tmp_path, monkeypatch, ["time.sleep(1000)"])
    processes._patience = 0.5
    assert processes.ask([ASKED]) == [0.0] and processes.killed == 1


def test_keys_of_the_environment_do_not_reach_a_scorer(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    processes = fake_package(tmp_path, monkeypatch, ["return float('secret' not in json.dumps(dict(os.environ)))"])
    assert processes.ask([ASKED]) == [1.0]
    processes.close()


def test_what_a_scorer_prints_is_no_reply_and_marks_stay_in_range(tmp_path, monkeypatch):
    processes = fake_package(tmp_path, monkeypatch, ["print('{\"score\": 1}', flush=True); return float(answer)"])
    assert processes.ask([{**ASKED, "text": text} for text in ("0.25", "7", "-1")]) == [0.25, 1.0, 0.0]
    processes.close()


def test_an_exercise_that_comes_out_otherwise_is_refused(tmp_path, monkeypatch):
    processes = fake_package(tmp_path, monkeypatch, ["return 1.0"])
    with pytest.raises(BadRecord, match="another exercise"):
        processes.ask([{**ASKED, "question": "p"}])
    processes.close()


def test_workers_are_renewed_before_their_caches_grow(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_LIFETIME", 2)
    processes = fake_package(tmp_path, monkeypatch, ["return (os.getpid() % 1000) / 1000"])
    of_each = processes.ask([ASKED] * 6)
    assert len(set(of_each)) == 3
    processes.close()


@pytest.mark.parametrize("generator", ["chain_sum", "word_sorting", "graph_color", "prime_factorization"])
def test_generators_of_reasoning_gym_score_by_their_own_rules(generator):
    pytest.importorskip("reasoning_gym", reason="the extra tasks is not installed")
    source = ReasoningGym(generator=generator, size=6, seed=11)
    records = [record for _, record in open_source(source).records()]
    verifier = own_verifier(source)
    assert verify(verifier, [record["completion"] for record in records], records).tolist() == [1.0] * 6
    said = [f"Well.\n<answer>{record['completion']}</answer>" for record in records]
    assert verify(verifier, said, records).tolist() == [1.0] * 6
    assert not verify(verifier, list(HOSTILE.values()), [records[0]] * len(HOSTILE)).any()


def test_part_marks_are_given_only_where_asked_for():
    pytest.importorskip("reasoning_gym", reason="the extra tasks is not installed")
    source = ReasoningGym(generator="chain_sum", size=3, seed=1)
    record = next(record for _, record in open_source(source).records())
    near = record["completion"] + "0"
    assert GymMatch(source=source)(near, record) == 0.0
    assert 0 < GymMatch(source=source, marks="part")(near, record) < 1
    with pytest.raises(BadRecord, match="none of the 3 exercises of 'chain_sum' with seed 1"):
        GymMatch(source=source)("5", {"prompt": "1+1=", "completion": "2"})


def test_scorers_that_run_the_answer_are_refused_and_none_is_forgotten():
    pytest.importorskip("reasoning_gym", reason="the extra tasks is not installed")
    from reasoning_gym.factory import DATASETS

    runs = set()
    for name, (kind, _) in DATASETS.items():
        text = inspect.getsource(importlib.import_module(kind.__module__))
        if any(call in text for call in ("eval(answer", "parse_expr(answer", "exec(answer")):
            runs.add(name)
    assert runs == exercises._RUN_THE_ANSWER
    for name in [*runs, *exercises._WRONG]:
        with pytest.raises(ValueError, match="NormalisedMatch"):
            GymMatch(source=ReasoningGym(generator=name, size=1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MathMatch(cpu_seconds=0), "cpu_seconds must be positive and finite, got 0"),
        (lambda: MathMatch(workers=0), "workers must be at least 1, got 0"),
        (lambda: MathMatch(where="whole"), "where must be 'marked' or 'boxed'"),
        (lambda: GymMatch(source=ReasoningGym(generator="chain_sum", size=1), marks="half"), "marks must be"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_forked_child_does_not_read_its_parents_replies():
    mine = workers.shared_workers("math", size=1, cpu_seconds=9.0)
    assert workers.shared_workers("math", size=1, cpu_seconds=9.0) is mine
    assert workers._shared("math", 1, 9.0, os.getpid() + 1) is not mine
