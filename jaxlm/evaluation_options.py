# SPDX-License-Identifier: Apache-2.0
"""How held-out records are answered and judged; no jax, so that configs load at once."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlm.generate.engine import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """Evaluation by generation: each held-out record's last answer is left to the model, and a verifier judges it.

    Attributes:
      sampling: how tokens are drawn; several samples of a record need a temperature above 0.
      ks: of pass@k and majority@k, each at most `sampling.num_samples`; (): that number itself.
      tasks: which to ask; (): all that have a test source.
      records: of each task, its first ones; None: all.
      verifiers: task -> `(text, record) -> score in [0, 1]`, a dataclass of `jaxlm.rewards`; a task without one has the
        scorer that its generator brings, or else NormalisedMatch(style="plain").
      slots: samples that are decoded at once; they change the speed, never an answer.

    >>> Generation(sampling=Sampling(num_samples=4), ks=(1, 8))
    Traceback (most recent call last):
    ValueError: ks must lie between 1 and the 4 samples of a record, got (1, 8): draw more samples (num_samples)
    """

    sampling: Sampling = Sampling(temperature=0.0)
    ks: tuple[int, ...] = ()
    tasks: tuple[str, ...] = ()
    records: int | None = None
    verifiers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    slots: int = 16

    def __post_init__(self):
        n = self.sampling.num_samples
        if self.sampling.temperature == 0 and n > 1:
            raise ValueError(f"{n} samples at temperature 0 are {n} times the same one: set temperature or num_samples")
        if not all(1 <= k <= n for k in self.ks):
            raise ValueError(
                f"ks must lie between 1 and the {n} samples of a record, got {self.ks}: draw more samples (num_samples)"
            )
        for name in ("records", "slots"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for task, verifier in self.verifiers.items():
            if not callable(verifier) or isinstance(verifier, type):
                raise ValueError(
                    f"the verifier of {task!r} must be called with a text and its record, such as NumericMatch(), got "
                    f"{verifier!r}"
                )

    @property
    def counted(self) -> tuple[int, ...]:
        """The ks that are reported, ascending; none for a single sample, whose pass@1 is its accuracy."""
        n = self.sampling.num_samples
        return tuple(sorted(set(self.ks or (n,)))) if n > 1 else ()

    def check_tasks(self, names: Sequence[str]) -> None:
        """Raises ValueError for a task that is not among these names."""
        if unknown := sorted({*self.tasks, *self.verifiers} - set(names)):
            raise ValueError(f"generation names the tasks {unknown}; there are {', '.join(names)}")
