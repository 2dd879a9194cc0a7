# SPDX-License-Identifier: Apache-2.0
"""Laws of evaluation by generation: what is reported is what the samples say, and measuring changes nothing."""

import dataclasses
import itertools
import json
from collections import Counter

import jax
import numpy as np
import pytest

from jaxlm.checkpoints import save
from jaxlm.config import RunConfig, from_json, to_json
from jaxlm.data import DataConfig, Procedural, ProceduralPairs, Rows, Task, byte_tokenizer
from jaxlm.data.procedural import Exercises
from jaxlm.evaluation import answers_table, generate_checkpoint, judged_by
from jaxlm.evaluation_metrics import flat, measure
from jaxlm.evaluation_options import Generation
from jaxlm.evaluation_page import write_answers_page
from jaxlm.generate.engine import Sampling
from jaxlm.methods import Sft
from jaxlm.nn import Model, ModelConfig
from jaxlm.overrides import override
from jaxlm.rewards import ExactMatch, NumericMatch
from jaxlm.run import answerer, load_model, load_tokenizer, make_job, open_data
from jaxlm.train import AdamW, MeshOptions, RunOptions
from jaxlm.train.held_out import item_metrics, score_items
from jaxlm.train.mesh import make_mesh
from jaxlm.train.reporter import SILENT, RunReporter, read_metrics
from jaxlm.train.scores import Scores

pytestmark = pytest.mark.usefixtures("quick_compiles")


def exercises(generator, **options):
    return Task(
        name=generator,
        train=Procedural(generator=generator, size=200, options=options),
        test=Procedural(generator=generator, size=16, seed=1, options=options),
    )


TASKS = (exercises("copying", length=2), exercises("maximum", count=2))
SAMPLED = Generation(sampling=Sampling(num_samples=4, max_tokens=4), ks=(1, 2), records=6, slots=32)
GREEDY = Generation(sampling=Sampling(max_tokens=6, temperature=0.0), slots=32)


def config(generation=None, *, tasks=TASKS, **options):
    return RunConfig(
        model=ModelConfig(vocab_size=264, width=32, num_layers=1, num_heads=2, mlp_width=64, max_length=32),
        tokenizer="bytes",
        data=DataConfig(tasks=tasks, length=32, test_overlap="keep"),
        method=Sft(optimizer=AdamW(learning_rate=2e-2)),
        run=RunOptions(**{"steps": 60, "batch_size": 16, "log_every": 20, "save_every": 20} | options),
        generation=generation,
    )


def opened(config):
    """Held-out rows, model and a job on one device."""
    mesh = make_mesh(MeshOptions(), devices=jax.devices()[:1])
    train_rows, test_rows = open_data(config, load_tokenizer(config))
    model, params = load_model(config, mesh, vocabulary=train_rows.vocab_size)
    names = config.data.task_names

    def job(reporter=SILENT):
        return make_job(config, mesh, model, params, train_rows, test_rows, reporter, Scores(None, names))

    return test_rows, model, job


@pytest.fixture(scope="module")
def trained():
    """Parameters that know some of it, from a run that never generated."""
    plain = config()
    return jax.tree.map(np.asarray, plain.method.run(opened(plain)[2]()))


@pytest.fixture(scope="module")
def answers(trained):
    """`generation -> answers` of the trained parameters."""
    rows, model, _ = opened(config())
    return lambda generation: answerer(config(generation), model, rows)(model, trained)


def said(answered):
    return [[[(c.text, c.finish_reason) for c in group] for group in task.completions] for task in answered]


class Killed(Exception):
    pass


class Reporter(RunReporter):
    """Remembers evaluations, and dies of the one at step `dies`."""

    def __init__(self, directory, dies=None):
        super().__init__(directory, 60)
        self.heard, self.dies = {}, dies

    def evaluation(self, step, metrics):
        super().evaluation(step, metrics)
        self.heard[step] = dict(metrics)
        if step == self.dies:
            raise Killed


def test_measuring_on_the_way_changes_no_bit_and_a_killed_run_hears_the_same_numbers(trained, answers, tmp_path):
    measured = config(SAMPLED, evaluate_every=20, directory=str(tmp_path))
    job = opened(measured)[2]
    first, second = Reporter(tmp_path, dies=40), Reporter(tmp_path)
    with pytest.raises(Killed):
        measured.method.run(job(first))
    first.close()
    params = measured.method.run(job(second))
    second.close()
    jax.tree.map(np.testing.assert_array_equal, params, trained)
    assert list(first.heard) == [20, 40] and list(second.heard) == [40, 60] and first.heard[40] == second.heard[40]
    lines = [line for line in read_metrics(tmp_path) if line["kind"] == "eval"]
    assert [line["step"] for line in lines] == [20, 40, 60]
    now = flat([measure(task, SAMPLED.counted, resamples=1) for task in answers(SAMPLED)])
    assert {name: lines[-1][name] for name in now} == now
    assert now.keys() >= {"accuracy/copying", "pass_at_2/maximum"} and "loss/copying" in lines[-1]


@pytest.mark.parametrize("generation", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_answers_do_not_depend_on_slots_other_tasks_or_more_records(generation, answers):
    alone, together = (answers(dataclasses.replace(generation, slots=slots)) for slots in (1, 32))
    assert said(alone) == said(together)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.scores, other.scores)
    fewer = answers(dataclasses.replace(generation, slots=1, tasks=("maximum",), records=3))
    assert said(fewer) == [said(alone)[1][:3]]
    texts = {text for group in said(alone)[1] for text, _ in group}
    assert len(texts) > 3, "a model that says one thing would prove nothing"


def test_greedy_answers_are_right_where_teacher_forcing_finds_every_token_right(trained, answers):
    _, model, job = opened(config())
    answered = answers(GREEDY)
    items = score_items(model, trained, job().held_out())
    metrics = item_metrics(items, ("copying", "maximum"))
    of_record = {(t, r): c == n for t, r, _, n, c in zip(*items, strict=True)}
    found = []
    for task in answered:
        for prompt, (completion,), (score,) in zip(task.asked.prompts, task.completions, task.scores, strict=True):
            exact = completion.tokens.tolist() == prompt.answer.tolist()
            assert exact == of_record[prompt.task_id, prompt.record_id] == (score == 1)
            found.append(exact)
        assert measure(task, (), resamples=1).accuracy.mean == metrics[f"exact_match/{task.asked.task}"]
    assert len(found) == 32 and 0 < sum(found) < 32, "some right, some wrong, or nothing is compared"


def by_hand(lines, num_samples):
    """The metrics of one task from its lines: pass@2 and majority@2 by going through all pairs."""
    groups = [list(group) for _, group in itertools.groupby(lines, key=lambda line: line["record"])]
    assert all([line["sample"] for line in group] == list(range(num_samples)) for group in groups)
    passed, majority, claims = [], [], []
    for group in groups:
        pairs = list(itertools.combinations(group, 2))
        passed.append(np.mean([max(line["score"] == 1 for line in pair) for pair in pairs]))
        majority.append(np.mean([vote(pair)[1] for pair in pairs]))
        claims.append(vote(group))
    bins = {}
    for sure, right in claims:
        bins.setdefault(min(int(10 * sure), 9), []).append(sure - right)
    return {
        "accuracy": np.mean([line["score"] == 1 for line in lines]),
        "score": np.mean([line["score"] for line in lines]),
        "pass_at_1": np.mean([line["score"] == 1 for line in lines]),
        "pass_at_2": np.mean(passed),
        "majority_at_1": np.mean([line["score"] for line in lines]),
        "majority_at_2": np.mean(majority),
        "cut_off": np.mean([line["finish_reason"] == "length" for line in lines]),
        "completion_tokens": np.mean([len(line["tokens"]) for line in lines]),
        "calibration_error": sum(abs(sum(gaps)) for gaps in bins.values()) / len(claims),
        "brier": np.mean([(sure - right) ** 2 for sure, right in claims]),
    }


def vote(group):
    """Share of the most frequent answer, and its score; ties are shared."""
    counts = Counter(line["answer"] for line in group if line["answer"] is not None)
    most = max(counts.values(), default=0)
    scores = {line["answer"]: line["score"] for line in group}
    return most / len(group), np.mean([scores[a] for a, n in counts.items() if n == most]) if most else 0.0


@pytest.fixture(scope="module")
def written(trained, tmp_path_factory):
    """A checkpoint that was evaluated, and what that left."""
    folder, out = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("out")
    wanted = config(dataclasses.replace(SAMPLED, records=None))
    save(folder, Model(wanted.model), trained, tokenizer=byte_tokenizer())
    return folder, out, generate_checkpoint(folder, wanted, out=out)


def test_what_is_reported_is_what_the_file_of_samples_says(written):
    _, out, found = written
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    numbers = flat(found.tasks)
    for task in ("copying", "maximum"):
        mine = [line for line in lines if line["task"] == task]
        assert len(mine) == 16 * 4 and mine[0]["prompt"].endswith("=") and mine[5]["place"].endswith("item 1")
        for name, value in by_hand(mine, 4).items():
            assert numbers[f"{name}/{task}"] == pytest.approx(value, abs=1e-12), name
        for line in mine:
            right = exercise(task, line["record"])["completion"]
            assert line["score"] == (line["completion"].strip() == right.strip())
            assert byte_tokenizer().decode(line["tokens"], skip_special_tokens=True) == line["completion"]
            assert (line["finish_reason"] == "stop") == (line["tokens"][-1] == byte_tokenizer().eos_token_id)
    assert 0 < numbers["accuracy/maximum"] < 1 and 0 < numbers["accuracy/copying"] < 1, "numbers tell things apart"
    assert found.accuracy.mean == pytest.approx(np.mean([line["score"] == 1 for line in lines]))


def exercise(generator, index):
    (task,) = (task for task in TASKS if task.name == generator)
    return Exercises(task.test)[index]


def test_the_json_the_table_and_the_page_say_the_same(written):
    folder, out, found = written
    value = json.loads((out / "evaluation.json").read_text())
    assert value == json.loads(json.dumps(found.value)) and value["model"] == str(folder)
    mine = value["tasks"]["maximum"]
    assert mine["accuracy"]["low"] < mine["accuracy"]["mean"] < mine["accuracy"]["high"]
    assert mine["verifier"] == "ProceduralMatch(where='whole')" and mine["pass_at"].keys() == {"1", "2"}
    assert "most frequent answer" in mine["confidence_means"] and len(mine["calibration"]["bins"]) == 10
    shown = f"{100 * mine['accuracy']['mean']:.1f}"
    (row,) = (line for line in answers_table(found).splitlines() if line.startswith("maximum"))
    page = (out / "report.html").read_text()
    assert shown in row and shown in page and page.count("<svg") == 2 and "nan" not in page
    assert "maximum of seed 1 item 0" in page and from_json(value["generation"]).sampling == SAMPLED.sampling


def test_with_one_sample_confidence_is_the_likelihood_of_its_tokens(answers):
    (copying, _) = answers(GREEDY)
    found = measure(copying, (), resamples=10)
    sure = np.array([np.exp(c.raw_log_probs.astype(np.float64).mean()) for (c,) in copying.completions])
    brier = np.mean((sure - copying.scores[:, 0]) ** 2)
    assert found.confidence == "likelihood" and not found.pass_at and not found.majority_at
    assert found.calibration.brier.mean == pytest.approx(brier)


def test_a_verifier_that_reads_no_answer_has_no_vote(answers):
    generation = dataclasses.replace(SAMPLED, verifiers={"copying": Length()}, tasks=("copying",))
    (copying,) = answers(generation)
    found = measure(copying, (2,), resamples=10)
    assert not found.majority_at and found.pass_at[2].mean >= found.accuracy.mean and found.confidence == "likelihood"


@dataclasses.dataclass(frozen=True)
class Length:
    """Part marks for length."""

    def __call__(self, text, record):
        return min(1.0, len(text) / 3)


def test_a_page_shows_hostile_text_as_text(answers, tmp_path):
    (copying, _) = answers(GREEDY)
    hostile = "<script>alert(1)</script>"
    tokens = np.array(byte_tokenizer().encode(hostile), np.int32)
    prompts = [prompt._replace(tokens=tokens, answer=tokens) for prompt in copying.asked.prompts]
    asked = copying.asked._replace(task=hostile, prompts=prompts, places=[hostile] * len(prompts))
    says = [[completion._replace(text=hostile)] for (completion,) in copying.completions]
    answered = copying._replace(asked=asked, completions=says, answers=[[hostile]] * len(prompts))
    measured = [measure(answered, (), resamples=10)]
    page = write_answers_page(
        tmp_path / "page.html", hostile, {hostile: hostile}, measured, [answered], byte_tokenizer()
    )
    assert "&lt;script&gt;alert(1)" in page.read_text() and "<script" not in page.read_text()


ASKS = Rows(records=({"prompt": "1+1=", "completion": " two"}, {"prompt": "a" * 20, "completion": " 3"}))
BAD = [
    (lambda: Generation(sampling=Sampling(num_samples=4), ks=(1, 8)), "between 1 and the 4 samples"),
    (lambda: Generation(ks=(2,)), "between 1 and the 1 samples of a record, got .2,.: draw more samples"),
    (lambda: Generation(sampling=Sampling(num_samples=4, temperature=0.0)), "4 samples at temperature 0 are 4 times"),
    (lambda: Generation(records=0), "records must be at least 1, got 0"),
    (lambda: Generation(slots=0), "slots must be at least 1, got 0"),
    (lambda: Generation(verifiers={"a": ExactMatch}), "the verifier of 'a' must be called with a text"),
    (lambda: config(Generation(tasks=("sums",))), r"the tasks \['sums'\]; there are copying, maximum"),
    (lambda: config(Generation(verifiers={"sums": ExactMatch()})), r"the tasks \['sums'\]; there are copying"),
    (lambda: judged_by(config(GREEDY), ["NumericMach"]), "no verifier 'NumericMach'; did you mean NumericMatch"),
    (lambda: judged_by(config(GREEDY), ["sums=NumericMatch"]), r"the tasks \['sums'\]; there are copying"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_a_mistake_in_the_options_is_told_when_the_config_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


TWO = Rows(records=({"prompt": "1+0=", "completion": " 1"}, {"prompt": "1+1=", "completion": " two"}))
BAD_RECORDS = [
    (ASKS, {}, r"given record 1: a prompt of 20 tokens and max_tokens 16 exceed the 32 tokens of the model"),
    (TWO, {"sums": NumericMatch()}, r"given record 1: .*two"),
    (Rows(records=({"text": "once upon"},)), {}, "given record 0: a text asks nothing; name the tasks that do"),
    (ProceduralPairs(generator="copying", size=2, options={"length": 1}), {}, "item 0: the record has no 'answer'"),
    (None, {}, "task 'sums' has no held-out records to ask"),
]


@pytest.mark.parametrize(("source", "verifiers", "message"), BAD_RECORDS)
def test_a_record_that_cannot_be_asked_is_told_before_a_token_is_sampled(source, verifiers, message):
    generation = Generation(sampling=Sampling(max_tokens=16), tasks=("sums",), verifiers=verifiers)
    tasks = (TASKS[0], Task(name="sums", train=ASKS, test=source))
    _, rows = open_data(config(tasks=tasks), byte_tokenizer())
    with pytest.raises(ValueError, match=message):
        answerer(config(generation, tasks=tasks), Model(config().model), rows)


def test_a_config_with_generation_is_stored_and_overridden():
    whole = config(dataclasses.replace(SAMPLED, verifiers={"copying": NumericMatch(relative=0.1)}))
    assert from_json(json.loads(json.dumps(to_json(whole)))) == whole
    said = ["generation=Generation", "generation.sampling.max_tokens=3"]
    greedy = override(config(), said).generation
    assert greedy == Generation(sampling=Sampling(max_tokens=3, temperature=0.0)), "what is not said is its default"
    assert override(whole, said).generation.sampling == dataclasses.replace(SAMPLED.sampling, max_tokens=3)
