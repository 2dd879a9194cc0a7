# SPDX-License-Identifier: Apache-2.0
"""Records with plans to rows with room for a capsule, in buckets of length.

A row of K capsule tokens, one record:  x <cap> [e_1 .. e_K] </cap> s <ans> y <eos>
made in steps:     x to the left of a common column, padding before it; e_1 follows in column P
made in parallel:  from the left, several records a row, each a segment

B rows, T tokens, P prompt columns with `<cap>`, M segments of a row, J plan tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from jaxlm.data.records import BadRecord, Planned, parse
from jaxlm.generate.texts import prompt_tokens
from jaxlm.nn.decoder import EMBEDDED

Batch = dict[str, Any]  # of NumPy arrays
Targets = Literal["answer", "steps_and_answer", "plan_steps_and_answer"]
CAP, END, ANSWER = MARKS = ("<cap>", "</cap>", "<ans>")


class Marks(NamedTuple):
    """Ids of the three tokens that frame a capsule and the answer."""

    cap: int
    end: int
    answer: int


def add_marks(tokenizer: PreTrainedTokenizerFast) -> Marks:
    """Gives the tokenizer the three tokens, unless it has them already; `<ans>` is decoded, the others are not.

    Raises: ValueError for a tokenizer that has one of them as ordinary text.
    """
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    for mark in MARKS:
        if mark in tokenizer.get_vocab() and mark not in added:
            raise ValueError(f"the tokenizer already uses {mark!r} as ordinary text: it cannot mark a capsule with it")
    tokenizer.add_tokens([AddedToken(CAP, special=True, normalized=False)], special_tokens=True)
    tokenizer.add_tokens([AddedToken(END, special=True, normalized=False)], special_tokens=True)
    tokenizer.add_tokens([AddedToken(ANSWER, special=False, normalized=False)])
    ids = tokenizer.get_vocab()
    return Marks(*(int(ids[mark]) for mark in MARKS))


class Encoded(NamedTuple):
    """One record as token ids: what is asked, its plan with the end marker, what follows with `<ans>` and the end."""

    prompt: list[int]
    plan: list[int]
    text: list[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How records become rows.

    Attributes:
      num_capsules: K.
      in_steps: whether capsules are made one token after the other, which wants `<cap>` in one column.
      targets: what follows the capsule, all of it learnt: the answer alone, the steps before it, or the plan too.
      prompts: "raw", the question as it is; "chat", as a turn of the user, by the tokenizer's template.
      plans: whether plans are wanted in the batch, and that every record has one.
      max_plan: tokens of a plan with its end marker.
      long_plans: "refuse" or "truncate".
      bucket: lengths are rounded up to multiples of it, so that few programs are compiled.
    """

    num_capsules: int
    in_steps: bool
    targets: Targets
    prompts: Literal["raw", "chat"]
    plans: bool
    max_plan: int
    long_plans: Literal["refuse", "truncate"]
    bucket: int


class PlanEncoder:
    """Records to token ids.

    Args:
      tokenizer: with the marks.
      layout: what is wanted of a record.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, layout: Layout):
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos token, so no end can be learnt: set tokenizer.eos_token")
        self._tokenizer, self._layout, self.marks = tokenizer, layout, add_marks(tokenizer)

    def __call__(self, record: Any, place: str) -> Encoded:
        """One record.

        Args:
          place: where it is, for errors.
        Raises: ValueError for one without a question, without a plan where one is wanted, or with a mark in its text.
        """
        try:
            parsed = parse(record)
        except BadRecord as error:
            raise ValueError(f"{place}: {error}") from error
        if not isinstance(parsed, Planned):
            raise ValueError(f"{place}: r_capsule wants 'question', 'plan', 'steps' and 'answer', got {sorted(record)}")
        if self._layout.plans and not parsed.plan:
            raise ValueError(
                f"{place}: the record has no plan, and recon_weight > 0 rebuilds one: give plans, or set "
                "method.recon_weight=0 or method.recon=none"
            )
        for name, text in parsed._asdict().items():
            if found := [mark for mark in MARKS if mark in text]:
                raise ValueError(f"{place}: {name} holds {found[0]!r}, which only the layout may write")
        text = []
        if self._layout.targets == "plan_steps_and_answer":
            text += self._ids(parsed.plan + "\n" if parsed.plan else "")
        if self._layout.targets != "answer":
            text += self._ids(parsed.steps)
        eos = self._tokenizer.eos_token_id
        answer = self._ids(parsed.answer)
        if not answer:
            shown = self._tokenizer.decode(text)
            raise ValueError(f"{place}: no token is left to learn after {shown!r}: the answer is empty as tokens")
        text += [self.marks.answer, *answer, eos]
        asked: Any = parsed.question
        if self._layout.prompts == "chat":
            asked = [{"role": "user", "content": parsed.question}]
        plan = [*self._ids(parsed.plan), eos] if parsed.plan else []
        return Encoded(prompt_tokens(self._tokenizer, asked).tolist(), plan, text)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False)) if text else []


def assemble(
    rows: Sequence[Sequence[tuple[int, int, Encoded]]],
    layout: Layout,
    marks: Marks,
    part: Sequence[int] | np.ndarray | None = None,
) -> Batch:
    """Rows of records as a batch.

    Args:
      rows: of each row its (task id, record id, record); one a row where capsules are made in steps; none: padding.
      layout, marks: how.
      part: indices of the rows that are wanted; None: all. All rows decide how wide those are.
    Returns: `tokens` (`EMBEDDED` in the places of a capsule), `loss_weights`, `positions`, `segment_ids`, `task_ids`,
      `record_ids`, `capsule_ids` (1 .. K in those places, else 0), all [B, T]; in steps `prompt_mask` [B, P];
      where plans are wanted `plan_tokens`, `plan_mask` [B, M, J].
    Raises: ValueError for several records in a row where capsules are made in steps.
    """
    K = layout.num_capsules
    frame = [marks.cap] if K else []
    back = [EMBEDDED] * K + [marks.end] * (K > 0)
    if layout.in_steps and max(map(len, rows), default=0) > 1:
        raise ValueError('a row holds several records, and capsules made in steps want one: set data.packing="none"')

    part = range(len(rows)) if part is None else part
    B = len(part)

    def widest(lengths: Iterator[int]) -> int:
        return -(-max(lengths, default=1) // layout.bucket) * layout.bucket

    P = widest(len(r.prompt) + 1 for row in rows for _, _, r in row) if layout.in_steps else 0
    T = P + K + widest(1 + len(r.text) for row in rows for _, _, r in row)
    if not layout.in_steps:
        T = widest(sum(len(r.prompt) + len(frame) + len(back) + len(r.text) for _, _, r in row) for row in rows)
    names = ("tokens", "positions", "segment_ids", "task_ids", "capsule_ids")
    batch: Batch = {name: np.zeros((B, T), np.int32) for name in names}
    batch |= {"record_ids": np.full((B, T), -1, np.int32), "loss_weights": np.zeros((B, T), np.float32)}
    for b, row in enumerate(rows[index] for index in part):
        at = P - len(row[0][2].prompt) - 1 if layout.in_steps and row else 0
        for segment, (task, number, record) in enumerate(row, 1):
            ids = [*record.prompt, *frame, *back, *record.text]
            here = slice(at, at + len(ids))
            begin = at + len(ids) - len(record.text)
            batch["tokens"][b, here] = ids
            batch["positions"][b, here] = np.arange(len(ids))
            batch["segment_ids"][b, here] = segment
            batch["task_ids"][b, here] = task
            batch["record_ids"][b, here] = number
            batch["loss_weights"][b, begin : here.stop] = 1.0
            if K:
                batch["capsule_ids"][b, begin - K - 1 : begin - 1] = np.arange(1, K + 1)
            at = here.stop
    if layout.in_steps:
        batch["prompt_mask"] = batch["segment_ids"][:, :P] > 0
    return batch | (_plans(rows, layout, part) if layout.plans else {})


def _plans(
    rows: Sequence[Sequence[tuple[int, int, Encoded]]], layout: Layout, part: Sequence[int] | np.ndarray
) -> Batch:
    longest = max((len(r.plan) for row in rows for _, _, r in row), default=1)
    J = min(-(-longest // layout.bucket) * layout.bucket, layout.max_plan)
    M = 1 if layout.in_steps else 1 << (max(1, max(map(len, rows), default=1)) - 1).bit_length()
    shape = (len(part), M, J)
    found = {"plan_tokens": np.zeros(shape, np.int32), "plan_mask": np.zeros(shape, np.float32)}
    for b, row in enumerate(rows[index] for index in part):
        for m, (_, _, record) in enumerate(row):
            plan = record.plan[:J]
            found["plan_tokens"][b, m, : len(plan)] = plan
            found["plan_mask"][b, m, : len(plan)] = 1.0
    return found


class PlanBatches:
    """An endless iterator of batches made of the records that rows name; what it keeps is the records' own state.

    Args:
      layout: how.
      tokenizer: that gets the marks.
      record: `(task_id, record_id) -> record`; its `everything()`, where it has one, is looked through once at first.
      describe: `(task_id, record_id) -> place`.
      records: batches of rows with `task_ids`, `segment_ids`, `record_ids`; whole ones on every process, because the
        longest of all rows decides how wide a batch is.
      visible_plan_steps: batches at first whose plans stand as text between the question and `<cap>`.
      part: indices in a batch of the rows that this process feeds; None: all.
    Raises: ValueError, before the first batch, for plans that are too long, with their number.
    """

    def __init__(
        self,
        layout: Layout,
        tokenizer: PreTrainedTokenizerFast,
        record: Callable[[int, int], Any],
        describe: Callable[[int, int], str],
        records: Any,
        *,
        visible_plan_steps: int = 0,
        part: Sequence[int] | np.ndarray | None = None,
    ):
        self._part = part
        self._layout, self._records, self._visible = layout, records, visible_plan_steps
        self._encode, self._record, self._describe = PlanEncoder(tokenizer, layout), record, describe
        self._tokenizer, self._step = tokenizer, 0
        self._known: dict[tuple[int, int], Encoded] = {}
        if layout.plans and hasattr(record, "everything"):
            check_plans(self._encode, record.everything(), describe, layout)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self.batch(next(self._records), visible=self._step < self._visible)
        self._step += 1
        return batch

    def batch(self, given: Mapping[str, np.ndarray], *, visible: bool = False) -> Batch:
        """The batch of the records that rows name; `visible`: their plans stand as text before `<cap>`."""
        rows = []
        for tasks, segments, numbers in zip(given["task_ids"], given["segment_ids"], given["record_ids"], strict=True):
            firsts = [np.flatnonzero(segments == s)[0] for s in range(1, int(segments.max(initial=0)) + 1)]
            row = [(int(tasks[i]), int(numbers[i])) for i in firsts]
            rows.append([(*who, self._shown(self._encoded(*who), visible)) for who in row])
        return assemble(rows, self._layout, self._encode.marks, self._part)

    def _encoded(self, task_id: int, record_id: int) -> Encoded:
        if (task_id, record_id) not in self._known:
            record, place = self._record(task_id, record_id), self._describe(task_id, record_id)
            self._known[task_id, record_id] = self._encode(record, place)
        return self._known[task_id, record_id]

    def _shown(self, record: Encoded, visible: bool) -> Encoded:
        if not visible or not record.plan:
            return record
        newline = self._tokenizer.encode("\n", add_special_tokens=False)
        return record._replace(prompt=[*record.prompt, *newline, *record.plan[:-1]])

    def get_state(self) -> dict[str, Any]:
        """Where the records stand, and how many batches there were."""
        return {"records": self._records.get_state(), "step": self._step}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on where `get_state` was called."""
        self._records.set_state(state["records"])
        self._step = int(state["step"])


def check_plans(
    encode: PlanEncoder, records: Iterator[tuple[int, int, Any]], describe: Callable[[int, int], str], layout: Layout
) -> None:
    """Looks through all records before the first batch.

    Raises: ValueError for a record without a plan, and for plans longer than `max_plan`, with their number and the
      longest, unless they may be cut.
    """
    long, total, most, place = 0, 0, 0, ""
    for task_id, record_id, record in records:
        try:
            parsed = parse(record)
        except BadRecord:
            continue  # the preparation has named or counted it
        where = functools.partial(describe, task_id, record_id)
        if not isinstance(parsed, Planned) or not parsed.plan:
            encode(record, where())  # says what is missing
            continue
        total += 1
        if len(parsed.plan.encode()) + 2 <= layout.max_plan:
            continue  # no token is shorter than a byte
        length = len(encode(record, where()).plan)
        long += length > layout.max_plan
        if length > most:
            most, place = length, where()
    if long and layout.long_plans == "refuse":
        raise ValueError(
            f"{long} of {total} plans are longer than max_plan {layout.max_plan} tokens, the longest ({place}) has "
            f"{most}: raise method.max_plan, or set method.long_plans=truncate"
        )
