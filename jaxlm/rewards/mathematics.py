# SPDX-License-Identifier: Apache-2.0
"""Mathematical equivalence by math-verify, in processes of their own: no expression can hang or crash the caller."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxlm.rewards.answers import marked, tail
from jaxlm.rewards.verifier import references, told_of
from jaxlm.rewards.workers import Workers, shared_workers

_SHORT = 200  # characters of a completion that may be nothing but its answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class MathMatch:
    r"""Right is what math-verify finds equal to the reference: 1/2, 0.5, \frac{2}{4}; sets, intervals, equations.

    Needs the extra `math`. The package's own time limits are signals, which fail outside the main thread and cannot
    stop an extension; here the text is read in a worker process that the kernel ends. An answer that is cut off
    scores 0 and is logged. One that is the reference letter by letter scores 1 without asking.

    Attributes:
      cpu_seconds: that one comparison may take, > 0.
      workers: processes that compare; `verify` uses them all.
      where: "marked" (else the whole text, where math-verify looks for itself) or "boxed", in a box or none.
      field: of the record, as in `references`; a marked answer in it is taken out first.

    Votes by `answer` compare spelling: 0.5 and 1/2 are two answers to `majority_at_k`.

    Source: github.com/huggingface/Math-Verify.

    >>> MathMatch()(r"so \boxed{x + 1}", {"answer": "x + 1"})
    1.0
    """

    cpu_seconds: float = 5.0
    workers: int = 2
    where: Literal["marked", "boxed"] = "marked"
    field: str | None = None

    def __post_init__(self):
        if not 0 < self.cpu_seconds < float("inf"):
            raise ValueError(f"cpu_seconds must be positive and finite, got {self.cpu_seconds}")
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")
        if self.where not in ("marked", "boxed"):
            raise ValueError(f"where must be 'marked' or 'boxed', got {self.where!r}")

    def __call__(self, text: str, record: Mapping[str, Any]) -> float:
        return self.many([text], [record])[0]

    def many(self, texts: Sequence[str], records: Sequence[Mapping[str, Any]]) -> list[float]:
        scores = [0.0] * len(texts)
        asked, requests = [], []
        for index, (text, record) in enumerate(zip(texts, records, strict=True)):
            with told_of(index):
                right = [_bare(reference) for reference in references(record, self.field)]
            found = _bare(text, self.where)
            if not found:
                continue
            if found in right:
                scores[index] = 1.0
                continue
            asked.append(index)
            requests.append({"references": right, "texts": _readings(found, marked(text) is not None)})
        if requests:
            for index, score in zip(asked, self.processes().ask(requests), strict=True):
                scores[index] = score
        return scores

    def answer(self, text: str, record: Mapping[str, Any]) -> str | None:
        found = _bare(text, self.where)
        return "".join(found.split()) if found and marked(text) is not None else None

    def processes(self) -> Workers:
        """Those that compare; they count what was cut off (`killed`) and what raised (`raised`)."""
        return shared_workers("math", size=self.workers, cpu_seconds=self.cpu_seconds)


def _readings(found: str, is_marked: bool) -> list[str]:
    """What math-verify is given: a marked answer as LaTeX, a text as it is, a short line as both."""
    latex = f"\\boxed{{{found}}}"
    if is_marked:
        return [latex]
    return [found, latex] if len(found) <= _SHORT and "\n" not in found and "$" not in found else [found]


def _bare(text: str, where: str = "marked") -> str:
    r"""The marked answer without $ and \( \) around it; where nothing is marked, the text's end."""
    found = marked(text)
    if where == "boxed" and (found is None or found.by != "box"):
        return ""
    inner = (found.text if found is not None else tail(text)).strip()
    for begin, end in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        middle = inner[len(begin) : len(inner) - len(end)]
        if inner.startswith(begin) and inner.endswith(end) and begin not in middle and middle:
            return middle.strip()
    return inner
