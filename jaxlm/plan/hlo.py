# SPDX-License-Identifier: Apache-2.0
"""Collectives and matrix products of a compiled program, read from its HLO text; loops count as often as they run."""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8}
_ARRAY = re.compile(r"\b(pred|bf16|f8\w+|[fsuc]\d+)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_CODE = re.compile(r"^(?P<type>\(.*?\)|\S+) (?P<code>[\w\-]+)\((?P<rest>.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))")


class Collective(NamedTuple):
    """One instruction that moves data between devices.

    Attributes:
      kind: one of KINDS.
      payload: bytes of the whole array on a device: what is gathered, reduced or sent.
      groups: devices that take part together, by their place in the mesh; of a permute, (source, target) pairs.
      times: how often it runs in a step.
      sometimes: it stands in a branch that not every step takes.
    """

    kind: str
    payload: int
    groups: tuple[tuple[int, ...], ...]
    times: int
    sometimes: bool

    @property
    def size(self) -> int:
        """Devices of a group."""
        return max(map(len, self.groups), default=1)

    @property
    def sent(self) -> float:
        """Bytes that leave a device each time, by the bandwidth-optimal ring."""
        share = (self.size - 1) / self.size
        return {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share) * self.payload

    def leaves(self, joined: int) -> bool:
        """Whether a group reaches beyond blocks of `joined` neighbouring devices; 0: everything is one block."""
        return joined > 0 and any(len({device // joined for device in group}) > 1 for group in self.groups)


class Program(NamedTuple):
    """What was read.

    Attributes:
      collectives: in no particular order.
      flops: of the matrix products that every step makes on one device; a multiply and an add are two.
      unknown_loops: loops whose number of turns the text does not tell; they count once.
    """

    collectives: tuple[Collective, ...]
    flops: float
    unknown_loops: int


class _Instruction(NamedTuple):
    name: str
    type: str
    code: str
    rest: str


def read_program(text: str) -> Program:
    """Reads what `compiled.as_text()` gives.

    Raises: ValueError for a text without an entry computation, or with groups in a form that is not known.

    >>> text = '''ENTRY %main (x: f32[2,4]) -> f32[8,4] {
    ...   %x = f32[2,4]{1,0} parameter(0)
    ...   ROOT %all = f32[8,4]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
    ... }'''
    >>> (one,) = read_program(text).collectives
    >>> one.kind, one.payload, one.sent, one.groups
    ('all-gather', 128, 96.0, ((0, 1, 2, 3), (4, 5, 6, 7)))
    """
    computations, entry = _computations(text)
    match = re.search(r"num_partitions=(\d+)", text)
    devices = int(match[1]) if match else 1
    found: list[Collective] = []
    flops, unknown = 0.0, 0
    waiting = collections.deque([(entry, 1, False)])
    while waiting:
        name, times, sometimes = waiting.popleft()
        shapes = {line.name: line.type for line in computations[name]}
        for line in computations[name]:
            kind = line.code.removesuffix("-start")
            if kind in KINDS:
                payload = _payload(kind, line, shapes)
                found.append(Collective(kind, payload, _groups(line.rest, devices), times, sometimes))
                continue  # what it applies to pairs of numbers is of no interest
            if line.code == "dot" and not sometimes:
                flops += times * _product(line, shapes)
            turns = 1
            if line.code == "while":
                turns = _turns(line.rest)
                unknown += turns == 0
                turns = max(turns, 1)
            inside = _branches(line.rest)
            waiting.extend((branch, times, True) for branch in inside)
            if not inside:
                waiting.extend((one, times * turns, sometimes) for one in _CALLED.findall(line.rest))
    return Program(tuple(found), flops, unknown)


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    found: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for raw in text.splitlines():
        line = re.sub(r"/\*.*?\*/", "", raw)
        if header := _HEADER.match(line):
            current = found.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (match := _LINE.match(line)) and (code := _CODE.match(match[2])):
            current.append(_Instruction(match[1], code["type"], code["code"], code["rest"]))
    if not entry:
        raise ValueError("this is no HLO text of a compiled program: it has no ENTRY; give compiled.as_text()")
    return found, entry


def _arrays(text: str) -> Iterator[tuple[int, list[int]]]:
    """Bytes of an entry, and sides, of every array in a type."""
    for dtype, sides in _ARRAY.findall(text):
        bits = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype))
        yield max(1, bits // 8), [int(side) for side in sides.split(",") if side]


def _bytes(text: str) -> int:
    return sum(size * math.prod(sides) for size, sides in _arrays(text))


def _operands(rest: str, shapes: dict[str, str]) -> list[str]:
    """Types of the operands: written out, or looked up by name."""
    depth, end = 1, 0
    while depth and end < len(rest):
        depth += {"(": 1, ")": -1}.get(rest[end], 0)
        end += 1
    inner = rest[: end - 1]
    names = re.findall(r"%?([\w.\-]+)(?=,|$)", re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", inner))
    types = [shapes[name] for name in names if name in shapes]
    return types or ([inner] if _ARRAY.search(inner) else [])


def _payload(kind: str, line: _Instruction, shapes: dict[str, str]) -> int:
    operands = sum(map(_bytes, _operands(line.rest, shapes)))
    if kind in ("reduce-scatter", "all-reduce", "all-to-all", "collective-permute") and operands:
        return operands
    whole = _bytes(line.type)
    return whole - operands if line.code.endswith("-start") else whole  # a start returns its operands too


def _groups(rest: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Groups by device, from any of the forms that XLA writes; none given: all devices are one."""
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest):
        return _rows(_ordered(match[2]).reshape(_numbers(match[1])))
    if match := re.search(
        r"replica_groups=mesh\[(?P<axes>[^\]]*)\](?:, device_ids=\((?P<order>[^ ]*)\))? \{(?P<chosen>[^}]*)\}", rest
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match["axes"])}
        chosen = [part.strip().strip("'") for part in match["chosen"].split(",")]
        if not set(chosen) <= set(sizes):
            raise ValueError(f"cannot read the groups of a collective: {match[0]}; add the form to jaxlm/plan/hlo.py")
        order = _ordered(match["order"] or f"[{math.prod(sizes.values())}]").reshape(list(sizes.values()))
        places = [list(sizes).index(name) for name in chosen]
        moved = np.moveaxis(order, places, range(-len(places), 0))
        return _rows(moved.reshape(-1, math.prod(sizes[name] for name in chosen)))
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", rest):
        return tuple(tuple(_numbers(one)) for one in re.findall(r"\{([\d,]+)\}", match[1]))
    if "replica_groups={}" in rest or "replica_groups" not in rest:
        return (tuple(range(devices)),)
    raise ValueError(f"cannot read the groups of a collective: {rest[:200]}; add the form to jaxlm/plan/hlo.py")


def _numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x]


def _ordered(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: the devices 0 .. 7, laid out [4, 2] and transposed."""
    sides, _, order = text.removeprefix("[").partition("]")
    devices = np.arange(math.prod(_numbers(sides))).reshape(_numbers(sides))
    return devices.transpose(_numbers(order.removeprefix("T(").removesuffix(")"))) if order else devices


def _rows(groups: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in groups.tolist())


def _product(line: _Instruction, shapes: dict[str, str]) -> float:
    left = next(_arrays(_operands(line.rest, shapes)[0]))[1]
    match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.rest)
    summed = [int(x) for x in match[1].split(",") if x] if match else []
    return 2.0 * math.prod(next(_arrays(line.type))[1]) * math.prod(left[i] for i in summed)


def _turns(rest: str) -> int:
    """How often a loop runs; 0 where the text does not tell."""
    match = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
    return int(match[1]) if match else 0


def _branches(rest: str) -> list[str]:
    found = []
    for several, one in _BRANCHES.findall(rest):
        found += [one] if one else [name.strip().lstrip("%") for name in several.split(",")]
    return found
