# SPDX-License-Identifier: Apache-2.0
"""Multiple choice: which option a text names, by its letter or by its words."""

import dataclasses
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxlm.data.records import BadRecord
from jaxlm.rewards.answers import marked, tail
from jaxlm.rewards.matching import plain_normal
from jaxlm.rewards.verifier import references

_WRAPPED = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s{0,2}\{([^{}]{0,200})\}")
_BRACKETED = re.compile(r"[(\[]\s{0,2}(\w{1,3})\s{0,2}[)\]]")
_NAMED = re.compile(r"\b(?:option|choice|answer|choose|pick|select)\s{1,3}[(\[]?(\w{1,3})\b[)\]]?", re.IGNORECASE)
_JOINED = re.compile(r"\s{0,3}(?:,|/|&|\bor\b|\band\b)\s{0,3}(?:or\s|and\s)?\s{0,3}[(\[]?(\w{1,3})\b", re.IGNORECASE)
_LEADING = re.compile(
    r"[\s*_$`\"'(\[]{0,8}(?:(?:option|choice)\s{1,3}[(\[]?)?(\w{1,3})\b([)\].:,;\-*\s]{0,4})", re.IGNORECASE
)

_WORD = re.compile(r"[^\W_]+")


class _Options(NamedTuple):
    labels: tuple[str, ...]
    texts: tuple[str, ...]  # empty where the record has none


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultipleChoice:
    r"""Right is the option that the record names, given by its letter or its text, in one of many forms.

    Read are B, b, (B), [B], B. , B), **B**, \boxed{B}, \boxed{\text{B}}, <answer>B</answer>, "#### B", "the answer is
    (B)", "option B", "B: Paris", and "Paris" alone. A marked answer counts before the rest of the text; without one
    its first and last lines, the last "(B)" or "option B", and at last the only option whose words occur. Two options
    joined ("A or B") are no answer, and so are the words of two options.

    The record's "choices" are a list of texts, or a mapping of "text" and "label" (ARC); its answer a label, the
    text of an option, or an index from 0 given as an integer. Without choices labels are single capital letters.

    Attributes:
      field: of the record, where the answer stands, as in `references`.
      choices: of the record, where the options stand.

    >>> MultipleChoice()("I think it is (B), Paris.", {"choices": ["Rome", "Paris"], "answer": 1})
    1.0
    """

    field: str | None = None
    choices: str = "choices"

    def __call__(self, text: str, record: Mapping[str, Any]) -> float:
        right = self._right(record)
        return float(self.answer(text, record) == right)

    def answer(self, text: str, record: Mapping[str, Any]) -> str | None:
        """The label of the option that the text names."""
        return chosen(text, self._options(record))

    def _right(self, record: Mapping[str, Any]) -> str:
        reference = references(record, self.field)[0]
        options = self._options(record)
        name = self.field or "answer"
        index = record.get(name)
        if isinstance(index, int):
            if not 0 <= index < len(options.labels):
                raise BadRecord("unknown choice", f"{name!r} is {index}, an index into {len(options.labels)} choices")
            return options.labels[index]
        found = _label(reference.strip().strip("()[]. "), options.labels) or _by_text(reference, options)
        if found is None:
            raise BadRecord(
                "unknown choice",
                f"the answer {reference!r:.80} is neither a label {options.labels[:10]} nor the text of a choice",
            )
        return found

    def _options(self, record: Mapping[str, Any]) -> _Options:
        found: Any = record.get(self.choices) if isinstance(record, Mapping) else None
        labels: Sequence[Any] | None = None
        if isinstance(found, Mapping):
            found, labels = found.get("text"), found.get("label")
        if found is None:
            return _Options(tuple(string.ascii_uppercase), ())
        if not isinstance(found, list | tuple) or not found or not all(isinstance(one, str) for one in found):
            raise BadRecord("wrong type", f"{self.choices!r} must be a list of texts, got {found!r:.80}")
        labels = list(string.ascii_uppercase[: len(found)]) if labels is None else labels
        if len(labels) != len(found) or not all(isinstance(label, str) for label in labels):
            raise BadRecord("wrong type", f"{len(found)} choices need as many labels of text, got {labels!r:.80}")
        return _Options(tuple(labels), tuple(found))


def chosen(text: str, options: _Options) -> str | None:
    """The label of the one option a text names; None: it names none, or several."""
    text = _WRAPPED.sub(r"\1", tail(text))
    mark = marked(text)
    if mark is not None:
        found, settled = _in_answer(mark.text, options)
        if found is not None or settled or mark.by != "phrase":
            return found
    lines = [line for line in text.splitlines() if line.strip()]
    for line in [lines[-1], lines[0]] if lines else []:
        found, settled = _in_answer(line, options)
        if found is not None or settled:
            return found
    named = [_label(match[1], options.labels) for match in _NAMED.finditer(text) if not match[1].islower()]
    named = [label for label in named if label] or [
        label for match in _BRACKETED.finditer(text) if (label := _label(match[1], options.labels))
    ]
    return named[-1] if named else _mentioned(text, options)


def _in_answer(text: str, options: _Options) -> tuple[str | None, bool]:
    """The option of a short answer, and whether the answer is settled: it names several, so no other place counts."""
    if (exact := _by_text(text, options)) is not None:
        return exact, True
    bare = text.strip().strip("()[]{}.:,;*_$`\"' ")
    if (label := _label(bare, options.labels)) is not None:
        return label, True
    leading = _LEADING.match(text)
    label = _label(leading[1], options.labels) if leading else None
    if leading and label is not None:
        joined = _JOINED.match(text, leading.end(1)) or _JOINED.match(text, leading.end())
        if joined and _label(joined[1], options.labels) not in (None, label) and not joined[1].islower():
            return None, True
        after = leading[2]
        marked_off = bool(after.strip()) or leading[0].lstrip()[:1] in "([" or len(leading[0].split()) > 1
        word = label in ("A", "I") or leading[1].islower()  # "A dog" names no option
        rest = _by_text(text[leading.end() :], options)
        if marked_off or rest == label or not word:
            return label, True
    for match in _BRACKETED.finditer(text):
        if (label := _label(match[1], options.labels)) is not None:
            return label, True
    found = _mentioned(text, options)
    return found, found is not None


def _label(text: str, labels: Sequence[str]) -> str | None:
    if text in labels:
        return text
    return next((label for label in labels if label.lower() == text.lower()), None) if text.isascii() else None


def _by_text(text: str, options: _Options) -> str | None:
    """The option that is this text, if only one is."""
    if not options.texts or len(text) > 4 * max(map(len, options.texts)) + 64:
        return None
    normal = plain_normal(text)
    there = [x for x, y in zip(options.labels, options.texts, strict=True) if normal and plain_normal(y) == normal]
    return there[0] if len(there) == 1 else None


def _mentioned(text: str, options: _Options) -> str | None:
    """The only option whose words occur; one that lies inside another that occurs does not count."""
    words = _words(text)
    there = {}
    for label, option in zip(options.labels, options.texts, strict=bool(options.texts)):
        normal = _words(option)
        if normal.strip() and normal in words:
            there[label] = normal
    outer = [a for a, x in there.items() if not any(x in y and x != y for y in there.values())]
    return outer[0] if len(outer) == 1 else None


def _words(text: str) -> str:
    """Its words, each between spaces."""
    return " " + " ".join(_WORD.findall(text.casefold())) + " "
