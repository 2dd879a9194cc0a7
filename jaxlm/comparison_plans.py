# SPDX-License-Identifier: Apache-2.0
"""Ways to use a plan beside each other: answer only, steps, a plan as text, in a capsule; judged by what they answer.

A comparison lives in a directory and goes on where it was stopped: runs/<arm>/<rate>-<seed>/ holds one training run,
its `answers.npz` and, when it is finished, `result.json`.

Q questions, K capsule tokens, d capsule width.
"""

import dataclasses
import functools
import io
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.comparison import at_rate, begin, finish, run_directory
from jaxlm.config import PlanComparison
from jaxlm.data.config import Source
from jaxlm.data.sources import open_source
from jaxlm.generate.capsules import CapsuleModel
from jaxlm.generate.engine import Sampling
from jaxlm.generate.sampler import Sampler
from jaxlm.losses.capsule import reconstruction_terms
from jaxlm.methods.plan_batches import PlanEncoder, assemble
from jaxlm.methods.r_capsule import RCapsule, capsule_pass
from jaxlm.nn.decoder import Model, Params
from jaxlm.nn.plan_decoder import plan_hidden
from jaxlm.rewards.planned import PlannedAnswer
from jaxlm.run import load_model, load_tokenizer, make_job, open_data
from jaxlm.train.mesh import check_rows, make_mesh
from jaxlm.train.reporter import RunReporter
from jaxlm.train.scores import Scores


class Judged(NamedTuple):
    """What an arm's answers to one split's questions are worth.

    Attributes:
      correct: [Q] float32, 1.0 where the verifier says so.
      shuffled, mean: [Q], the same with every question's capsule exchanged for another one's, or for the mean of all;
        NaN without a capsule.
      tokens: [Q], generated for the answer, capsule tokens counted.
      visible: [Q], those of them that are text.
    """

    correct: np.ndarray
    shuffled: np.ndarray
    mean: np.ndarray
    tokens: np.ndarray
    visible: np.ndarray


def compare_plans(comparison: PlanComparison, *, part: tuple[int, int] = (0, 1)) -> None:
    """Trains and judges whatever is not finished yet.

    Arms that choose a rate try them all with the first seed; those that follow another arm take its. Then seed by seed.

    Args:
      part: (i, n): only every n-th arm from the i-th; an arm that follows one of another part needs that.
    """
    shared = _Shared(comparison)
    arms = sorted(list(comparison.arms)[part[0] :: part[1]], key=lambda arm: arm in comparison.follows)
    for arm in arms:
        for rate in () if arm in comparison.follows else comparison.learning_rates:
            shared.train(arm, rate, comparison.seeds[0])
    for seed in comparison.seeds:
        for arm in arms:
            shared.train(arm, best_plan_rate(comparison, arm), seed)


def best_plan_rate(comparison: PlanComparison, arm: str) -> float:
    """The rate whose run with the first seed answers most of the questions that rates are chosen on.

    Raises: ValueError if a rate has not been tried yet.
    """
    found = {}
    leader = comparison.follows.get(arm, arm)
    for rate in comparison.learning_rates:
        result = run_directory(comparison, leader, rate, comparison.seeds[0]) / "result.json"
        if not result.is_file():
            raise ValueError(f"arm {leader!r} has not been trained at {rate:g} yet: run the comparison to its end")
        found[rate] = json.loads(result.read_text())["accuracy/chosen_on"]
    return max(found, key=lambda rate: (found[rate], -rate))


class _Shared:
    """What all runs use: devices, rows, the model they start from, the questions."""

    def __init__(self, comparison: PlanComparison):
        self.comparison, self.config = comparison, comparison.run
        self.mesh = make_mesh(self.config.mesh)
        check_rows(self.mesh, self.config.run.batch_size, self.config.run.micro_batches)
        tokenizer = load_tokenizer(self.config)
        configs = {arm: dataclasses.replace(self.config, data=comparison.data_of(arm)) for arm in comparison.arms}
        self.rows = {arm: open_data(config, tokenizer) for arm, config in configs.items()}
        vocabulary = self.rows[comparison.plain][0].vocab_size
        self.model, self.params = load_model(self.config, self.mesh, vocabulary=vocabulary)
        splits = {"chosen_on": comparison.chosen_on, **comparison.tests}
        self.questions = {name: questions_of(source) for name, source in splits.items()}

    def train(self, arm: str, rate: float, seed: int) -> None:
        """One run, if it is not there yet."""
        directory = run_directory(self.comparison, arm, rate, seed)
        options = dataclasses.replace(self.config.run, seed=seed, directory="")
        method = at_rate(self.comparison.arms[arm], rate)
        config = dataclasses.replace(self.config, data=self.comparison.data_of(arm), method=method, run=options)
        if not begin(directory, config):
            return
        reporter = RunReporter(directory, options.steps, stream=io.StringIO())
        scores = Scores(None, config.data.task_names)
        job = make_job(config, self.mesh, self.model, self.params, *self.rows[arm], reporter, scores)
        params = method.run(job)
        reporter.close()
        numbers, answers = self.judge(method, params)
        np.savez(directory / "answers.npz", **answers)  # type: ignore[arg-type]
        result = finish(directory, **numbers)
        told = ", ".join(f"{name} {value:.3f}" for name, value in numbers.items() if name.startswith("accuracy/"))
        print(f"{arm} at {rate:g}, seed {seed}: {told}; {result['seconds']:.0f} s", flush=True)

    def judge(self, method: RCapsule, params: Params) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Numbers of every split, and what lies under them."""
        tokenizer = load_tokenizer(self.config)
        model, _, _ = method.exported(Model(self.model.config), params, tokenizer)
        speaker = method.speaker(model, params, tokenizer)
        slots, sampling = self.comparison.slots, self.comparison.sampling
        sampler = Sampler(speaker, params, tokenizer, slots=slots)
        numbers: dict[str, float] = {}
        answers: dict[str, np.ndarray] = {}
        for split, records in self.questions.items():
            found = judged(sampler, method, records, sampling)
            answers |= {f"{split}/{name}": x for name, x in found._asdict().items()}
            numbers |= {f"{name}/{split}": float(np.mean(x)) for name, x in answers_of(found).items()}
            if method.has_decoder and method.keep_decoder and method.recon == "tokens":
                read = plan_scores(method, model, params, PlanEncoder(tokenizer, with_plans(method)), records)
                numbers |= {f"{name}/{split}": value for name, value in read.items()}
        numbers |= latencies(sampler, method, self.questions["chosen_on"], sampling)
        return numbers, answers


def questions_of(source: Source) -> list[Mapping[str, Any]]:
    """The records of a source."""
    return [record for _, record in open_source(source).records()]


def answers_of(found: Judged) -> dict[str, np.ndarray]:
    """What is reported of each split; what is not measured is left out."""
    return {
        "accuracy" if name == "correct" else name: x for name, x in found._asdict().items() if not np.isnan(x).any()
    }


def judged(sampler: Sampler, method: RCapsule, records: Sequence[Mapping[str, Any]], sampling: Sampling) -> Judged:
    """Answers of all records, as many at once as there are slots, so that capsules can be exchanged among them."""
    verifier, slots = PlannedAnswer(), sampler.num_slots
    prompts = [_prompt(method, record) for record in records]

    def answered(engine: Sampler) -> tuple[np.ndarray, np.ndarray]:
        groups = [engine.sample(prompts[i : i + slots], sampling) for i in range(0, len(prompts), slots)]
        said = [completion for group in groups for [completion] in group]
        right = [verifier(c.text, record) for c, record in zip(said, records, strict=True)]
        return np.array(right, np.float32), np.array([len(c.tokens) for c in said], np.float32)

    correct, visible = answered(sampler)
    controls = {name: np.full_like(correct, np.nan) for name in ("shuffled", "mean")}
    speaker: Any = sampler.model
    if isinstance(speaker, CapsuleModel) and method.source != "pause":
        for name in controls:
            options: Any = {"given": name}
            other: Any = dataclasses.replace(speaker, **options)
            controls[name], _ = answered(
                Sampler(other, sampler.params, sampler.tokenizer, slots=slots, size=sampler.size)
            )
    return Judged(correct, **controls, tokens=visible + method.num_capsules, visible=visible)


def latencies(
    sampler: Sampler, method: RCapsule, records: Sequence[Mapping[str, Any]], sampling: Sampling
) -> dict[str, float]:
    """Seconds an answer, one at a time and with all slots full, after a first call that compiles."""
    prompts = [_prompt(method, record) for record in records][: sampler.num_slots]
    one = Sampler(sampler.model, sampler.params, sampler.tokenizer, slots=1, size=sampler.size)
    found = {}
    for name, engine, asked in (("seconds_alone", one, prompts[:1] * 4), ("seconds_full", sampler, prompts)):
        engine.sample(asked, sampling)
        start = time.perf_counter()
        engine.sample(asked, sampling)
        found[name] = (time.perf_counter() - start) / len(asked)
    return found


def with_plans(method: RCapsule) -> Any:
    """The method's layout, with plans in the batch whatever lambda is, and longer ones cut."""
    return dataclasses.replace(method.layout, plans=True, long_plans="truncate")


def plan_scores(
    method: RCapsule, model: Model, params: Params, encode: PlanEncoder, records: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """What the capsules of held-out questions say of their plans, teacher-forced.

    Returns: "plan_accuracy" (share of plan tokens), "plan_exact" (of whole plans), "plan_nll", "plan_nll_shuffled" with
      another question's capsule (nats a token), "plan_information" (their difference, nats a plan) and
      "effective_rank" (exponential of the entropy of the capsules' squared singular values).
    """
    layout = with_plans(method)
    rows = [[(0, i, encode(record, f"question {i}"))] for i, record in enumerate(records)]
    batch = assemble(rows, layout, encode.marks)
    batch.pop("record_ids")
    sums, capsules = _plan_scores(method, model, params, batch)
    own, other = ({name: float(term.total / term.weight) for name, term in terms.items()} for terms in sums)
    tokens = float(sums[0]["plan_nll"].weight) / len(records)
    flat = np.asarray(capsules, np.float64).reshape(-1, capsules.shape[-1])
    power = np.linalg.svd(flat - flat.mean(axis=0), compute_uv=False) ** 2
    share = power[power > 0] / power.sum()
    return {
        **{name: own[name] for name in ("plan_accuracy", "plan_exact", "plan_nll")},
        "plan_nll_shuffled": other["plan_nll"],
        "plan_information": tokens * (other["plan_nll"] - own["plan_nll"]),
        "effective_rank": float(np.exp(-np.sum(share * np.log(share)))),
    }


@functools.partial(jax.jit, static_argnums=(0, 1))
def _plan_scores(method: RCapsule, model: Model, params: Params, batch: Any) -> Any:
    """Terms with one's own capsule and with the next row's; the capsules [Q, K, d]."""
    _, capsule, _ = capsule_pass(model, params, batch, method.capsule)
    assert capsule is not None
    plan, mask = batch["plan_tokens"][:, 0], batch["plan_mask"][:, 0]

    def terms(capsule_QKd: jax.Array) -> Any:
        table = params["embed"]["table"]
        hidden = plan_hidden(params["plan_decoder"], capsule_QKd, plan, table, method.decoder)
        return reconstruction_terms(hidden, table, plan, mask, jnp.ones(len(plan)), recon_weight=1.0)

    return (terms(capsule[:, 0]), terms(jnp.roll(capsule[:, 0], 1, axis=0))), capsule[:, 0]


def _prompt(method: RCapsule, record: Mapping[str, Any]) -> Any:
    question = str(record["question"])
    return [{"role": "user", "content": question}] if method.prompts == "chat" else question
