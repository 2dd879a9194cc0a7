# SPDX-License-Identifier: Apache-2.0
"""`a.b=c` on the command line: text becomes a value by the declared type of a dataclass field, and is never evaluated.

All overrides are read into one tree before anything is built: fields that check each other may change together.
"""

import collections.abc
import dataclasses
import difflib
import json
import types
import typing
from typing import Any

_BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclasses.dataclass
class _Node:
    """The text given for one field, and what was given for the fields inside it."""

    text: str | None = None
    inside: dict[str, "_Node"] = dataclasses.field(default_factory=dict)


def override(config: Any, overrides: collections.abc.Iterable[str]) -> Any:
    """A copy of a tree of frozen dataclasses with some fields set from text.

    Args:
      config: a dataclass; its fields may hold dataclasses, tuples of them, or mappings.
      overrides: `path=value`. A path joins field names, tuple indices and mapping keys with dots. The value is read by
        the field's type: numbers, `true`/`false`, `none`, one of a `Literal`; a tuple as `a,b` or as a JSON list; a
        dataclass out of a union by its class name, with its fields in overrides of their own. The last one given wins.
    Raises: ValueError for an unknown name (with the nearest one) or a value that does not fit its field.

    >>> from jaxlm.nn import ModelConfig
    >>> model = ModelConfig(vocab_size=32, width=16, num_layers=2, num_heads=2)
    >>> override(model, ["width=32", "windows=128,none"]).windows
    (128, None)
    >>> override(model, ["positions=Alibi"]).positions, override(model, ["positions.base=500"]).positions.base
    (Alibi(), 500.0)
    >>> override(model, ["widht=32"])
    Traceback (most recent call last):
    ValueError: ModelConfig has no field 'widht'; did you mean 'width'?
    """
    root = _Node()
    for item in overrides:
        path, equals, text = item.partition("=")
        if not equals or not path:
            raise ValueError(f"an override looks like run.steps=100, got {item!r}")
        node = root
        for name in path.split("."):
            node = node.inside.setdefault(name, _Node())
        node.text = text
    return _apply(config, type(config), root, "")


def field_types(cls: type) -> dict[str, Any]:
    """The declared type of every field that a dataclass takes when it is made, in order."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _apply(value: Any, declared: Any, node: _Node, path: str) -> Any:
    """`value` with the overrides of `node` in it."""
    if node.text is not None:
        value = _choose_class(value, declared, node, path) if node.inside else _parse(node.text, declared, path, value)
    if not node.inside:
        return value
    if value is None:
        value = _only_class(declared, node, path)
    if isinstance(value, type):
        return _build(value, {}, node, path)
    if dataclasses.is_dataclass(value):
        return _build(type(value), {name: getattr(value, name) for name in field_types(type(value))}, node, path)
    if isinstance(value, tuple):
        return _in_tuple(value, declared, node, path)
    if isinstance(value, collections.abc.Mapping):
        inner = _mapping_value(declared)
        return dict(value) | {k: _apply(value.get(k), inner, child, _join(path, k)) for k, child in node.inside.items()}
    raise ValueError(f"{path} is {value!r}, which has no field {next(iter(node.inside))!r}")


def _build(cls: type, values: dict[str, Any], node: _Node, path: str) -> Any:
    """An instance of `cls` made of `values` and the overrides inside `node`."""
    declared = field_types(cls)
    for name, child in node.inside.items():
        if name not in declared:
            raise ValueError(f"{cls.__name__} has no field {name!r}{_suggestion(cls, name, declared)}")
        present = values[name] if name in values else _default(cls, name)
        values[name] = _apply(present, declared[name], child, _join(path, name))
    needed = [f.name for f in dataclasses.fields(cls) if f.init and f.name not in values and _required(f)]
    if needed:
        raise ValueError(f"{cls.__name__} needs {needed[0]}: give {_join(path, needed[0])}=...")
    if unchosen := [name for name, value in values.items() if isinstance(value, type)]:
        values |= {name: _build(values[name], {}, _Node(), _join(path, name)) for name in unchosen}
    return cls(**values)


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(cls: type, name: str) -> Any:
    """What a field is when it is not given; None where it must be."""
    (field,) = (field for field in dataclasses.fields(cls) if field.name == name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _in_tuple(value: tuple, declared: Any, node: _Node, path: str) -> tuple:
    items = list(value)
    for key, child in node.inside.items():
        if not key.isdecimal() or int(key) >= len(items):
            raise ValueError(f"{path} has the items 0 to {len(items) - 1}, got {key!r}")
        index = int(key)
        items[index] = _apply(items[index], _item_type(declared, index), child, _join(path, key))
    return tuple(items)


def _parse(text: str, declared: Any, path: str, current: Any = None) -> Any:
    """Text as a value of the declared type; a dataclass comes back as its class."""
    for kind in _by_strictness(declared):
        try:
            return _parse_as(text, kind, path, current)
        except (ValueError, KeyError):
            continue
    hint = ""
    if choices := [str(a) for kind in _alternatives(declared) for a in _literals(kind)]:
        near = difflib.get_close_matches(text, choices, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
    if classes := [kind for kind in _alternatives(declared) if dataclasses.is_dataclass(kind)]:
        fields = ", ".join(f"{_join(path, name)}=..." for name in field_types(typing.cast(type, classes[0])))
        hint = f"; set its fields instead: {fields}"
        names = {typing.cast(type, kind).__name__.lower(): typing.cast(type, kind).__name__ for kind in classes}
        if near := difflib.get_close_matches(text.lower(), names, 1):
            hint = f"; did you mean {names[near[0]]!r}?"
    raise ValueError(f"{path} must be {type_name(declared)}, got {text!r}{hint}")


def _parse_as(text: str, kind: Any, path: str, current: Any) -> Any:
    """Text as one plain kind; ValueError or KeyError where it does not fit."""
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return {str(choice): choice for choice in _literals(kind)}[text]
    if kind is types.NoneType:
        return {"none": None, "null": None}[text.lower()]
    if kind is bool:
        return _BOOLS[text.lower()]
    if kind is int:
        return _integer(text)
    if kind is float:
        number = float(text)
        if number != number:
            raise ValueError(text)
        return number
    if kind is str:
        return text
    if kind is tuple or origin is tuple:
        return _parse_tuple(text, kind, path)
    if dataclasses.is_dataclass(kind) and text == typing.cast(type, kind).__name__:
        return current if isinstance(current, typing.cast(type, kind)) else kind
    if kind is Any or kind is dict or origin in (dict, collections.abc.Mapping):
        if dataclasses.is_dataclass(current):
            raise ValueError(text)
        return _json_or_text(text) if kind is Any else dict(json.loads(text))
    raise ValueError(text)


def _parse_tuple(text: str, kind: Any, path: str) -> tuple:
    if text.lstrip().startswith("["):
        items = [item if isinstance(item, str) else json.dumps(item) for item in json.loads(text)]
    else:
        items = [item.strip() for item in text.split(",") if item.strip()]
    fixed = typing.get_args(kind)
    if fixed and Ellipsis not in fixed and len(items) != len(fixed):
        raise ValueError(text)
    return tuple(_parse(item, _item_type(kind, i), f"{path}.{i}") for i, item in enumerate(items))


def _integer(text: str) -> int:
    """An integer, `1e4` and `1_000` too."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise
        return int(number)


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"none": None, "True": True, "False": False}.get(text, text)


def _choose_class(value: Any, declared: Any, node: _Node, path: str) -> Any:
    """The class that `node` names and whose fields it sets; the present value where it is of that class."""
    chosen = _parse(node.text or "", declared, path, value)
    if chosen is not None and not isinstance(chosen, type) and not dataclasses.is_dataclass(chosen):
        raise ValueError(f"{path}={node.text} cannot be set together with {_join(path, next(iter(node.inside)))}")
    return chosen


def _only_class(declared: Any, node: _Node, path: str) -> type:
    classes = [kind for kind in _alternatives(declared) if dataclasses.is_dataclass(kind)]
    if len(classes) != 1:
        names = " or ".join(f"{path}={typing.cast(type, kind).__name__}" for kind in classes)
        choose = f"choose {names} first" if names else f"it is of type {type_name(declared)}"
        raise ValueError(f"{path} is None and has no field {next(iter(node.inside))!r}: {choose}")
    return typing.cast(type, classes[0])


def _alternatives(declared: Any) -> tuple:
    """The members of a union; any other type alone."""
    union = typing.get_origin(declared) in (typing.Union, types.UnionType)
    return typing.get_args(declared) if union else (declared,)


def _by_strictness(declared: Any) -> list:
    """The members of a union, those first that accept the least text."""
    order = [types.NoneType, bool, int, float, str]

    def rank(kind: Any) -> float:
        if typing.get_origin(kind) is typing.Literal:
            return -1
        return order.index(kind) if kind in order else 3.5

    return sorted(_alternatives(declared), key=rank)


def _literals(kind: Any) -> tuple:
    return typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()


def _item_type(declared: Any, index: int) -> Any:
    """The type of one item of a tuple, `Any` where none is declared."""
    for kind in _alternatives(declared):
        if typing.get_origin(kind) is tuple:
            args = typing.get_args(kind)
            return args[0] if Ellipsis in args else args[index]
    return Any


def _mapping_value(declared: Any) -> Any:
    for kind in _alternatives(declared):
        if typing.get_origin(kind) in (dict, collections.abc.Mapping):
            return typing.get_args(kind)[1]
    return Any


def type_name(declared: Any) -> str:
    """How a type is written in a message: `int | None`, `'rms' | 'layer'`, `tuple of int`."""
    if choices := _literals(declared):
        return " | ".join(repr(choice) for choice in choices)
    if len(_alternatives(declared)) > 1:
        return " | ".join(type_name(kind) for kind in _alternatives(declared))
    if typing.get_origin(declared) is tuple:
        return "tuple of " + type_name(_item_type(declared, 0))
    return "None" if declared is types.NoneType else getattr(declared, "__name__", str(declared))


def _suggestion(cls: type, name: str, declared: dict[str, Any]) -> str:
    """What to write instead of a field that is not there."""
    if near := difflib.get_close_matches(name, declared, 1):
        return f"; did you mean {near[0]!r}?"
    for outer, kind in declared.items():
        for inner in _alternatives(kind):
            if isinstance(inner, type) and dataclasses.is_dataclass(inner) and name in field_types(inner):
                return f"; did you mean '{outer}.{name}'?"
    return f"; it has {', '.join(declared)}"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
