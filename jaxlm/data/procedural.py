# SPDX-License-Identifier: Apache-2.0
"""Seeded exercises with one right answer each, short enough for a model of a million parameters.

Item i depends on a hash of (generator, seed, i) alone: any item is made at once, and neighbouring seeds share nothing.
"""

import hashlib
import inspect
import random
from collections.abc import Callable, Mapping
from typing import Any

from jaxlm.data.config import Procedural, ProceduralPairs

VERSION = 1  # raise it when a generator's items change: prepared data is made anew


def addition(rng: random.Random, *, digits: int = 2) -> tuple[str, str]:
    """12+34= 46; 10 ** (2 * digits) exercises."""
    top = 10**digits
    a, b = rng.randrange(top), rng.randrange(top)
    return f"{a}+{b}=", f" {a + b}"


def modular(rng: random.Random, *, terms: int = 4, modulus: int = 7) -> tuple[str, str]:
    """4+9+0+6 mod 7= 5; 10 ** terms exercises."""
    numbers = [rng.randrange(10) for _ in range(terms)]
    return f"{'+'.join(map(str, numbers))} mod {modulus}=", f" {sum(numbers) % modulus}"


def sorting(rng: random.Random, *, count: int = 5, digits: int = 1) -> tuple[str, str]:
    """sort 4 1 3= 1 3 4; 10 ** (count * digits) exercises."""
    numbers = [rng.randrange(10**digits) for _ in range(count)]
    return f"sort {_spaced(numbers)}=", f" {_spaced(sorted(numbers))}"


def maximum(rng: random.Random, *, count: int = 3, digits: int = 2) -> tuple[str, str]:
    """max 17 93 42= 93; 10 ** (count * digits) exercises."""
    numbers = [rng.randrange(10**digits) for _ in range(count)]
    return f"max {_spaced(numbers)}=", f" {max(numbers)}"


def reversal(rng: random.Random, *, length: int = 5, letters: int = 26) -> tuple[str, str]:
    """reverse bqz= zqb; letters ** length exercises."""
    word = _word(rng, length, letters)
    return f"reverse {word}=", f" {word[::-1]}"


def counting(rng: random.Random, *, length: int = 8, letters: int = 4) -> tuple[str, str]:
    """count a in abcab= 2; letters ** (length + 1) exercises."""
    word, wanted = _word(rng, length, letters), _word(rng, 1, letters)
    return f"count {wanted} in {word}=", f" {word.count(wanted)}"


def recall(rng: random.Random, *, pairs: int = 4, letters: int = 26) -> tuple[str, str]:
    """b3 q7 z1, q= 7: the number beside the letter asked for."""
    names = rng.sample(_ALPHABET[: _at_most(letters)], pairs)
    numbers = [rng.randrange(10) for _ in names]
    wanted = rng.randrange(pairs)
    listed = " ".join(f"{name}{number}" for name, number in zip(names, numbers, strict=True))
    return f"{listed}, {names[wanted]}=", f" {numbers[wanted]}"


def progression(rng: random.Random, *, start: int = 1000, step: int = 50, terms: int = 3) -> tuple[str, str]:
    """next 5 9 13= 17; start * step exercises."""
    first, distance = rng.randrange(start), 1 + rng.randrange(step)
    return f"next {_spaced([first + i * distance for i in range(terms)])}=", f" {first + terms * distance}"


def copying(rng: random.Random, *, length: int = 5) -> tuple[str, str]:
    """copy 31415= 31415; this and the next ones: 10 ** length exercises, alike but for the word and the answer."""
    return _on_digits("copy", rng, length, lambda digits: digits)


def increment(rng: random.Random, *, length: int = 5) -> tuple[str, str]:
    """increment 31419= 42520: every digit by one, 9 becomes 0."""
    return _on_digits("increment", rng, length, lambda digits: [(d + 1) % 10 for d in digits])


def decrement(rng: random.Random, *, length: int = 5) -> tuple[str, str]:
    """decrement 31410= 20309: every digit by one, 0 becomes 9."""
    return _on_digits("decrement", rng, length, lambda digits: [(d - 1) % 10 for d in digits])


def complement(rng: random.Random, *, length: int = 5) -> tuple[str, str]:
    """complement 31415= 68584: nine minus every digit."""
    return _on_digits("complement", rng, length, lambda digits: [9 - d for d in digits])


def rotation(rng: random.Random, *, length: int = 5, by: int = 2) -> tuple[str, str]:
    """rotate 31415= 41531: the first digits behind the others."""
    return _on_digits("rotate", rng, length, lambda digits: digits[by:] + digits[:by])


def mirroring(rng: random.Random, *, length: int = 5) -> tuple[str, str]:
    """mirror 31415= 51413."""
    return _on_digits("mirror", rng, length, lambda digits: digits[::-1])


def ascending(rng: random.Random, *, length: int = 5) -> tuple[str, str]:
    """ascending 31415= 11345."""
    return _on_digits("ascending", rng, length, sorted)


def descending(rng: random.Random, *, length: int = 5) -> tuple[str, str]:
    """descending 31415= 54311."""
    return _on_digits("descending", rng, length, lambda digits: sorted(digits, reverse=True))


GENERATORS: Mapping[str, Callable[..., tuple[str, str]]] = {
    "addition": addition,
    "ascending": ascending,
    "complement": complement,
    "copying": copying,
    "counting": counting,
    "decrement": decrement,
    "descending": descending,
    "increment": increment,
    "maximum": maximum,
    "mirroring": mirroring,
    "modular": modular,
    "progression": progression,
    "recall": recall,
    "reversal": reversal,
    "rotation": rotation,
    "sorting": sorting,
}


class Exercises:
    """The items of a `Procedural` source, by index.

    Raises: ValueError for an unknown generator or option, or one out of range.

    >>> Exercises(Procedural(generator="sorting", size=10, options={"count": 3}))[0]
    {'prompt': 'sort 4 1 7=', 'completion': ' 1 4 7'}
    """

    def __init__(self, source: Procedural):
        self._generate = chosen(source, GENERATORS)
        self._source = source

    def __len__(self) -> int:
        return self._source.size

    def __getitem__(self, index: int) -> dict[str, str]:
        if not 0 <= index < self._source.size:
            raise IndexError(f"item {index} of {self._source.size}")
        name = f"{self._source.generator}/{self._source.seed}/{index}"
        prompt, completion = self._generate(seeded(name), **self._source.options)
        return {"prompt": prompt, "completion": completion}


class Pairs:
    """The items of a `ProceduralPairs` source, by index: the exercise of that index, and an answer that is wrong.

    >>> Pairs(ProceduralPairs(generator="sorting", size=10, options={"count": 3}))[0]
    {'prompt': 'sort 4 1 7=', 'chosen': ' 1 4 7', 'rejected': ' 5 4 7'}
    """

    def __init__(self, source: ProceduralPairs):
        self._exercises = Exercises(Procedural(**vars(source)))
        self._name = f"wrong/{source.generator}/{source.seed}"

    def __len__(self) -> int:
        return len(self._exercises)

    def __getitem__(self, index: int) -> dict[str, str]:
        exercise = self._exercises[index]
        rng, answer = seeded(f"{self._name}/{index}"), exercise["completion"]
        at = rng.choice([place for place, letter in enumerate(answer) if letter.isalnum()])
        others = "0123456789" if answer[at].isdigit() else _ALPHABET
        wrong = rng.choice(others.replace(answer[at], ""))
        return {"prompt": exercise["prompt"], "chosen": answer, "rejected": answer[:at] + wrong + answer[at + 1 :]}


def chosen(source: Any, generators: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The generator that a source names.

    Raises: ValueError for an unknown one, a size or an option out of range.
    """
    if source.generator not in generators:
        raise ValueError(f"no generator {source.generator!r}; there are {', '.join(generators)}")
    if source.size < 1:
        raise ValueError(f"size of generator {source.generator!r} must be at least 1, got {source.size}")
    generate = generators[source.generator]
    known = {name: p.default for name, p in inspect.signature(generate).parameters.items() if name != "rng"}
    for name, value in source.options.items():
        if name not in known:
            raise ValueError(f"generator {source.generator!r} has no option {name!r}; it has {', '.join(known)}")
        if isinstance(known[name], bool) != isinstance(value, bool):
            kind = "true or false" if isinstance(known[name], bool) else "a number"
            raise ValueError(f"option {name!r} of generator {source.generator!r} must be {kind}, got {value!r}")
        if not isinstance(value, bool) and (not isinstance(value, int) or value < 1):
            raise ValueError(f"option {name!r} of generator {source.generator!r} must be >= 1, got {value!r}")
    return generate


def seeded(name: str) -> random.Random:
    """Draws that depend on a name alone."""
    return random.Random(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little"))


def score(answer: str, record: Mapping[str, Any]) -> float:
    """1.0 where the answer is the record's completion, outer white space aside; else 0.0. No part marks.

    >>> score("46", {"prompt": "12+34=", "completion": " 46"})
    1.0
    """
    return float(answer.strip() == record["completion"].strip())


_ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def _at_most(letters: int) -> int:
    if letters > len(_ALPHABET):
        raise ValueError(f"letters must be at most {len(_ALPHABET)}, got {letters}")
    return letters


def _word(rng: random.Random, length: int, letters: int) -> str:
    return "".join(_ALPHABET[rng.randrange(_at_most(letters))] for _ in range(length))


def _spaced(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))


def _on_digits(verb: str, rng: random.Random, length: int, change: Callable[[list[int]], list[int]]) -> tuple[str, str]:
    digits = [rng.randrange(10) for _ in range(length)]
    return f"{verb} {''.join(map(str, digits))}=", f" {''.join(map(str, change(digits)))}"
