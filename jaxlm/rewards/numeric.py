# SPDX-License-Identifier: Apache-2.0
"""Numbers in text: found in linear time, read as exact fractions, compared within a stated tolerance."""

import dataclasses
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Literal, NamedTuple

from jaxlm.data.records import BadRecord
from jaxlm.rewards.answers import boxed, marked, tail
from jaxlm.rewards.verifier import references

_MOST_DIGITS = 1000  # longer ones are no answer to anything, and reading them takes time
_LARGEST_EXPONENT = 400
_SHORT = 200  # characters of a reference that is nothing but an answer

_SUPERSCRIPTS = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b", "0123456789-")
_SUPERSCRIPT = re.compile(r"[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]{1,8}")
_FRACTION = re.compile(
    r"\\[dtc]?frac(?:\s{0,2}\{\s{0,2}(?P<a>-?[0-9.,]{1,400})\s{0,2}\}\s{0,2}\{\s{0,2}(?P<b>[0-9.,]{1,400})\s{0,2}\}"
    r"|\s?(?P<c>[0-9])(?P<d>[0-9]))"
)
_SEPARATOR = r"[,_'\u00a0\u2009\u202f]"
_PLAIN = rf"(?:[0-9]{{1,3}}(?:{_SEPARATOR}[0-9]{{3}})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(
    rf"(?<![\w.^])(?<![_^]\{{)(?<![_^]-)(?<![_^]\{{-)(?P<first>{_PLAIN})"
    r"(?:[eE](?P<e>[+-]?[0-9]+)(?!\w)|\s?(?:\\times|\\cdot|[x*\u00d7\u00b7])\s?10\s?(?:\^|\*\*)\s?(?:\{\s?)?(?P<ten>[+-]?[0-9]+)"
    r"|(?:\^|\*\*)(?:\{\s?)?(?P<power>[+-]?[0-9]+))?\}?"
    rf"(?:\s?/\s?(?P<second>{_PLAIN}))?"
    r"(?P<percent>\s?\\?%|\s?percent\b)?(?:\s(?P<scale>thousand|million|billion|trillion)\b)?",
    re.IGNORECASE,
)
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_DEGREES = re.compile(r"\^(?:\{\s?\\circ\s?\}|\\circ(?![a-zA-Z]))")
_GOES_ON = re.compile(r"\s{0,2}(?:\\(?:sqrt|pi|infty|ln|log|sin|cos|tan)(?![a-zA-Z])|[\u221a\u03c0^])")
_UNDER_A_ROOT = re.compile(r"(?:\\sqrt(?:\[[^\]]{0,8}\])?\s{0,2}\{?|\u221a\(?)\Z")
_SEVERAL = re.compile(r"[\s$]*(?:\\left)?[(\[{\\].*,.*(?:[)\]}])[\s$]*", re.DOTALL)
_EQUALS = re.compile(r"=|\u2248|\\approx")


class Value(NamedTuple):
    """A number and whether a percent sign followed it."""

    number: Fraction
    percent: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class NumericMatch:
    r"""Right is the reference's number within a tolerance, in whatever form it is written.

        |answer - reference| <= max(absolute, relative * |reference|)

    Read are 1,234.5 (also with ' _ or a narrow space between thousands), 1/2, 3 1/2, \frac{1}{2}, 1e-3, 2 x 10^3,
    10^6, 45%, $5, 3 million. Units and other words around a number are ignored and nothing is converted: 5 km is 5 m.
    A comma before other than three digits ends a number (3,14 is 3 and 14). Which number of a text counts: the
    one it marks (a box, tags, ####, "the answer is"), there the first one after the last equals sign; without a
    marker the last one of the text. A number of over 1,000 digits, an exponent beyond 400, and a number that goes
    on as an expression (2\sqrt{2}, 3\pi) are no answer.

    Attributes:
      relative: >= 0, share of the reference.
      absolute: >= 0.
      percent: what 45% equals: "either" 45 or 0.45 where only one side has the sign; "value" 0.45 alone; "unit" 45
        alone.
      where: "marked" as told above; "last", the last number, marks or no; "boxed", in a box or none.
      field: of the record, as in `references`; the number in it is found in the same way.

    >>> NumericMatch()(r"Half of 2,469 is \boxed{1{,}234.5}", {"answer": "1234.5"})
    1.0
    """

    relative: float = 1e-6
    absolute: float = 0.0
    percent: Literal["either", "value", "unit"] = "either"
    where: Literal["marked", "last", "boxed"] = "marked"
    field: str | None = None

    def __post_init__(self):
        for name in ("relative", "absolute"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a finite number >= 0, got {getattr(self, name)}: 0 asks for equality")
        if self.percent not in ("either", "value", "unit"):
            raise ValueError(f"percent must be 'either', 'value' or 'unit', got {self.percent!r}")
        if self.where not in ("marked", "last", "boxed"):
            raise ValueError(f"where must be 'marked', 'last' or 'boxed', got {self.where!r}")

    def __call__(self, text: str, record: Mapping[str, Any]) -> float:
        right = []
        for reference in references(record, self.field):
            value = found_number(reference, "marked")
            if value is None or _is_more(reference):
                raise BadRecord(
                    "no number",
                    f"the reference {reference!r:.80} holds no number to compare with; MathMatch compares expressions",
                )
            right.append(value)
        found = found_number(text, self.where)
        return float(found is not None and any(self._agree(found, value) for value in right))

    def answer(self, text: str, record: Mapping[str, Any]) -> str | None:
        found = found_number(text, self.where)
        if found is None:
            return None
        if self.percent == "value" and found.percent:
            return str(found.number / 100)
        return f"{found.number}%" if found.percent and self.percent == "either" else str(found.number)

    def _agree(self, found: Value, right: Value) -> bool:
        if self.percent == "unit" or found.percent == right.percent:
            return self._near(found.number, right.number)
        a = found.number / 100 if found.percent else found.number
        b = right.number / 100 if right.percent else right.number
        return self._near(a, b) or (self.percent == "either" and self._near(found.number, right.number))

    def _near(self, a: Fraction, b: Fraction) -> bool:
        return abs(a - b) <= max(Fraction(self.absolute), Fraction(self.relative) * abs(b))


def found_number(text: str, where: str = "marked") -> Value | None:
    """The number that a text gives as its answer; None: none, or one too long to be read."""
    text = tail(text)
    if where == "boxed":
        box = boxed(text)
        return None if box is None else _first(box)
    found = marked(text) if where == "marked" else None
    if found is not None:
        value = _first(found.text)
        if value is not None or found.by != "phrase" or numbers(found.text):
            return value
    there = numbers(text)
    return there[-1] if there else None


def numbers(text: str) -> list[Value | None]:
    """All numbers of a text in their order; None stands for one too long, divided by zero, or inside an expression.

    >>> [str(value.number) for value in numbers("-3 of 1,000 or 2/4 of 1.5e1")]
    ['-3', '1000', '1/2', '15']
    """
    text = _plain(text)
    found: list[Value | None] = []
    whole_end = -2  # of a whole number that a fraction may follow
    for match in _NUMBER.finditer(text):
        value = _value(match)
        if _GOES_ON.match(text, match.end()) or _UNDER_A_ROOT.search(text[max(0, match.start() - 20) : match.start()]):
            value = None  # a piece of an expression
        if value is not None and value.number >= 0 and _negative(text, match.start()):
            value = Value(-value.number, value.percent)
        mixed = match["second"] and match.start() == whole_end + 1 and text[whole_end] == " "
        if mixed and value is not None and 0 < value.number < 1 and (whole := found[-1]) is not None:  # 3 1/2
            sign = -1 if whole.number < 0 else 1
            found[-1] = Value(whole.number + sign * value.number, value.percent)
            continue
        whole_end = match.end() if match[0].isdigit() else -2
        found.append(value)
    return found


def _first(text: str) -> Value | None:
    """The number of a marked answer: the first after the last equals sign; a remark in brackets aside."""
    before = text.split(" (", 1)[0]
    text = before if numbers(before) else text
    parts = _EQUALS.split(text)
    found = numbers(parts[-1]) or numbers(text)
    return found[0] if found and None not in found else None


def _is_more(reference: str) -> bool:
    """A pair, an interval, a set or an expression, which one number cannot stand for."""
    found = marked(reference)
    text = reference if found is None else found.text
    if len(text) > _SHORT:
        return False  # a solution, whose last number counts
    found_there = numbers(text)
    return None in found_there or (len(found_there) > 1 and bool(_SEVERAL.fullmatch(text)))


def _plain(text: str) -> str:
    """With one spelling for minus, superscripts, thousands and LaTeX fractions."""
    text = text.replace("\u2212", "-").replace("{,}", ",").replace("\\,", "\u2009").replace("\\!", "")
    text = _DEGREES.sub("", text)
    text = _SUPERSCRIPT.sub(lambda match: "^" + match[0].translate(_SUPERSCRIPTS), text)

    def fraction(match: re.Match[str]) -> str:
        a, b = (match["a"], match["b"]) if match["a"] else (match["c"], match["d"])
        apart = " " if match.start() and text[match.start() - 1].isdigit() else ""
        return f"{apart}{a}/{b}"

    return _FRACTION.sub(fraction, text)


def _negative(text: str, start: int) -> bool:
    """Whether a minus sign stands before a number, and not between two things."""
    while start and text[start - 1] in "$\\\u20ac\u00a3\u00a5":
        start -= 1
    if start >= 2 and text[start - 1] == " " and text[start - 2] == "-":
        return text[max(0, start - 18) : start - 2].rstrip().endswith(("=", "("))
    if not (start and text[start - 1] == "-"):
        return False
    return start == 1 or not (text[start - 2].isalnum() or text[start - 2] in ")]}-")


def _value(match: re.Match[str]) -> Value | None:
    number = _decimal(match["first"])
    exponent = match["e"] or match["ten"] or match["power"] or "0"
    if number is None or len(exponent) > 5 or abs(int(exponent)) > _LARGEST_EXPONENT:
        return None
    if match["power"]:
        size = max(number.numerator.bit_length(), number.denominator.bit_length())
        if size * abs(int(exponent)) > 4 * _MOST_DIGITS or (not number and int(exponent) < 0):
            return None
        number = number ** int(exponent)
    else:
        number *= Fraction(10) ** int(exponent)
    if match["second"]:
        divisor = _decimal(match["second"])
        if not divisor:
            return None
        number /= divisor
    if match["scale"]:
        number *= 10 ** _SCALES[match["scale"].lower()]
    return Value(number, bool(match["percent"]))


def _decimal(digits: str) -> Fraction | None:
    digits = re.sub(_SEPARATOR, "", digits)
    return None if len(digits) > _MOST_DIGITS else Fraction(digits)
