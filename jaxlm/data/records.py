# SPDX-License-Identifier: Apache-2.0
"""What a record may be, what makes one unusable, and where it is found."""

import bisect
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

ROLES = ("system", "user", "assistant", "tool")


class BadRecord(ValueError):
    """A record that cannot be trained on; `reason` is the short name under which skips are counted."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Chat(NamedTuple):
    """A conversation; each message is {"role", "content"}."""

    messages: tuple[dict[str, str], ...]


class Completion(NamedTuple):
    """A prompt and the text to be learnt after it."""

    prompt: str
    completion: str


class Preference(NamedTuple):
    """A prompt and two answers to it, the better one first."""

    prompt: str
    chosen: str
    rejected: str


class Planned(NamedTuple):
    """A question, how it is gone about, the steps and what comes out; as text, the steps and the answer are learnt.

    `plan` is "" where there is none.
    """

    question: str
    plan: str
    steps: str
    answer: str


class Text(NamedTuple):
    """A document, learnt as a whole."""

    text: str


class Place(NamedTuple):
    """Records from index `first` on lie in `name`, counted by `unit`: lines from 1, everything else from 0."""

    first: int
    name: str
    unit: str


def describe(places: Sequence[Sequence[Any]], index: int) -> str:
    """Where record `index` of a source with these `Place`s is found.

    >>> describe([Place(0, "a.jsonl", "line"), Place(10, "b.jsonl", "line")], 12)
    'b.jsonl:3'
    """
    first, name, unit = places[bisect.bisect_right([place[0] for place in places], index) - 1]
    return f"{name}:{index - first + 1}" if unit == "line" else f"{name} {unit} {index - first}"


Parsed = Chat | Completion | Planned | Preference | Text


def parse(record: Any) -> Parsed:
    """The record as the first of five kinds: messages, prompt/chosen/rejected, prompt/completion,
    question/plan/steps/answer, text.

    Other fields are ignored.

    Raises: BadRecord, naming the field or role at fault.

    >>> parse({"prompt": "1+1=", "completion": "2"})
    Completion(prompt='1+1=', completion='2')
    """
    if not isinstance(record, Mapping):
        raise BadRecord("not an object", f"a record must be an object with named fields, got {type(record).__name__}")
    if record.get("messages") is not None:
        return _chat(record["messages"])
    if record.get("chosen") is not None or record.get("rejected") is not None:
        return _preference(*(_text(record, name) for name in Preference._fields))
    if record.get("prompt") is not None or record.get("completion") is not None:
        prompt, completion = _text(record, "prompt"), _text(record, "completion")
        if not prompt:
            raise BadRecord("empty prompt", "prompt is empty: give the record as {'text': ...}")
        if not completion.strip():
            raise BadRecord("empty completion", "completion is empty: there is nothing to learn")
        return Completion(prompt, completion)
    if record.get("question") is not None and record.get("steps") is not None:
        return _planned(record)
    if record.get("text") is not None:
        text = _text(record, "text")
        if not text.strip():
            raise BadRecord("empty text", "text is empty: there is nothing to learn")
        return Text(text)
    raise BadRecord(
        "missing field",
        "a record needs 'messages', 'prompt' and 'completion', 'prompt', 'chosen' and 'rejected', 'question', 'steps' "
        f"and 'answer', or 'text'; this one has {sorted(map(str, record))}. Other names are given by the "
        "source's `fields`",
    )


def parts_of(parsed: Parsed) -> list[Chat | Completion | Text]:
    """What of a record is encoded by itself: both answers of a preference, the chosen one first; any other as it is.

    Of a planned one the steps and the answer, a line each, behind the question: the plan is for methods that read it.
    """
    if isinstance(parsed, Planned):
        worked_out = [text for text in (parsed.steps, parsed.answer) if text]
        return [Completion(parsed.question, "".join("\n" + text for text in worked_out))]
    if isinstance(parsed, Preference):
        return [Completion(parsed.prompt, answer) for answer in (parsed.chosen, parsed.rejected)]
    return [parsed]


def question(parsed: Parsed) -> str:
    """What is asked: the prompt, the messages before the last one, or the text: what makes an exercise the same."""
    match parsed:
        case Chat(messages):
            return "\n".join(f"{message['role']}: {message['content']}" for message in messages[:-1])
        case Completion(prompt, _) | Preference(prompt, _, _):
            return prompt.strip()
        case Planned(asked, _, _, _):
            return asked.strip()
        case Text(text):
            return text.strip()


def _planned(record: Mapping[str, Any]) -> Planned:
    """A record whose plan, if it has one, does not tell the answer."""
    asked, steps, answer = (_text(record, name).strip() for name in ("question", "steps", "answer"))
    plan = _text(record, "plan").strip() if record.get("plan") is not None else ""
    if not asked:
        raise BadRecord("empty prompt", "question is empty: nothing tells what the answer is to")
    if not answer:
        raise BadRecord("empty completion", "answer is empty: there is nothing to learn")
    if leaks_answer(plan, answer, question=asked):
        raise BadRecord(
            "plan leaks the answer", f"plan {plan!r} holds the answer {answer!r}: a plan says how, not what comes out"
        )
    return Planned(asked, plan, steps, answer)


def leaks_answer(plan: str, answer: str, *, question: str = "") -> bool:
    """Whether a plan tells the answer: it stands there as a word of its own, and not in the question already.

    Case and outer white space do not count; numbers count by their value, with or without commas and final zeros.

    >>> leaks_answer("add 3, then double: 1,024", "1024"), leaks_answer("add 3", "3", question="what is 0 + 3?")
    (True, False)
    """
    said, asked, wanted = (_WORD.findall(text.casefold()) for text in (plan, question, answer))
    said, asked, wanted = ([_number(word) for word in words] for words in (said, asked, wanted))
    return bool(wanted) and _holds(said, wanted) and not _holds(asked, wanted)


_WORD = re.compile(r"-?\d[\d,]*\.?\d*|[^\W\d_]+")


def _number(word: str) -> str | float:
    digits = word.replace(",", "").rstrip(".")
    return float(digits) if digits.lstrip("-")[:1].isdigit() else word


def _holds(words: list[str | float], wanted: list[str | float]) -> bool:
    return any(words[i : i + len(wanted)] == wanted for i in range(len(words) - len(wanted) + 1))


def _preference(prompt: str, chosen: str, rejected: str) -> Preference:
    if not prompt:
        raise BadRecord("empty prompt", "prompt is empty: nothing tells what the answers are to")
    for name, answer in {"chosen": chosen, "rejected": rejected}.items():
        if not answer.strip():
            raise BadRecord("empty completion", f"{name} is empty: there is nothing to prefer")
    if chosen == rejected:
        raise BadRecord("equal answers", "chosen and rejected are the same text: there is nothing to prefer")
    return Preference(prompt, chosen, rejected)


def _text(record: Mapping[str, Any], name: str) -> str:
    if record.get(name) is None:
        raise BadRecord("missing field", f"field {name!r} is missing; the record has {sorted(map(str, record))}")
    if not isinstance(record[name], str):
        raise BadRecord("wrong type", f"field {name!r} must be text, got {type(record[name]).__name__}")
    return record[name]


def _chat(messages: Any) -> Chat:
    if isinstance(messages, str | bytes) or not hasattr(messages, "__iter__"):
        raise BadRecord("wrong type", f"'messages' must be a list of messages, got {type(messages).__name__}")
    checked = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise BadRecord("wrong type", f"message {index} must be an object, got {type(message).__name__}")
        extra = sorted(name for name, value in message.items() if name not in ("role", "content") and value is not None)
        if extra:
            raise BadRecord("unknown field", f"message {index} has {extra}; only 'role' and 'content' are used")
        for name in ("role", "content"):
            if message.get(name) is None:
                raise BadRecord("missing field", f"message {index} has no {name!r}")
            if not isinstance(message[name], str):
                kind = type(message[name]).__name__
                raise BadRecord("wrong type", f"{name!r} of message {index} must be text, got {kind}")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise BadRecord(
                "unknown role", f"message {index} has the unknown role {role!r}; roles are {', '.join(ROLES)}"
            )
        if role == "assistant" and not content.strip():
            raise BadRecord("empty completion", f"message {index} of the assistant is empty: there is nothing to learn")
        checked.append({"role": role, "content": content})
    if not any(message["role"] == "assistant" for message in checked):
        raise BadRecord("no trainable token", "no message of the assistant: there is nothing to learn")
    return Chat(tuple(checked))
