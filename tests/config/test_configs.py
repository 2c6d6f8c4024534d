"""configs/: every file composes, obeys every rule, sets every key and says what each one is."""

import re
from pathlib import Path

import pytest

from moesys.config.compose import compose, group_options
from moesys.config.validate import check_components, validate

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
OPTIONS = [(group, option) for group, options in group_options().items() for option in options]
REQUIRED = (
    {
        ("router", name): ["model.moe.router.run=runs/recorded"]
        for name in ("replay", "replay_loads")
    }
    | {
        ("codec", name): ["parallel.ep=2"]
        for name in (
            *("int8", "int4", "fp8", "lsh", "lsh_int8", "lsh_int4"),
            *("tree", "tree_int8", "tree_int4", "auto"),
        )
    }
    | {
        ("placement", name): ["parallel.ep=2"]
        for name in ("balanced", "hecate", "everywhere", "eplb")
    }
)
"""What an option leaves to its user."""
_LINE = re.compile(r"^\s*(?P<key>[\w/]+):\s*(?P<value>[^#\s][^#]*?)?\s*(?P<comment>#.*)?$")


def test_the_tree_is_where_it_should_be() -> None:
    assert (CONFIGS / "train.yaml").is_file()
    groups = {
        "model",
        "router",
        "balance",
        "codec",
        "placement",
        "batch",
        "data",
        "optim",
        "schedule",
        "experiment",
    }
    assert groups == set(group_options())


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_obeys_the_rules(group: str, option: str) -> None:
    config = compose([f"{group}={option}", *REQUIRED.get((group, option), [])])
    assert validate(config, world_size=config.parallel.ep) == []
    check_components(config)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_goes_with_the_quickstart(group: str, option: str) -> None:
    if group == "experiment":
        return
    required = REQUIRED.get((group, option), [])
    config = compose(["experiment=quickstart", f"{group}={option}", *required])
    validate(config, world_size=config.parallel.ep)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_every_leaf_has_a_comment(file: Path) -> None:
    text = file.read_text()
    assert re.match(r"(# @package \S+\n)?# [A-Z0-9]", text), "a file begins with what it is for"
    for number, line in enumerate(text.splitlines(), start=1):
        match = _LINE.match(line)
        if match and match["value"]:
            assert match["comment"], f"{file.name}:{number}: {match['key']} has no comment"


def test_the_files_set_every_key_of_the_schema() -> None:
    """A default that only schema.py knows is one that a reader of configs/ does not find."""
    from moesys.config.build import leaf_types
    from moesys.config.schema import RunConfig

    text = {file: file.read_text() for file in FILES if file.parent.name != "experiment"}
    for key in leaf_types(RunConfig):
        name = key.rpartition(".")[2]
        if key == "model.moe.router":
            name = "_target_"
        assert any(re.search(rf"^\s*{name}:", body, re.MULTILINE) for body in text.values()), key


def test_options_of_a_group_set_the_same_keys() -> None:
    """So that changing the option leaves nothing behind, and a diff of two files shows the difference."""
    for group in ("model", "balance", "schedule"):
        keys = {
            file.name: [
                m["key"] for line in file.read_text().splitlines() if (m := _LINE.match(line))
            ]
            for file in sorted((CONFIGS / group).glob("*.yaml"))
        }
        first, *others = keys.values()
        assert all(other == first for other in others), keys


def test_quickstart_is_what_its_comments_say() -> None:
    config = compose(["experiment=quickstart"])
    model, moe = config.model, config.model.moe
    attention = model.d_model * model.resolved_head_dim * 2 * (model.num_heads + model.num_kv_heads)
    swiglu = 3 * model.d_model
    experts = moe.num_experts + moe.num_shared_experts
    moe_layers = model.num_layers - model.num_dense_layers
    parameters = (
        2 * model.vocab_size * model.d_model
        + model.num_layers * attention
        + model.num_dense_layers * swiglu * model.d_ffn
        + moe_layers * (experts * swiglu * moe.d_expert + moe.num_experts * model.d_model)
    )
    assert parameters >= 10_000_000
    assert moe_layers >= 1
    assert config.parallel.ep == 2
