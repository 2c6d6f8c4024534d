"""Plain nested dicts to the frozen dataclasses of schema.py and back. Standard library only."""

import dataclasses
import difflib
import functools
import hashlib
import json
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from moesys.config.errors import ConfigError, Problem, did_you_mean
from moesys.config.schema import ComponentConfig, RunConfig

T = TypeVar("T")

_INVALID: Any = object()
_NAMES = {bool: "true or false", int: "an integer", float: "a finite number", str: "text"}
_TEXTS, _INTEGERS, _NAMED_TEXTS = tuple[str, ...], tuple[int, ...], Mapping[str, str]
_LISTS = {_TEXTS: str, _INTEGERS: int}


def build(schema: type[T], data: Mapping[str, Any]) -> T:
    """Build the dataclass `schema` from a nested dict.

    Types are strict: true is not 1, "3" is not 3; the one conversion is int to float.

    Raises:
        ConfigError: every unknown key, missing key and wrong type, at once.
    """
    problems: list[Problem] = []
    value = _build_section(schema, data, "", schema, problems)
    if problems:
        raise ConfigError(problems)
    return value


def check_value(hint: Any, value: Any, key: str) -> list[Problem]:
    """What is wrong with `value` for the type `hint`; nothing for types that YAML cannot spell."""
    problems: list[Problem] = []
    if is_checkable(hint):
        _convert(hint, value, key, RunConfig, problems)
    return problems


def is_checkable(hint: Any) -> bool:
    """Whether `hint` is a type that a schema may use for a leaf."""
    members = [part for part in _members(hint) if part is not type(None)]
    if len(members) != 1:
        return False
    return members[0] in _NAMES or typing.get_origin(members[0]) is Literal


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of `build`: a nested dict of plain values in schema order."""
    if isinstance(config, ComponentConfig):
        return {"_target_": config.target, **config.options}
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, tuple):
        return list(value)
    return to_dict(value) if dataclasses.is_dataclass(value) else value


def config_hash(config: Any) -> str:
    """sha256 of the canonical JSON of a configuration or a section, 64 hex digits. Equal ones have equal hashes on every rank."""
    text = json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def leaf_types(schema: type) -> Mapping[str, Any]:
    """Dotted key -> type of every leaf. A component counts as one leaf that holds free keys."""
    leaves: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(schema).items():
        if dataclasses.is_dataclass(hint) and hint is not ComponentConfig:
            nested = leaf_types(typing.cast(type, hint))
            leaves |= {f"{name}.{key}": leaf for key, leaf in nested.items()}
        else:
            leaves[name] = hint
    return types.MappingProxyType(leaves)


def unknown_key(key: str, schema: type = RunConfig, given: Any = None) -> Problem | None:
    """The problem with a dotted key that `schema` does not have; None if it does, or if it is a section."""
    leaves = leaf_types(schema)
    for known, hint in leaves.items():
        if key == known or known.startswith(f"{key}."):
            return None
        if ComponentConfig in _members(hint) and key.startswith(f"{known}."):
            return None
        if (section := section_by_name(hint)) and key.startswith(f"{known}."):
            name, _, inner = key.removeprefix(f"{known}.").partition(".")
            problem = unknown_key(inner, section, given) if inner else None
            return problem and dataclasses.replace(problem, key=f"{known}.{name}.{problem.key}")
    inside = [known for known in leaves if key.startswith(f"{known}.")]
    if inside:
        fix = f"{inside[0]} is a single value, not a section: set {inside[0]} itself"
    else:
        fix = _suggest_key(key, leaves)
    return Problem(key=key, given=given, rule="is not a configuration key", fix=fix)


def section_by_name(hint: Any) -> Any:
    """The section of which `hint` holds any number by name, e.g. data.sources; None if it is no such type."""
    if typing.get_origin(hint) is not Mapping:
        return None
    section = typing.get_args(hint)[1]
    return section if dataclasses.is_dataclass(section) else None


def describe(hint: Any) -> str:
    """A type in a user's words: "an integer", "one of drop, pad", "a finite number or null"."""
    words = []
    for part in _members(hint):
        if part is type(None):
            words.append("null")
        elif typing.get_origin(part) is Literal:
            words.append(f"one of {', '.join(map(str, typing.get_args(part)))}")
        elif part is ComponentConfig:
            words.append("a section with _target_ and options")
        elif part == _TEXTS:
            words.append("a list of texts")
        elif part == _INTEGERS:
            words.append("a list of integers")
        elif part == _NAMED_TEXTS:
            words.append("texts by name")
        elif section_by_name(part):
            words.append("sections by name")
        else:
            words.append(_NAMES.get(part, "a section"))
    return " or ".join(words)


def _suggest_key(key: str, leaves: Mapping[str, Any]) -> str:
    """The same name elsewhere first, then close names in the same section, then close paths."""
    section, dot, name = key.rpartition(".")
    within = section + dot
    inside = [known.removeprefix(within) for known in leaves if known.startswith(within)]
    by_name = {known: within + known for known in (k.partition(".")[0] for k in inside)}
    matches = [known for known in leaves if known.rpartition(".")[2] == name]
    close = difflib.get_close_matches(name, by_name, n=2, cutoff=0.7)
    matches += [by_name[match] for match in close]
    matches += difflib.get_close_matches(key, leaves, n=2, cutoff=0.75)
    if not matches:
        elsewhere: dict[str, str] = {}
        for known in leaves:
            elsewhere.setdefault(known.rpartition(".")[2], known)
        matches = [
            elsewhere[m] for m in difflib.get_close_matches(name, elsewhere, n=3, cutoff=0.6)
        ]
    if matches:
        return f"did you mean {' or '.join(dict.fromkeys(matches))}?"
    if by_name and section:
        return f"{section} has {', '.join(by_name)}"
    return f"the sections are {', '.join(dict.fromkeys(k.partition('.')[0] for k in leaves))}"


def _members(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _build_section(schema: type, data: Any, path: str, root: type, problems: list[Problem]) -> Any:
    where = path or "the configuration"
    if not isinstance(data, Mapping):
        names = ", ".join(field.name for field in dataclasses.fields(schema))
        problems.append(
            Problem(key=where, given=data, rule="must be a section", fix=f"give it keys: {names}")
        )
        return _INVALID
    prefix = f"{path}." if path else ""
    hints = typing.get_type_hints(schema)
    for key in data:
        if key not in hints:
            dotted = f"{prefix}{key}"
            problem = unknown_key(dotted, root, data[key])
            problems.append(
                problem or Problem(key=dotted, rule="is not a key", fix=did_you_mean(key, hints))
            )
    values: dict[str, Any] = {}
    for field in dataclasses.fields(schema):
        if field.name in data:
            dotted = f"{prefix}{field.name}"
            values[field.name] = _convert(
                hints[field.name], data[field.name], dotted, root, problems
            )
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(
                Problem(
                    key=f"{prefix}{field.name}",
                    rule="is required",
                    fix=f"set it to {describe(hints[field.name])}",
                )
            )
            values[field.name] = _INVALID
    if any(value is _INVALID for value in values.values()):
        return _INVALID
    return schema(**values)


def _convert(hint: Any, value: Any, key: str, root: type, problems: list[Problem]) -> Any:
    members = _members(hint)
    if value is None and type(None) in members:
        return None
    (kind,) = [part for part in members if part is not type(None)]
    if kind is ComponentConfig:
        return _build_component(value, key, problems)
    if dataclasses.is_dataclass(kind):
        return _build_section(typing.cast(type, kind), value, key, root, problems)
    if section := section_by_name(kind):
        return _build_sections_by_name(section, value, key, root, problems)
    if kind in _LISTS:
        if isinstance(value, list | tuple) and all(type(part) is _LISTS[kind] for part in value):
            return tuple(value)
    elif kind == _NAMED_TEXTS:
        if isinstance(value, Mapping) and all(
            type(part) is str for pair in value.items() for part in pair
        ):
            return types.MappingProxyType(dict(value))
    elif typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        # type() too: True == 1 and hash alike.
        if any(type(value) is type(choice) and value == choice for choice in choices):
            return value
    elif kind is float:
        number: Any = value
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and abs(number) <= sys.float_info.max:  # refuses nan and both infinities
            return float(number)
    else:
        assert kind in _NAMES, f"schema.py uses a type that build.py does not know: {key}: {hint}"
        if type(value) is kind:
            return value
    fix = _fix_type(kind, value)
    problems.append(Problem(key=key, given=value, rule=f"must be {describe(hint)}", fix=fix))
    return _INVALID


def _build_sections_by_name(
    section: type, value: Any, key: str, root: type, problems: list[Problem]
) -> Any:
    if not isinstance(value, Mapping) or not all(type(name) is str for name in value):
        names = ", ".join(field.name for field in dataclasses.fields(section))
        rule, fix = "must be sections by name", f"write {{NAME: {{{names}}}}}"
        problems.append(Problem(key=key, given=value, rule=rule, fix=fix))
        return _INVALID
    built = {
        name: _build_section(section, inner, f"{key}.{name}", root, problems)
        for name, inner in value.items()
    }
    return _INVALID if any(inner is _INVALID for inner in built.values()) else built


_EXAMPLES = types.MappingProxyType(
    {
        "router": "moesys.moe.routers.TopKRouter, or choose one of configs/router: router=NAME",
        "codec": "moesys.moe.codecs.LshCodec, or choose one of configs/codec: codec=NAME",
    }
)
"""By the last part of a key."""


def _build_component(value: Any, key: str, problems: list[Problem]) -> Any:
    before = len(problems)
    if not isinstance(value, Mapping) or "_target_" not in value:
        example = _EXAMPLES.get(key.rpartition(".")[2], "package.module.ClassName")
        problems.append(
            Problem(
                key=f"{key}._target_",
                rule="is required",
                fix=f"name a class by its import path, e.g. {example}",
            )
        )
        return _INVALID
    target = value["_target_"]
    if type(target) is not str or not all(p.isidentifier() for p in target.split(".")):
        problems.append(
            Problem(
                key=f"{key}._target_",
                given=target,
                rule="must be the import path of a class",
                fix="write package.module.ClassName",
            )
        )
    for option in value:
        if type(option) is not str or not option.isidentifier():
            rule = "must be the name of a constructor argument"
        elif option.startswith("_") and option != "_target_":
            rule = "is reserved (only _target_ has a meaning here)"
        else:
            continue
        problems.append(Problem(key=f"{key}.{option}", rule=rule, fix="rename or remove it"))
    if len(problems) > before:
        return _INVALID
    options = {name: option for name, option in value.items() if name != "_target_"}
    return ComponentConfig(target=target, options=options)


def _fix_type(kind: Any, value: Any) -> str:
    if kind == _TEXTS:
        return 'write a list, ["a", "b"], numbers and true or false in quotes'
    if kind == _INTEGERS:
        return "write a list, [4, 8]"
    if kind == _NAMED_TEXTS:
        return 'write {A: "1", B: "x"}, numbers and true or false in quotes'
    if typing.get_origin(kind) is Literal:
        choices = [str(choice) for choice in typing.get_args(kind)]
        if isinstance(value, bool):
            spelled = {"on", "yes"} if value else {"off", "no"}
            quoted = sorted(spelled & set(choices))
            if quoted:
                return f'YAML reads a bare {quoted[0]} as a boolean, write "{quoted[0]}" in quotes'
        return did_you_mean(str(value), choices)
    if kind is int and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if kind in (int, float) and isinstance(value, str):
        try:
            number = kind(value.replace("_", ""))
        except ValueError:
            pass
        else:
            return f"write {number} without quotes"
    if kind is str and isinstance(value, int | float):
        return f'write "{value}" in quotes'
    if kind is bool and isinstance(value, str | int):
        return "write true or false, without quotes"
    return f"give {_NAMES[kind]}, e.g. { {bool: 'true', int: 8, float: 0.1, str: 'a name'}[kind] }"
