# SPDX-License-Identifier: Apache-2.0
"""Seeded exercises that come with their plan, by construction: question, plan, steps, answer.

The plan is the order of work, which the question hides; it never holds the answer.
"""

import itertools
import random
from collections.abc import Callable, Mapping

from jaxlm.data.config import ProceduralPlans
from jaxlm.data.procedural import chosen, seeded
from jaxlm.data.records import Planned, leaks_answer

VERSION = 1  # raise it when a generator's items change: prepared data is made anew
_KEYS = "abcdefghijklmnopqrstuvwxyz"


def recipe(
    rng: random.Random, *, least: int = 3, most: int = 6, keys: int = 26, modulus: int = 97, spelled: bool = False
) -> Planned:
    """A start value and operations under keys, out of order: 12: c*3 a+7 b-4= +7 -4 *3, 19 15 45, 45.

    Plan: the operations in the order of their keys; steps: the value after each, modulo `modulus`, or, spelled out,
    each operation with its value, +7=19 -4=15 *3=45; answer: the last value. Keys are of the first `keys` letters.
    """
    if not least <= most <= keys <= len(_KEYS):
        raise ValueError(
            f"need least <= most operations, and as many keys of {len(_KEYS)}; got {least}, {most} and {keys}"
        )
    count = rng.randint(least, most)
    letters = sorted(rng.sample(_KEYS[:keys], count))
    operations = [rng.choice("+-*") + str(rng.randint(2, 9)) for _ in letters]
    value = start = rng.randrange(modulus)
    values = []
    for operation in operations:
        number = int(operation[1:])
        value = {"+": value + number, "-": value - number, "*": value * number}[operation[0]] % modulus
        values.append(str(value))
    steps = [f"{a}={b}" for a, b in zip(operations, values, strict=True)] if spelled else values
    listed = [key + operation for key, operation in zip(letters, operations, strict=True)]
    rng.shuffle(listed)
    return Planned(f"{start}: {' '.join(listed)}=", " ".join(operations), " ".join(steps), values[-1])


def implication(rng: random.Random, *, least: int = 2, most: int = 5) -> Planned:
    """Rules out of order, and whether one letter leads to another: k>m a>c x>y c>k, a to m?  a c k m, a>c c>k k>m, yes.

    Plan: the letters on the way from the first one on; steps: the rules used, in order; answer: yes or no.
    """
    if least > most or 2 * (most + 1) > len(_KEYS):
        raise ValueError(f"need least <= most <= {len(_KEYS) // 2 - 1} rules of a chain, got {least} and {most}")
    lengths = [rng.randint(least, most) for _ in range(2)]
    letters = rng.sample(_KEYS, sum(lengths) + 2)
    way, other = letters[: lengths[0] + 1], letters[lengths[0] + 1 :]
    rules = [[f"{a}>{b}" for a, b in itertools.pairwise(chain)] for chain in (way, other)]
    mixed = rules[0] + rules[1]
    rng.shuffle(mixed)
    leads = rng.random() < 0.5
    target = way[-1] if leads else other[-1]
    asked = f"{' '.join(mixed)}, {way[0]} to {target}?"
    return Planned(asked, " ".join(way), " ".join(rules[0]), "yes" if leads else "no")


PLANNED: Mapping[str, Callable[..., Planned]] = {"implication": implication, "recipe": recipe}


class PlannedExercises:
    """The items of a `ProceduralPlans` source, by index.

    Raises: ValueError for an unknown generator or option, or one out of range.

    >>> item = PlannedExercises(ProceduralPlans(generator="recipe", size=10))[0]
    >>> sorted(item)
    ['answer', 'plan', 'question', 'steps']
    """

    def __init__(self, source: ProceduralPlans):
        self._generate, self._source = chosen(source, PLANNED), source

    def __len__(self) -> int:
        return self._source.size

    def __getitem__(self, index: int) -> dict[str, str]:
        if not 0 <= index < self._source.size:
            raise IndexError(f"item {index} of {self._source.size}")
        rng = seeded(f"{self._source.generator}/{self._source.seed}/{index}")
        while True:  # an answer that the plan happens to hold is drawn again
            item = self._generate(rng, **self._source.options)
            if not leaks_answer(item.plan, item.answer, question=item.question):
                return item._asdict()
