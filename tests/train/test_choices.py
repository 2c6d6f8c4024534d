"""Choices recorded under one layout and replayed under another are the same; so are then losses, and loads exactly.

Shapes: M MoE layers, N tokens of a step, K experts per token.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesys.cli import main
from moesys.config.schema import BalanceConfig, ComponentConfig, ParallelConfig, RunConfig
from moesys.moe.choices import open_choices, recorded_steps, write_choices
from moesys.testing.layouts import BASE, LAYOUTS, MICRO_STEPS
from moesys.testing.ranks import run_ranks
from moesys.testing.small_run import SmallRun, with_micro_steps
from moesys.train.step import StepResult
from tests.train.launched import records
from tests.train.test_pieces import PIECES

STEPS = 3
TOKENS = BASE.train.global_batch_tokens


def train(rank: int, size: int, config: RunConfig) -> list[StepResult]:
    run = SmallRun(config, size)
    return [run.step() for _ in range(STEPS)]


def laid_out(config: RunConfig, layout: str) -> tuple[int, RunConfig]:
    world_size, degrees = LAYOUTS[layout] if layout else (1, {})
    spread = replace(config, parallel=ParallelConfig(**degrees))  # type: ignore[arg-type]
    return world_size, with_micro_steps(spread, world_size, MICRO_STEPS)


def ran(config: RunConfig, layout: str = "") -> list[StepResult]:
    world_size, config = laid_out(config, layout)
    return run_ranks(train, world_size, config)[0]


def recording(folder: Path, steps: int = STEPS, config: RunConfig = BASE, **model) -> RunConfig:
    return replace(
        config,
        model=replace(config.model, **model),
        run=replace(config.run, dir=str(folder)),
        metrics=replace(config.metrics, record_choices_steps=steps),
    )


def replaying(
    folder: Path, seed: int = BASE.run.seed, config: RunConfig = BASE, **model
) -> RunConfig:
    options = {**config.model.moe.router.options, "run": str(folder)}
    router = ComponentConfig(target="moesys.moe.routers.ReplayRouter", options=options)
    base = replace(config.model, **model)
    return replace(
        config,
        run=replace(config.run, seed=seed),
        model=replace(base, moe=replace(base.moe, router=router)),
    )


def choices(folder: Path) -> list[np.ndarray]:
    return [np.array(open_choices(path)) for path in recorded_steps(folder)]


def loads(results: list[StepResult]) -> list[list[list[int]]]:
    return [result.expert_load_ME for result in results]


def counted(choices_MNK: np.ndarray) -> list[list[int]]:
    return [np.bincount(of_layer.ravel(), minlength=8).tolist() for of_layer in choices_MNK]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> tuple[Path, list[StepResult]]:
    folder = tmp_path_factory.mktemp("recorded")
    return folder, ran(recording(folder))


def test_each_steps_choices_are_its_loads(recorded) -> None:
    folder, results = recorded
    found = choices(folder)
    assert [path.name for path in recorded_steps(folder)] == [f"{n:08d}.npy" for n in (1, 2, 3)]
    for choices_MNK, load_ME in zip(found, loads(results), strict=True):
        assert choices_MNK.shape == (3, TOKENS, BASE.model.moe.top_k)
        assert counted(choices_MNK) == load_ME


@pytest.mark.parametrize(
    "layout",
    [
        "pp+tp+ep",
        *(
            pytest.param(name, marks=pytest.mark.parity)
            for name in ("ep", "tp without sequence parallelism", "cp", "zero", "zbv", "cp+tp")
        ),
    ],
)
def test_other_layouts_record_and_replay_the_same(layout: str, recorded, tmp_path) -> None:
    folder, results = recorded
    theirs = ran(recording(tmp_path), layout)
    for ours, again, load_ME in zip(choices(folder), choices(tmp_path), loads(theirs), strict=True):
        assert (np.sort(ours) == np.sort(again)).mean() > 0.99  # but for near ties
        assert counted(again) == load_ME
    replayed = ran(replaying(folder), layout)
    assert loads(replayed) == loads(results)
    for ours, again in zip(results, replayed, strict=True):
        assert again.loss == pytest.approx(ours.loss, rel=1e-5)
        assert again.grad_norm == pytest.approx(ours.grad_norm, rel=1e-4)


def test_documents_as_sequences_record_and_replay_the_same(tmp_path) -> None:
    """Steps have different numbers of tokens, and so have ranks in a micro-step."""
    results = run_ranks(
        train, 2, with_micro_steps(recording(tmp_path, config=PIECES), 2, MICRO_STEPS)
    )[0]
    for choices_MNK, result in zip(choices(tmp_path), results, strict=True):
        assert choices_MNK.shape[1] == result.num_tokens
        assert counted(choices_MNK) == result.expert_load_ME
    assert len({result.num_tokens for result in results}) > 1
    spread = replace(
        replaying(tmp_path, PIECES.run.seed, PIECES), parallel=ParallelConfig(tp=2, ep=4)
    )
    again = run_ranks(train, 4, with_micro_steps(spread, 4, MICRO_STEPS))[0]
    assert loads(again) == loads(results)


PYRAMID = replace(BASE.model.moe, num_experts=12, experts_by_layer=(4, 12, 8))


@pytest.mark.parametrize("model", [{"mtp_depth": 1}, {"moe": PYRAMID}], ids=["mtp", "pyramid"])
def test_other_weights_get_the_same_experts(model, tmp_path) -> None:
    """Layers of multi-token prediction too; past the last recorded step the record begins anew."""
    results = ran(recording(tmp_path, steps=2, **model))
    assert len(recorded_steps(tmp_path)) == 2
    other = ran(replaying(tmp_path, seed=5, **model))
    assert loads(other)[:2] == loads(results)[:2]
    assert loads(other)[2] == loads(results)[0]
    assert other[0].loss != results[0].loss


def test_a_job_records_and_replays(tiny_data, tmp_path, capsys) -> None:
    few = ["experiment=quickstart", f"data.path={tiny_data}", "model=tiny", "data.seq_len=32"]
    few += ["train.micro_batch_tokens=128", "train.global_batch_tokens=256", "train.steps=4"]
    few += [
        "schedule=constant",
        "schedule.warmup_steps=1",
        "checkpoint.every_steps=2",
        "train.eval_tokens=128",
    ]
    folder = tmp_path / "first"
    more = ["parallel.ep=1", "metrics.record_choices_steps=4", "checkpoint.resume=true"]
    assert main(["train", *few, *more, f"run.dir={folder}"]) == 0
    words = [*few, "parallel.ep=1", "router=replay", f"model.moe.router.run={folder}"]
    assert main(["train", *words, "train.steps=2", f"run.dir={tmp_path / 'second'}"]) == 0
    assert main(["train", *words, f"run.dir={tmp_path / 'second'}"]) == 0  # goes on in its third
    first, second = (records(tmp_path / name, "train") for name in ("first", "second"))
    assert [r["expert_load"] for r in first] == [r["expert_load"] for r in second]
    assert (
        main(["train", *words, "train.global_batch_tokens=512", f"run.dir={tmp_path / 'x'}"]) != 0
    )
    assert (
        "replay with the train.global_batch_tokens of the recorded run" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("router", "options"),
    [("ExpertChoiceRouter", {}), ("SoftRouter", {"slots_per_expert": 3}), ("ReLURouter", {})],
)
def test_a_router_without_k_experts_per_token_is_not_recorded(router, options, tmp_path) -> None:
    config = recording(tmp_path)
    component = ComponentConfig(target=f"moesys.moe.routers.{router}", options=options)
    moe = replace(config.model.moe, router=component, balance=BalanceConfig())
    with pytest.raises(
        Exception, match=rf"which moesys.moe.routers.{router} does not: set it to 0"
    ):
        ran(replace(config, model=replace(config.model, moe=moe)))
    assert not recorded_steps(tmp_path)


@pytest.mark.parity
def test_what_does_not_fit_is_named(tmp_path) -> None:
    cases = {
        "none": (None, "no recorded choices: train it with metrics.record_choices_steps"),
        "shape": (
            np.zeros((2, TOKENS, 2)),
            "has 2 MoE layers with 2 experts per token, this model 3",
        ),
        "experts": (np.full((3, TOKENS, 2), 8), "has choices of experts 0 to 8 in layer 0"),
        "nowhere": (np.full((3, TOKENS, 2), -1), "slots have no expert"),
        "short": (np.zeros((3, TOKENS - 1, 2)), "and this step has more"),
        "long": (np.zeros((3, TOKENS + 1, 2)), f"tokens, and this step has {TOKENS}: replay with"),
    }
    for name, (found, said) in cases.items():
        if found is not None:
            write_choices(tmp_path / name, 1, found.astype(np.int16))
        with pytest.raises(Exception, match=said):
            ran(replaying(tmp_path / name))
    (tmp_path / "torn" / "choices").mkdir(parents=True)
    (tmp_path / "torn" / "choices" / "00000001.npy").write_bytes(b"x")
    with pytest.raises(Exception, match="is no file of recorded choices"):
        ran(replaying(tmp_path / "torn"))
