# SPDX-License-Identifier: Apache-2.0
"""Where in a completion its answer stands: in a box, in tags, after a marker.  Linear in the text's length.

Patterns repeat a bounded number of times: no text makes them slow.
"""

import re
from typing import Literal, NamedTuple

Where = Literal["whole", "marked", "boxed", "last_line"]
LONGEST = 100_000  # characters; of a longer text the end is read

_BRACES = re.compile(r"\\(?:boxed|fbox)[ \t]{0,8}\{|\\[\s\S]|[{}]")
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_DECORATION = r"[\s*_$`\"':]{0,16}"
_MARKER = re.compile(
    rf"####{_DECORATION}"
    rf"|\b(?:answers?|(?:correct|right|best)[ \t](?:option|choice))\b(?:[ \t]{{1,4}}(?:to|for|of)\b[^.\n:]{{0,80}}?)?"
    rf"[\s*_`\"]{{0,8}}(?:\bis\b|\bare\b|[:=]){_DECORATION}",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$|[*_$`\"')\]])|\n")


class Marked(NamedTuple):
    """An answer and what it was marked by; "phrase" is the only mark that may be there by accident."""

    text: str
    by: Literal["box", "tag", "hashes", "phrase"]


def tail(text: str) -> str:
    """The last `LONGEST` characters, from the first whole word on."""
    if len(text) <= LONGEST:
        return text
    cut = text[-LONGEST:]
    space = re.search(r"\s", cut)
    return cut[space.end() :] if space else ""


def boxed(text: str) -> str | None:
    r"""What stands in the last complete \boxed{...} or \fbox{...}; None: there is none.

    >>> boxed(r"so \boxed{\frac{1}{2}}, not \boxed{")
    '\\frac{1}{2}'
    """
    opened: list[int | None] = []  # of every open brace where its box begins, None for other braces
    found = None
    for match in _BRACES.finditer(text):
        mark = match[0]
        if mark == "}":
            begin = opened.pop() if opened else None
            if begin is not None:
                found = text[begin : match.start()]
        elif mark[-1] == "{" and mark != "\\{":
            opened.append(match.end() if len(mark) > 1 else None)
    for _ in range(4):  # a box in a box
        inner = _BRACES.match(found.strip()) if found else None
        if not (inner and found and len(inner[0]) > 2 and found.strip().endswith("}")):
            break
        found = found.strip()[inner.end() : -1]
    return found


def marked(text: str) -> Marked | None:
    """The answer that a text marks as such: in the last box, else the last answer tags, else after the last marker.

    Markers are `####`, and phrases such as "Answer:", "the answer is", "the correct option is"; what follows them is
    read to the end of the sentence or line.

    >>> marked("2 + 2 is 4, so the final answer is **4**.")
    Marked(text='4', by='phrase')
    """
    text = tail(text)
    if (box := boxed(text)) is not None:
        return Marked(box.strip(), "box")
    if (tagged := _tagged(text)) is not None:
        return Marked(tagged.strip(), "tag")
    last = max(_MARKER.finditer(text), key=lambda match: match.start(), default=None)
    if last is None:
        return None
    stop = _SENTENCE_END.search(text, last.end())
    end = stop.start() if stop else len(text)
    return Marked(text[last.end() : end].strip(" \t*_$`\"'"), "hashes" if last[0].startswith("#") else "phrase")


def answer_text(text: str, where: Where) -> str | None:
    """The part of a text that a verifier compares; None: it has no such part.

    Args:
      where: "whole"; "marked", what `marked` finds, else the whole; "boxed", in a box or nothing; "last_line" that is
        not blank.

    >>> answer_text("Let me think.\\nParis\\n", "last_line")
    'Paris'
    """
    match where:
        case "whole":
            return text
        case "marked":
            found = marked(text)
            return text if found is None else found.text
        case "boxed":
            return boxed(tail(text))
        case "last_line":
            return next((line for line in reversed(tail(text).splitlines()) if line.strip()), None)
        case _:
            raise ValueError(f"where must be 'whole', 'marked', 'boxed' or 'last_line', got {where!r}")


def _tagged(text: str) -> str | None:
    found, begin = None, None
    for match in _TAG.finditer(text):
        if not match[1]:
            begin = match.end()
        elif begin is not None:
            found, begin = text[begin : match.start()], None
    return found
