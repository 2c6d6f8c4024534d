"""Dicts to dataclasses and back; the keys, types and docs that the schema holds."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesys.config.build import (
    build,
    check_value,
    config_hash,
    describe,
    leaf_types,
    to_dict,
    unknown_key,
)
from moesys.config.compose import compose
from moesys.config.errors import ConfigError
from moesys.config.keys import list_keys
from moesys.config.schema import ComponentConfig, RunConfig


@dataclass(frozen=True, kw_only=True)
class Inner:
    count: int
    ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner
    part: ComponentConfig
    kind: Literal["off", "on"] = "off"


GOOD: dict[str, Any] = {"inner": {"count": 3}, "part": {"_target_": "a.B", "x": [1, {"y": None}]}}


def test_nested_sections_defaults_and_components() -> None:
    built = build(Outer, GOOD)
    assert built == Outer(
        inner=Inner(count=3, ratio=None),
        part=ComponentConfig(target="a.B", options={"x": [1, {"y": None}]}),
        kind="off",
    )
    assert to_dict(built) == {
        "inner": {"count": 3, "ratio": None},
        "part": {"_target_": "a.B", "x": [1, {"y": None}]},
        "kind": "off",
    }


@pytest.mark.parametrize("value", [1, 0, -3, 2**80])
def test_an_integer_becomes_a_float_where_one_is_wanted(value: int) -> None:
    ratio = build(Inner, {"count": 1, "ratio": value}).ratio
    assert type(ratio) is float
    assert ratio == value


@pytest.mark.parametrize(
    "value", [True, "1", "1e-3", math.nan, math.inf, -math.inf, 10**400, [1.0], {}]
)
def test_what_is_no_finite_number_is_refused(value: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"^configuration: ratio=.* must be a finite number or null"
    ):
        build(Inner, {"count": 1, "ratio": value})


@pytest.mark.parametrize("value", [True, 1.0, "1", None, [1]])
def test_what_is_no_integer_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^configuration: count=.* must be an integer"):
        build(Inner, {"count": value})


def test_a_bare_yaml_off_is_explained() -> None:
    with pytest.raises(
        ConfigError, match=r'kind=false must be one of off, on: .*write "off" in quotes'
    ):
        build(Outer, {**GOOD, "kind": False})


def test_everything_wrong_is_found_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        build(Outer, {"inner": {"ratio": "x", "cuont": 3}, "part": 3, "kind": "of"})
    assert [problem.key for problem in caught.value.problems] == [
        "inner.cuont",
        "inner.count",
        "inner.ratio",
        "part._target_",
        "kind",
    ]


def test_a_whole_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the configuration=.* must be a section"):
        build(RunConfig, [1])  # pyright: ignore[reportArgumentType]


@given(
    st.integers() | st.floats() | st.booleans() | st.text() | st.none() | st.lists(st.integers())
)
def test_any_value_is_either_kept_exactly_or_refused(value: Any) -> None:
    for hint in (int, float, bool, str, int | None, Literal["a", "b"]):
        try:
            built = build(
                dataclasses.make_dataclass("One", [("key", hint)], frozen=True, kw_only=True),
                {"key": value},
            )
        except ConfigError:
            assert check_value(hint, value, "key")
        else:
            wanted = float(value) if hint is float else value
            assert getattr(built, "key") == wanted  # noqa: B009
            assert check_value(hint, value, "key") == []


def test_types_that_yaml_cannot_spell_are_not_judged() -> None:
    assert check_value(list[int], 3, "key") == []
    assert check_value(int | str, None, "key") == []
    assert check_value(None, 3, "key") == []


def test_every_leaf_of_a_configuration_decides_its_hash() -> None:
    config = compose([])
    by_name = {
        "data.sources": {"path": "x", "weight": 1.0},
        "dispatch.candidates": {"codec": None},
    }
    seen = {config_hash(config)}
    tree = to_dict(config)
    for key, hint in leaf_types(RunConfig).items():
        if hint is ComponentConfig:
            continue
        *sections, name = key.split(".")
        changed = node = to_dict(config)
        for section in sections:
            node = node[section]
        old = node[name]
        node[name] = not old if isinstance(old, bool) else (old or 1) * 2
        if "list" in describe(hint):
            node[name] = [1]
        elif "text" in describe(hint):
            node[name] = f"{old}, another"
        if key in by_name:
            node[name] = {"a": by_name[key]}
        elif ComponentConfig in typing.get_args(hint):
            node[name] = {"_target_": "package.Class", "option": 1}
        if isinstance(old, str):
            continue  # a text is one of a few here; doubled it would be refused
        assert changed != tree
        seen.add(config_hash(build(RunConfig, changed)))
    texts = sum(isinstance(_at(tree, key), str) for key in leaf_types(RunConfig))
    components = sum(hint is ComponentConfig for hint in leaf_types(RunConfig).values())
    assert len(seen) == 1 + len(leaf_types(RunConfig)) - texts - components


def _at(tree: dict[str, Any], key: str) -> Any:
    for name in key.split("."):
        tree = tree[name]
    return tree


def test_keys_have_the_type_default_and_docstring_of_the_schema() -> None:
    keys = {info.key: info for info in list_keys()}
    assert list(dict.fromkeys(k.partition(".NAME.")[0] for k in keys)) == list(
        leaf_types(RunConfig)
    )
    weight = keys["data.sources.NAME.weight"]
    assert (weight.type, weight.required) == ("a finite number", True)
    top_k = keys["model.moe.top_k"]
    assert (top_k.type, top_k.required) == ("an integer", True)
    assert top_k.doc == "Experts per token, 1..num_experts."
    wandb = keys["metrics.wandb"]
    assert (wandb.type, wandb.required, wandb.default) == (
        "one of off, offline, online",
        False,
        "off",
    )
    # A docstring of two lines.
    assert "so sizes are known" in keys["model.moe.capacity_policy"].doc
    assert all(key.doc for key in keys.values()), [n for n, key in keys.items() if not key.doc]


@dataclass(frozen=True, kw_only=True)
class Lists:
    words: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    numbers: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Part:
    size: int
    word: str = "a"


@dataclass(frozen=True, kw_only=True)
class Named:
    parts: Mapping[str, Part] = field(default_factory=dict)


def test_sections_by_name() -> None:
    given = {"parts": {"x": {"size": 1}, "y": {"size": 2, "word": "b"}}}
    built = build(Named, given)
    assert built.parts == {"x": Part(size=1), "y": Part(size=2, word="b")}
    assert to_dict(built) == {"parts": {"x": {"size": 1, "word": "a"}, "y": given["parts"]["y"]}}
    assert build(Named, to_dict(built)) == built
    with pytest.raises(ConfigError) as error:
        build(Named, {"parts": {"x": {"sizes": 1}, "y": 3, 4: {}}})
    assert "parts={'x': {'sizes': 1}, 'y': 3, 4: {}} must be sections by name" in str(error.value)
    with pytest.raises(ConfigError) as error:
        build(Named, {"parts": {"x": {"sizes": 1, "size": 2}, "y": 3}})
    assert "parts.x.sizes=1 is not a configuration key: did you mean size?" in str(error.value)
    assert "parts.y=3 must be a section: give it keys: size, word" in str(error.value)
    assert unknown_key("data.sources.code.weight") is None
    assert unknown_key("data.sources.code") is None
    problem = unknown_key("data.sources.code.weihgt", given=1)
    assert str(problem) == (
        "data.sources.code.weihgt=1 is not a configuration key: did you mean weight?"
    )


def test_lists_and_names_of_texts() -> None:
    built = build(Lists, {"words": ["a", "b"], "env": {"A": "1"}})
    assert (built.words, dict(built.env)) == (("a", "b"), {"A": "1"})
    with pytest.raises(ConfigError) as raised:
        build(Lists, {"words": ["a", 1], "env": {"A": 1}})
    assert [str(problem).partition(":")[0] for problem in raised.value.problems] == [
        "words=['a', 1] must be a list of texts",
        "env={'A'",
    ]
    with pytest.raises(ConfigError, match="must be a list of texts"):
        build(Lists, {"words": "ab"})


def test_a_list_of_integers() -> None:
    built = build(Lists, {"numbers": [4, 8]})
    assert built == Lists(numbers=(4, 8)) == build(Lists, to_dict(built))
    rule = "must be a list of integers or null: write a list, "
    for value in ([4, "8"], [True], [1.0], 4, "4, 8"):
        with pytest.raises(ConfigError, match=rule):
            build(Lists, {"numbers": value})
