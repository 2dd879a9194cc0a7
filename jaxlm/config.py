# SPDX-License-Identifier: Apache-2.0
"""What one run is: model, tokenizer, data, method, numbers of the run, mesh; and how a config file becomes one.

A config file is Python with a function `get_config() -> RunConfig`. Importing this module does not import jax.
"""

import dataclasses
import importlib
import importlib.util
import json
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from jaxlm.data.config import DataConfig, Source
from jaxlm.evaluation_options import Generation
from jaxlm.generate.engine import Sampling
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.position_kinds import Positions, Rope
from jaxlm.overrides import field_types, override
from jaxlm.train.options import MeshOptions, RunOptions

# What may differ between a stored config and the one that resumes its run: where and how long, never what is learnt.
MAY_CHANGE = (
    "generation",
    "mesh",
    "prepared",
    "run.bad_checkpoint",
    "run.compile_cache",
    "run.directory",
    "run.evaluate_every",
    "run.keep_best",
    "run.keep_last",
    "run.log_every",
    "run.micro_batches",
    "run.peak_tflops",
    "run.profile",
    "run.save_every",
    "run.save_retries",
    "run.step_timeout",
    "run.steps",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A model to start from, and how to compute it; its other numbers stand in the checkpoint."""

    path: str  # a Hugging Face folder or a .gguf file
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters stay float32
    remat: Literal["none", "full", "dots"] = "none"
    attention: Literal["auto", "xla", "cudnn", "tiled", "pallas"] = "auto"
    max_length: int | None = None  # tokens; None: what the checkpoint says
    positions: Positions | None = None  # None: the checkpoint's; another kind makes another function, to be trained on

    def overrides(self) -> dict[str, Any]:
        """The ModelConfig fields that this sets: keyword arguments of `jaxlm.checkpoints.load`."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "path"}
        return {name: value for name, value in fields.items() if value is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run.

    Attributes:
      model: a ModelConfig starts from random parameters, a Pretrained from a checkpoint.
      tokenizer: "bytes", a folder or .gguf file, or "" for the one that comes with a pretrained model.
      data: the tasks and how their records become rows.
      prepared: a folder that `scripts/prepare.py` wrote for `data`; "" prepares from the sources.
      method: a dataclass of `jaxlm.methods`, such as `Sft()`.
      run: steps, batch, directory, how often to log, evaluate and save.
      mesh: devices along each mesh axis.
      generation: held-out records are also answered, and the answers judged, whenever they are scored; None: they are
        not, and scripts/evaluate.py --generate can do it later.
    """

    model: ModelConfig | Pretrained
    tokenizer: str = ""
    data: DataConfig
    prepared: str = ""
    method: Any
    run: RunOptions
    mesh: MeshOptions = MeshOptions()
    generation: Generation | None = None

    def __post_init__(self):
        if self.generation is not None:
            self.generation.check_tasks(self.data.task_names)
        if not self.tokenizer and isinstance(self.model, ModelConfig):
            raise ValueError('a model made from random numbers brings no tokenizer: set tokenizer="bytes" or a folder')


ALONE = "alone"  # the arm of a task's specialist is "alone/<task>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Arms that differ in their method alone.

    Every arm is trained once at each learning rate with the first seed; the rate with the best mean final accuracy on
    one half of the held-out records is kept, all seeds are trained at it, and the other half is what is reported.

    Attributes:
      base: a run whose finished model all arms start from; None: they start from `run.model`.
      run: what the arms share: data, steps, batch, mesh; its `run.directory` is the comparison's. Its method, SFT, is
        that of the specialists, who learn one task alone in the updates that a stage has.
      arms: name -> method.
      learning_rates: at least three, so that the best can lie inside.
      scale: arm -> what its rates are multiplied by; adapters want larger ones.
      seeds: of data order; at least two.
      plain: the arm without any isolation, which the others are compared with.
      controls: arm -> the arm of equal size and schedule that it must beat.
      joint: the arm that trains on all tasks at once, or "".
    """

    base: RunConfig | None = None
    run: RunConfig
    arms: Mapping[str, Any]
    learning_rates: tuple[float, ...]
    scale: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...]
    plain: str
    controls: Mapping[str, str] = dataclasses.field(default_factory=dict)
    joint: str = ""

    def __post_init__(self):
        _check_trials(self.learning_rates, self.seeds, self.run)
        named = {self.plain, *self.controls, *self.controls.values(), *self.scale} | ({self.joint} - {""})
        if unknown := sorted(named - set(self.arms)):
            raise ValueError(f"no arm {unknown}; there are {', '.join(self.arms)}")

    @property
    def directory(self) -> Path:
        """Where it lives."""
        return Path(self.run.run.directory)

    @property
    def trained(self) -> list[str]:
        """The tasks that the arms are trained on."""
        return [task.name for task in self.run.data.tasks if task.train is not None]

    def methods(self) -> dict[str, Any]:
        """All arms, the specialists among them."""
        return {**self.arms, **{f"{ALONE}/{task}": self.run.method for task in self.trained}}

    def rates(self, arm: str) -> list[float]:
        """The learning rates that an arm chooses from."""
        return [rate * self.scale.get(arm, 1.0) for rate in self.learning_rates]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthComparison:
    """Arms that differ in their model: trained on rows of one length, tested on longer ones.

    Every arm is trained once at each learning rate with the first seed; the rate with the lowest held-out loss at the
    training length is kept, and all seeds are trained at it. They are tested on another text.

    Attributes:
      run: what the arms share: data, steps, batch, mesh. Its `data.length` is the training length, its test sources are
        what rates are chosen on, its `run.directory` is the comparison's, and its model is the plain arm's.
      arms: name -> model.
      yarn: name -> the arm whose trained weights it uses, its rotation scaled by YaRN to each test length.
      learning_rates: at least three, so that the best can lie inside.
      seeds: of parameters and data order; at least two.
      plain: the arm that the others are compared with.
      text: what is tested on.
      lengths: tokens of the windows, from the training length upwards.
      tokens: of the text that are predicted, the same ones at every length, which must divide it.
      tail: the last predictions of each window, which are also scored alone: they have all of its past.
      looked_at: the length at which attention is looked at.
    """

    run: RunConfig
    arms: Mapping[str, ModelConfig]
    yarn: Mapping[str, str] = dataclasses.field(default_factory=dict)
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    plain: str
    text: Source
    lengths: tuple[int, ...]
    tokens: int
    tail: int = 128
    looked_at: int = 4096

    def __post_init__(self):
        _check_trials(self.learning_rates, self.seeds, self.run)
        if unknown := sorted({self.plain, *self.yarn.values()} - set(self.arms)):
            raise ValueError(f"no arm {unknown}; there are {', '.join(self.arms)}")
        for name, base in self.yarn.items():
            if not isinstance(self.arms[base].positions, Rope):
                raise ValueError(f"{name!r} scales the rotation of Rope, arm {base!r} has {self.arms[base].positions}")
        if self.lengths[:1] != (self.run.data.length,) or sorted(set(self.lengths)) != list(self.lengths):
            raise ValueError(f"lengths grow from the training length {self.run.data.length}, got {self.lengths}")
        if wrong := [length for length in (*self.lengths, self.looked_at) if self.tokens % length]:
            raise ValueError(f"tokens {self.tokens} must be a multiple of every length, not so of {wrong}")
        if not 0 < self.tail <= self.lengths[0]:
            raise ValueError(f"tail must be in [1, {self.lengths[0]}], the shortest window, got {self.tail}")

    @property
    def directory(self) -> Path:
        """Where it lives."""
        return Path(self.run.run.directory)

    @property
    def tested(self) -> tuple[str, ...]:
        """All arms in the order of the tables: those that are only tested come after those whose weights they use."""
        order = []
        for name in self.arms:
            order += [name, *(other for other, base in self.yarn.items() if base == name)]
        return tuple(order)

    def rates(self, arm: str) -> list[float]:
        """The learning rates that an arm chooses from."""
        return list(self.learning_rates)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanComparison:
    """Arms that differ in what they do with a plan, judged by what they answer.

    Every arm is trained once at each learning rate with the first seed; the rate whose answers to `chosen_on` are right
    most often is kept, and all seeds are trained at it.

    Attributes:
      run: what the arms share: data, steps, batch, mesh; its `run.directory` is the comparison's.
      arms: name -> `RCapsule(...)`.
      follows: arm -> the arm whose rate it takes, without choosing one: sweeps and controls.
      learns_from: arm -> the records that it trains on in place of those of `run`, which then has one task: another
        text for the same questions.
      learning_rates: at least three, so that the best can lie inside.
      seeds: of data order and new parameters; at least two.
      plain: the arm that the others are compared with: steps and answer as text.
      chosen_on: questions that rates are chosen on.
      tests: split -> questions that are reported.
      sampling: how answers are drawn.
      slots: of the sampler, and how many capsules are exchanged among each other.
    """

    run: RunConfig
    arms: Mapping[str, Any]
    follows: Mapping[str, str] = dataclasses.field(default_factory=dict)
    learns_from: Mapping[str, Source] = dataclasses.field(default_factory=dict)
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    plain: str
    chosen_on: Source
    tests: Mapping[str, Source]
    sampling: Sampling = Sampling(temperature=0.0, max_tokens=64)
    slots: int = 64

    def __post_init__(self):
        _check_trials(self.learning_rates, self.seeds, self.run)
        named = {self.plain, *self.follows, *self.follows.values(), *self.learns_from}
        if unknown := sorted(named - set(self.arms)):
            raise ValueError(f"no arm {unknown}; there are {', '.join(self.arms)}")
        if chains := sorted(set(self.follows.values()) & set(self.follows)):
            raise ValueError(f"{chains} are followed and follow others themselves: let them choose a rate")
        if self.learns_from and len(self.run.data.tasks) != 1:
            names = ", ".join(self.run.data.task_names)
            raise ValueError(f"learns_from replaces the records of one task, and run.data has {names}")
        if self.slots < 2:
            raise ValueError(f"slots must be at least 2, got {self.slots}: capsules are exchanged among them")

    def data_of(self, arm: str) -> DataConfig:
        """What an arm learns from."""
        data = self.run.data
        if arm not in self.learns_from:
            return data
        return dataclasses.replace(data, tasks=(dataclasses.replace(data.tasks[0], train=self.learns_from[arm]),))

    @property
    def directory(self) -> Path:
        """Where it lives."""
        return Path(self.run.run.directory)


def _check_trials(rates: tuple[float, ...], seeds: tuple[int, ...], run: RunConfig) -> None:
    """Raises ValueError where nothing could be chosen or no noise be seen, or there is no place for it."""
    if len(rates) < 3:
        raise ValueError(f"give at least three learning rates to choose from, got {rates}")
    if len(seeds) < 2:
        raise ValueError(f"give at least two seeds, got {seeds}: with one, intervals cover items only")
    if not run.run.directory:
        raise ValueError("a comparison needs a directory: set run.directory")


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """The config that a config file returns, or that a run directory stored, with overrides such as `run.steps=200`.

    Raises: ValueError that names the file, and the line where it is the file's own mistake.
    """
    path = Path(path)
    config = read_config(path) if path.is_dir() else _run_file(path, RunConfig)
    return override(config, overrides)


AnyComparison = Comparison | LengthComparison | PlanComparison


def load_comparison(path: str | Path, overrides: Iterable[str] = ()) -> AnyComparison:
    """The comparison that a config file returns, with overrides such as `run.run.steps=200`.

    Raises: as `load_config`.
    """
    return override(_run_file(Path(path), Comparison, LengthComparison, PlanComparison), overrides)


def _run_file(path: Path, *kinds: type) -> Any:
    function = {RunConfig: "get_config", Comparison: "get_comparison"}[kinds[0]]
    wanted = " or ".join(kind.__name__ for kind in kinds)
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise ValueError(f"there is no config file {path}" + (f"; {path.parent} has {', '.join(near)}" if near else ""))
    name = f"jaxlm_config_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if path.suffix != ".py" or spec is None or spec.loader is None:
        raise ValueError(f"a config file is Python, with a function {function}() -> {wanted}; got {path}")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, function):
            raise ValueError(f"{path} has no function {function}() -> {wanted}")
        config = getattr(module, function)()
    except SyntaxError as error:
        raise ValueError(f"{path}, line {error.lineno}: {error.msg}") from error
    except (TypeError, NameError, AttributeError) as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path]
        raise ValueError(f"{path}, line {lines[-1] if lines else '?'}: {error}") from error
    if not isinstance(config, kinds):
        raise ValueError(f"{function}() of {path} must return a {wanted}, got {type(config).__name__}")
    return config


def to_json(config: Any) -> Any:
    """A config as JSON values; every dataclass carries the name of its class under "class"."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        cls = type(config)
        fields = {name: to_json(getattr(config, name)) for name in field_types(cls)}
        return {"class": f"{cls.__module__}.{cls.__qualname__}"} | fields
    if isinstance(config, Mapping):
        return {str(key): to_json(value) for key, value in config.items()}
    if isinstance(config, tuple | list):
        return [to_json(value) for value in config]
    if config is None or isinstance(config, bool | int | float | str):
        return config
    raise ValueError(f"a config holds numbers, text, tuples and dataclasses, got {type(config).__name__}: {config!r}")


def from_json(value: Any) -> Any:
    """What `to_json` was given. Classes are looked up in `jaxlm` only; lists in their fields become tuples."""
    if isinstance(value, Mapping) and "class" in value:
        module, _, name = str(value["class"]).rpartition(".")
        if not module.startswith("jaxlm."):
            raise ValueError(f"this config uses {value['class']}, which is not part of jaxlm: give its config file")
        cls = getattr(importlib.import_module(module), name)
        fields = {key: _frozen(from_json(inner)) for key, inner in value.items() if key != "class"}
        if unknown := set(fields) - set(field_types(cls)):
            raise ValueError(f"{name} has no field {sorted(unknown)[0]!r}: written by another version of jaxlm")
        return cls(**fields)
    if isinstance(value, Mapping):
        return {key: from_json(inner) for key, inner in value.items()}
    return [from_json(inner) for inner in value] if isinstance(value, list) else value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def write_config(directory: str | Path, config: RunConfig) -> Path:
    """Stores the config as `config.json` in a run directory, in one piece or not at all."""
    path = Path(directory) / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(to_json(config), indent=1) + "\n")
    return part.replace(path)


def read_config(directory: str | Path) -> RunConfig:
    """The config of a run directory."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} is no run directory: it has no config.json")
    config = from_json(json.loads(path.read_text()))
    if not isinstance(config, RunConfig):
        raise ValueError(f"{path} is not the config of a run")
    return config


def claim_directory(config: RunConfig, *, write: bool = True) -> None:
    """Makes the run's directory and stores the config in it, or checks that the run stored there is the same one.

    Args:
      config: with a `run.directory`.
      write: False on all processes but the first, which only check.
    Raises: ValueError if the directory holds a run of another config.
    """
    directory = Path(config.run.directory)
    if (directory / "config.json").is_file():
        check_resumable(read_config(directory), config)
    if write:
        write_config(directory, config)


def flat(config: Any) -> dict[str, Any]:
    """The config as `{"run.steps": 100, ...}`; a class stands at `<path>.class`, without its module."""

    def walk(value: Any, path: str):
        if isinstance(value, Mapping | list) and value:
            for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
                short = str(inner).rpartition(".")[2] if key == "class" else inner
                yield from walk(short, f"{path}.{key}" if path else str(key))
        else:
            yield path, value

    return dict(walk(to_json(config), ""))


def diff(before: Any, after: Any) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configs differ: `{path: (before, after)}`, None where one has no such field."""
    a, b = flat(before), flat(after)
    return {path: (a.get(path), b.get(path)) for path in a | b if path not in a or path not in b or a[path] != b[path]}


def check_resumable(stored: RunConfig, config: RunConfig) -> None:
    """Refuses to go on with a run under another config; the fields of MAY_CHANGE may differ.

    A method that divides `run.steps` among stages (it has `total_steps`) cannot be made longer: its stages would be
    others.
    """
    if hasattr(config.method, "total_steps") and stored.run.steps != config.run.steps:
        raise ValueError(
            f"run.steps was {stored.run.steps} and is now {config.run.steps}: {type(config.method).__name__} divides "
            "them among its stages, and those in the directory are of another length; use another directory"
        )
    changed = {
        p: v for p, v in diff(stored, config).items() if not any((p + ".").startswith(m + ".") for m in MAY_CHANGE)
    }
    if changed:
        what = "; ".join(f"{path} was {old!r} and is now {new!r}" for path, (old, new) in changed.items())
        raise ValueError(f"{config.run.directory} holds a run of another config: {what}. Choose another run.directory")
