"""Hydra's part: groups, precedence, a user's own folder, references, and files read back."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesys.config.build import build, to_dict
from moesys.config.compose import compose, config_hash, load_resolved, sweep_points, to_yaml
from moesys.config.errors import ConfigError
from moesys.config.schema import RunConfig


def test_precedence_is_group_then_experiment_then_override() -> None:
    assert compose([]).optim.lr == 1e-3
    assert compose(["experiment=quickstart"]).optim.lr == 3e-3
    assert compose(["optim.lr=3", "experiment=quickstart"]).optim.lr == 3.0
    assert compose(["experiment=quickstart", "model=tiny"]).model.d_model == 64


def test_plus_signs_make_no_difference() -> None:
    plain = compose(["experiment=quickstart", "optim.lr=3", "router=topk_sigmoid"])
    assert compose(["+experiment=quickstart", "++optim.lr=3", "+router=topk_sigmoid"]) == plain


def test_overrides_parse_numbers_texts_and_null() -> None:
    config = compose(
        ["optim.lr=1e-3", "run.name=two words", "model.head_dim=null", "data.shuffle=false"]
    )
    assert config.optim.lr == 0.001
    assert config.run.name == "two words"
    assert config.model.head_dim is None
    assert config.data.shuffle is False


def test_a_key_that_no_yaml_file_names_can_be_set(tmp_path: Path) -> None:
    short = tmp_path / "optim" / "short.yaml"
    short.parent.mkdir()
    short.write_text("lr: 0.5\n")
    config = compose(["optim=short", "optim.beta1=0.5"], tmp_path)
    assert (config.optim.lr, config.optim.beta1, config.optim.beta2) == (0.5, 0.5, 0.95)


def test_options_of_a_router_are_free() -> None:
    config = compose(["model.moe.router._target_=my.Router", "model.moe.router.depth=3"])
    assert config.model.moe.router.target == "my.Router"
    assert config.model.moe.router.options["depth"] == 3


def test_references_and_environment_are_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESYS_TEST_SCRATCH", "/scratch/me")
    config = compose(["run.name=abc", "data.path=${oc.env:MOESYS_TEST_SCRATCH}/data"])
    assert config.run.dir == "runs/abc"
    assert config.data.path == "/scratch/me/data"


def test_an_unset_environment_variable_is_named() -> None:
    with pytest.raises(ConfigError, match="MOESYS_TEST_UNSET"):
        compose(["data.path=${oc.env:MOESYS_TEST_UNSET}"])


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def test_a_users_folder_adds_options_and_groups(tmp_path: Path) -> None:
    write(
        tmp_path,
        "router/mine.yaml",
        "# @package model.moe.router\n_target_: my_package.MyRouter\ntemperature: 0.5\n",
    )
    write(
        tmp_path,
        "experiment/mine.yaml",
        "# @package _global_\ndefaults:\n  - override /router: mine\ntrain:\n  steps: 7\n",
    )
    write(tmp_path, "site/ours.yaml", "# @package _global_\ntrain:\n  timeout_s: 5\n")
    config = compose(["experiment=mine", "site=ours"], tmp_path)
    assert config.model.moe.router.target == "my_package.MyRouter"
    assert config.model.moe.router.options == {"temperature": 0.5}
    assert config.train.steps == 7
    assert config.train.timeout_s == 5.0
    with pytest.raises(
        ConfigError, match=r"experiment='mne' must be one of compare, mine, quickstart"
    ):
        compose(["experiment=mne"], tmp_path)


def test_a_group_file_without_its_package_line_is_explained(tmp_path: Path) -> None:
    write(tmp_path, "router/mine.yaml", "_target_: my_package.MyRouter\n")
    with pytest.raises(ConfigError, match=r"begin its file with '# @package model.moe.router'"):
        compose(["router=mine"], tmp_path)


def test_a_users_file_with_a_name_of_ours_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "optim/adamw.yaml", "lr: 1\n")
    with pytest.raises(ValueError, match=r"holds optim/adamw.yaml, which moesys has too"):
        compose([], tmp_path)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--config-dir .*/nope is not a folder"):
        compose([], tmp_path / "nope")


@pytest.mark.parametrize(
    "text", ["a: [1\n", "train:\n  steps: 1\n   x: 2\n", "a: 1\na: 2\n", "- 1\n"]
)
def test_a_broken_yaml_file_is_an_error_of_one_line(text: str, tmp_path: Path) -> None:
    write(tmp_path, "experiment/broken.yaml", f"# @package _global_\n{text}")
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=broken"], tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_misspelt_keys_of_a_file_get_suggestions(tmp_path: Path) -> None:
    write(
        tmp_path,
        "experiment/typo.yaml",
        "# @package _global_\ntrain:\n  stepz: 3\nmodel:\n  moe:\n    topk: 1\n",
    )
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=typo"], tmp_path)
    assert [problem.fix for problem in caught.value.problems] == [
        "did you mean model.moe.top_k?",
        "did you mean train.steps?",
    ]


def test_equal_configurations_have_equal_hashes() -> None:
    one = compose(["optim.lr=1", "train.steps=200"])
    two = compose(["train.steps=200", "optim.lr=1.0"])
    assert config_hash(one) == config_hash(two)
    assert config_hash(one) != config_hash(compose(["train.steps=200", "optim.lr=1.1"]))


def test_a_resolved_file_comes_back_exactly(tmp_path: Path) -> None:
    config = compose(
        ["experiment=quickstart", "optim.eps=1e-15", "model.moe.router.list=[1,{a:null}]"]
    )
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_resolved(path) == config


# Text that YAML could take for something else is where a round trip breaks.
_texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1) | st.sampled_from(
    [
        "off",
        "1e-3",
        "1_0",
        "null",
        "~",
        "0x1f",
        "2024-01-01",
        "a: b",
        "# c",
        "${x}",
        "-",
        "1:30",
        "???",
    ]
)


@settings(max_examples=100)
@given(
    name=_texts, lr=st.floats(min_value=1e-300, max_value=1e300), option=_texts, seed=st.integers()
)
def test_any_text_and_number_survives_the_file(
    tmp_path_factory: pytest.TempPathFactory, name: str, lr: float, option: str, seed: int
) -> None:
    tree = _base()
    tree["run"] |= {"name": name, "seed": seed}
    tree["optim"]["lr"] = lr
    tree["model"]["moe"]["router"]["option"] = option
    config = build(RunConfig, tree)
    path = tmp_path_factory.mktemp("resolved") / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_resolved(path) == config


_COMPOSED = compose([])


def _base() -> dict[str, Any]:
    tree = to_dict(_COMPOSED)
    tree["model"]["moe"]["router"] = dict(tree["model"]["moe"]["router"])
    return tree


def test_a_number_written_by_hand_is_one(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for text, value in (("1e-3", 1e-3), ("2E+1", 20.0), ("-1.5e0", -1.5), ("3", 3.0)):
        path.write_text(to_yaml(compose([])).replace("  lr: 0.001\n", f"  lr: {text}\n"))
        assert load_resolved(path).optim.lr == value
    path.write_text(to_yaml(compose([])).replace("  lr: 0.001\n", "  lr: '1e-3'\n"))
    with pytest.raises(ValueError, match=r"write 0\.001 without quotes"):
        load_resolved(path)


def test_a_damaged_resolved_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with pytest.raises(ValueError, match=r"config\.yaml is not a file"):
        load_resolved(path)
    path.write_text("run: [")
    with pytest.raises(ValueError, match=r"config\.yaml is not readable as YAML"):
        load_resolved(path)
    path.write_text(to_yaml(compose([])).replace("top_k", "topk"))
    with pytest.raises(ValueError, match=r"(?s)config\.yaml: .*did you mean model\.moe\.top_k"):
        load_resolved(path)


def test_nothing_executable_is_read_from_a_resolved_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"run: !!python/object/apply:os.mkdir [{tmp_path}/made]\n")
    with pytest.raises(ValueError, match="not readable as YAML"):
        load_resolved(path)
    assert not (tmp_path / "made").exists()


def test_a_sweep_is_every_combination_the_last_word_fastest() -> None:
    assert sweep_points(["optim.lr=1e-3,3e-3", "run.seed=range(0,2)", "model=tiny"]) == [
        ["optim.lr=0.001", "run.seed=0", "model=tiny"],
        ["optim.lr=0.001", "run.seed=1", "model=tiny"],
        ["optim.lr=0.003", "run.seed=0", "model=tiny"],
        ["optim.lr=0.003", "run.seed=1", "model=tiny"],
    ]
    assert sweep_points(["a=[1,2],[3]", "b='x,y'"]) == [
        ["a=[1,2]", "b='x,y'"],
        ["a=[3]", "b='x,y'"],
    ]


def test_a_sweep_without_a_list_of_values_is_refused() -> None:
    with pytest.raises(ConfigError) as raised:
        sweep_points(["a=1,2", "b=interval(0,1)", "c=glob(*)", "d"])
    assert [problem.key for problem in raised.value.problems] == [
        "b=interval(0,1)",
        "c=glob(*)",
        "d",
    ]
