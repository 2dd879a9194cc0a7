# SPDX-License-Identifier: Apache-2.0
"""What an arm of a comparison has cost, and the refusal to compare arms that have not cost the same."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """Tokens and floating-point operations of one arm, all its probes and stages together; budgets add up.

    Attributes:
      trained_tokens: tokens with a loss weight > 0.
      final_tokens: those of them in the runs that make the final model: what a user tunes; probes are not among them.
        None: all.
      processed_tokens: tokens of training that are not padding.
      generated_tokens: of rollouts, searches and judgements by the arm's own model.
      evaluated_tokens: of forward passes that choose or measure something and are part of the method.
      forward_flops: of one token, e.g. `model_flops(config, tokens=1, length=T, causal=False)`: attention counted in
        full, the embedding table left out.

    >>> probe = Budget(trained_tokens=10, final_tokens=0, processed_tokens=30, forward_flops=2.0)
    >>> whole = probe + Budget(trained_tokens=40, processed_tokens=120, forward_flops=2.0)
    >>> whole.trained_tokens, whole.final_tokens, whole.flops
    (50, 40, 900.0)
    """

    trained_tokens: int
    processed_tokens: int
    forward_flops: float = 0.0
    final_tokens: int | None = None
    generated_tokens: int = 0
    evaluated_tokens: int = 0

    def __post_init__(self):
        if self.final_tokens is None:
            object.__setattr__(self, "final_tokens", self.trained_tokens)
        if wrong := {name: value for name, value in dataclasses.asdict(self).items() if value < 0}:
            raise ValueError(f"a budget counts what was spent, got {wrong}")

    @property
    def flops(self) -> float:
        """Three forward passes a token of training, one a token that was generated or evaluated."""
        return self.forward_flops * (3.0 * self.processed_tokens + self.generated_tokens + self.evaluated_tokens)

    def __add__(self, other: "Budget") -> "Budget":
        if self.forward_flops != other.forward_flops:
            raise ValueError(
                f"budgets of models with {self.forward_flops:g} and {other.forward_flops:g} FLOPs a token do not add up"
            )
        mine, others = dataclasses.asdict(self), dataclasses.asdict(other)
        summed = {name: mine[name] + others[name] for name in mine if name != "forward_flops"}
        return Budget(forward_flops=self.forward_flops, **summed)


_UNITS = {
    "trained_tokens": ("trained", "the tokens"),
    "final_tokens": ("trained its final model on", "the tokens"),
    "processed_tokens": ("processed", "the tokens"),
    "flops": ("spent", "the FLOPs"),
}


def assert_equal_budget(
    budgets: Mapping[str, Budget],
    *,
    rel: float = 0.01,
    of: Literal["trained_tokens", "final_tokens", "processed_tokens", "flops"] = "trained_tokens",
) -> None:
    """Raises ValueError unless the largest budget is within `rel` of the smallest.

    Args:
      budgets: of each arm, by name.
      rel: how much more, as a share of the smallest.
      of: what is held equal. Print one table at equal `final_tokens`, what a user tunes, and one at equal `flops`,
        what a user pays.

    >>> one, two = Budget(trained_tokens=100, processed_tokens=100), Budget(trained_tokens=162, processed_tokens=162)
    >>> assert_equal_budget({"joint": one, "cpi_ft": two})
    Traceback (most recent call last):
      ...
    ValueError: cpi_ft trained 1.62 times the tokens of joint; give joint the extra steps or pass rel=
    """
    if of not in _UNITS:
        raise ValueError(f"budgets are equal in one of {', '.join(_UNITS)}, got {of!r}")
    spent = {name: float(getattr(budget, of)) for name, budget in budgets.items()}
    least, most = min(spent, key=spent.__getitem__), max(spent, key=spent.__getitem__)
    if spent[most] > spent[least] * (1 + rel):
        verb, what = _UNITS[of]
        times = spent[most] / spent[least] if spent[least] else math.inf
        raise ValueError(
            f"{most} {verb} {times:.3g} times {what} of {least}; give {least} the extra steps or pass rel="
        )
