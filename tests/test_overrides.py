# SPDX-License-Identifier: Apache-2.0
"""Laws of `a.b=c`: every field can be written as text, nothing unknown passes, nothing is evaluated."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.overrides import override


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    factor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
    final: float = 0.1
    cycles: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    name: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    fraction: float = 0.1
    schedule: Linear | Cosine | None = None
    kind: Literal["none", "full"] = "full"
    paths: tuple[str, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    limit: int | None = None
    on: bool = True
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    method: Any = Method()
    tasks: tuple[Task, ...] = (Task(name="a"), Task(name="b"))
    low: int = 1
    high: int = 2

    def __post_init__(self):
        if self.low >= self.high:
            raise ValueError("low must be below high")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("method.fraction=1e-3", 1e-3),
        ("method.kind=none", "none"),
        ("method.limit=7", 7),
        ("method.limit=none", None),
        ("method.on=false", False),
        ("method.on=True", True),
        ("method.paths=a,b", ("a", "b")),
        ("method.paths=", ()),
        ('method.paths=["x,y", "z"]', ("x,y", "z")),
        ("method.pair=3,0.5", (3, 0.5)),
        ("method.pair.1=0.25", (1, 0.25)),
        ("method.schedule=Cosine", Cosine()),
        ("method.schedule=none", None),
        ('method.options={"k": 2}', {"k": 2}),
        ("method.options.terms=3", {"terms": 3}),
        ("tasks.1.weight=2", (Task(name="a"), Task(name="b", weight=2.0))),
        ("tasks.0.name=x=y", (Task(name="x=y"), Task(name="b"))),
        ("high=1_000", 1000),
        ("high=1e4", 10_000),
    ],
)
def test_text_is_read_by_the_type_of_its_field(text, value):
    found: Any = override(Config(), [text])
    for name in text.partition("=")[0].split("."):
        if isinstance(found, tuple | Mapping):
            break
        found = getattr(found, name)
    assert found == value or found[1] == value
    assert type(found) is type(value) or isinstance(found, tuple)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method.fractoin=1", "Method has no field 'fractoin'; did you mean 'fraction'?"),
        ("fraction=1", "Config has no field 'fraction'"),
        ("method.fraction=much", "method.fraction must be float, got 'much'"),
        ("method.fraction=nan", "method.fraction must be float, got 'nan'"),
        ("method.kind=ful", "method.kind must be 'none' | 'full', got 'ful'; did you mean 'full'?"),
        ("method.limit=1.5", "method.limit must be int | None, got '1.5'"),
        ("method.on=maybe", "method.on must be bool, got 'maybe'"),
        ("method.schedule=Linear", "Linear needs factor: give method.schedule.factor=..."),
        ("method.schedule.factor=2", "choose method.schedule=Linear or method.schedule=Cosine first"),
        ("method.pair=1", "method.pair must be tuple of int"),
        ("method=epi", "method must be Any, got 'epi'"),
        ("tasks.2.weight=1", "tasks has the items 0 to 1, got '2'"),
        ("tasks.first.weight=1", "tasks has the items 0 to 1, got 'first'"),
        ("low.x=1", "low is 1, which has no field 'x'"),
        ("high", "an override looks like run.steps=100, got 'high'"),
        ("=3", "an override looks like run.steps=100, got '=3'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(text, message):
    with pytest.raises(ValueError) as error:
        override(Config(), [text])
    assert message in str(error.value)


def test_fields_that_check_each_other_change_together():
    assert override(Config(), ["low=5", "high=9"]) == Config(low=5, high=9)
    with pytest.raises(ValueError, match="low must be below high"):
        override(Config(), ["low=5"])


def test_a_class_is_chosen_with_its_fields():
    chosen = override(Config(), ["method.schedule.factor=3", "method.schedule=Linear"]).method.schedule
    assert chosen == Linear(factor=3.0)
    again = override(Config(method=Method(schedule=chosen)), ["method.schedule=Linear"]).method.schedule
    assert again == chosen, "naming the class that is already there keeps its numbers"
    assert override(
        Config(method=Method(schedule=Cosine(cycles=4))), ["method.schedule.final=0.5"]
    ).method.schedule == (Cosine(cycles=4, final=0.5))


def test_the_last_one_given_wins_and_the_original_stays():
    config = Config()
    assert override(config, ["high=3", "high=4"]).high == 4
    assert config == Config()


@given(st.text(max_size=20))
def test_text_is_never_evaluated(text):
    assert override(Task(name="a"), [f"name={text}"]).name == text


@given(st.one_of(st.none(), st.integers()), st.floats(allow_nan=False), st.lists(st.text()))
def test_what_a_field_prints_it_reads(limit, fraction, paths):
    texts = [f"limit={limit}", f"fraction={fraction}", f"paths={json.dumps(paths)}"]
    assert override(Method(), texts) == Method(limit=limit, fraction=fraction, paths=tuple(paths))


def test_every_option_of_a_real_run_reads_its_own_default():
    from jaxlm.nn import ModelConfig
    from jaxlm.train import AdamW, MeshOptions, RunOptions

    model = ModelConfig(vocab_size=8, width=8, num_layers=1, num_heads=1)
    for config in (model, RunOptions(steps=1), MeshOptions(), AdamW()):
        for name, value in vars(config).items():
            text = json.dumps(value) if isinstance(value, tuple) else value
            text = type(value).__name__ if dataclasses.is_dataclass(value) else text
            assert override(config, [f"{name}={text}"]) == config


def test_a_class_of_a_union_is_chosen_by_its_name_and_a_near_miss_is_told():
    from jaxlm.nn import Alibi, Hope, ModelConfig

    model = ModelConfig(vocab_size=8, width=8, num_layers=1, num_heads=1)
    assert override(model, ["positions=Alibi"]).positions == Alibi()
    assert override(model, ["positions=Hope", "positions.damping=per_pair"]).positions == Hope(damping="per_pair")
    with pytest.raises(ValueError, match="did you mean 'Hope'"):
        override(model, ["positions=hope"])
