"""What is found by importing the classes that a configuration names and by looking at the disk."""

import importlib.util
from pathlib import Path

import pytest

from moesys.config.compose import compose
from moesys.config.errors import ConfigError
from moesys.config.validate import check_components, check_files
from tests.config.prepared import prepared_data

ROUTERS = """
from typing import Literal

from torch import nn


class Strict(nn.Module):
    def __init__(self, *, d_model: int, num_experts: int, top_k: int, depth: int, mode: Literal[1, 2] = 1):
        super().__init__()


class Open(nn.Module):
    def __init__(self, **options):
        super().__init__()


class Narrow(nn.Module):
    def __init__(self, d_model: int):
        super().__init__()


class Whole(Open):
    needs_whole_sequences = True
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "users_routers.py").write_text(ROUTERS)
    (tmp_path / "needs_more.py").write_text("import no_such_dependency\n")
    (tmp_path / "raises.py").write_text("raise RuntimeError('not today')\n")
    return tmp_path


def router_problems(target: str, *options: str, batch: str = "samples") -> list[str]:
    overrides = [f"model.moe.router.{option}" for option in options] + [f"batch={batch}"]
    # The options of the default router go, those of the user's come.
    gone = [f"~model.moe.router.{name}" for name in ("normalize_weights", "scaling_factor")]
    gone.append("~model.moe.router.score_function")
    config = compose([f"model.moe.router._target_={target}", *gone, *overrides])
    try:
        check_components(config)
    except ConfigError as error:
        return [str(problem) for problem in error.problems]
    return []


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    "target",
    [
        "moesys.moe.routers.ExpertChoiceRouter",
        "moesys.moe.routers.SoftRouter",
        "users_routers.Whole",
    ],
)
def test_a_router_of_whole_sequences_is_refused_where_ranks_have_pieces(target: str) -> None:
    (problem,) = router_problems(target, batch="hdp")
    assert problem.startswith(f"model.moe.router._target_={target!r} looks at whole sequences")
    assert problem.endswith("use another router, e.g. router=topk_softmax, or batch.policy=samples")
    assert router_problems(target) == router_problems("users_routers.Open", batch="hdp") == []


@pytest.mark.usefixtures("folder")
def test_a_router_that_fits_is_accepted() -> None:
    assert router_problems("users_routers.Strict", "depth=3", "mode=2") == []
    assert router_problems("users_routers.Open", "anything=3") == []


@pytest.mark.usefixtures("folder")
def test_options_are_compared_to_the_constructor() -> None:
    assert router_problems("users_routers.Strict") == [
        "model.moe.router.depth is required by users_routers.Strict: set it: model.moe.router.depth=..."
    ]
    wrong = router_problems("users_routers.Strict", "depth=3.5", "mode=true", "dpeth=1")
    assert [text.split(" must ")[0].split(" is ")[0] for text in wrong] == [
        "model.moe.router.depth=3.5",
        "model.moe.router.mode=true",
        "model.moe.router.dpeth=1",
    ]
    assert "did you mean depth?" in wrong[-1]


@pytest.mark.usefixtures("folder")
def test_a_router_must_take_what_the_model_passes() -> None:
    assert [
        text.partition("must take ")[2][:12] for text in router_problems("users_routers.Narrow")
    ] == [
        "num_experts ",
        "top_k in its",
    ]


@pytest.mark.usefixtures("folder")
def test_a_module_that_cannot_be_imported_says_whose_fault_it_is() -> None:
    (text,) = router_problems("needs_more.Router")
    assert text.endswith("install no_such_dependency, which it imports")
    (text,) = router_problems("raises.Router")
    assert "importing raises raised RuntimeError: not today" in text


def test_a_sink_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(["metrics.wandb=offline", "metrics.tensorboard=true"])
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name in ("wandb", "tensorboard") else find_spec(name),
    )
    with pytest.raises(ConfigError) as caught:
        check_components(config)
    assert [str(problem) for problem in caught.value.problems] == [
        "metrics.wandb='offline' needs the package wandb, which is not installed: "
        "pip install wandb, or leave metrics.wandb off",
        "metrics.tensorboard=true needs the package tensorboard, which is not installed: "
        "pip install tensorboard, or leave metrics.tensorboard off",
    ]
    check_components(compose([]))


def file_problems(data: Path, *overrides: str) -> list[str]:
    try:
        check_files(compose([f"data.path={data}", *overrides]))
    except ConfigError as error:
        return [str(problem) for problem in error.problems]
    return []


def test_the_data_must_make_one_step(tmp_path: Path) -> None:
    # 16 samples of 256 tokens and the target of the last.
    assert file_problems(prepared_data(tmp_path, train_tokens=4097)) == []
    (text,) = file_problems(prepared_data(tmp_path, train_tokens=4096))
    assert "train.global_batch_tokens=4096 must be at most the 3840 tokens" in text
    (text,) = file_problems(prepared_data(tmp_path, val_tokens=1))
    assert "must hold at least 2 validation tokens, and it holds 1" in text


def test_the_vocabulary_must_hold_the_tokenizers(tmp_path: Path) -> None:
    assert file_problems(prepared_data(tmp_path, vocab_size=5000), "model.vocab_size=5000") == []
    (text,) = file_problems(prepared_data(tmp_path, vocab_size=5000), "model.vocab_size=4999")
    assert text.endswith("use model.vocab_size=5000")


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"tokenizer": {"vocab_size": "many"}}'])
def test_a_damaged_manifest_is_named(manifest: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    (text,) = file_problems(tmp_path)
    assert "its manifest.json is damaged" in text
