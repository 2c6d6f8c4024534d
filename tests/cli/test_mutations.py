"""Wrong configurations and environments: each is refused before a process group, with its key, the rule and a fix."""

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from moesys.cli import main
from moesys.testing.mutations import MUTATIONS, Mutation
from moesys.testing.refusals import OF_A_LAUNCHER, Refusal, Scene, faults

LOCKED = "run.dir=<FOLDER>/locked/run"
"""Root may write there, but for a process that gave the right away."""
IN_THEIR_OWN_PROCESS = (
    *("train.stepz=3", LOCKED, "RANK=0 LOCAL_RANK=0 MASTER_PORT=<TAKEN>"),
    *("GLOO_SOCKET_IFNAME=nosuch0", "CUDA_VISIBLE_DEVICES= train.device=cuda"),
)
PLAIN = Mutation(name="none", command=("train",), words=(), key="", rule="", fix="")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with Scene(tmp_path_factory.mktemp("mutations") / "scene") as scene:
        yield scene


def of(scene: Scene, name: str) -> Mutation:
    (found,) = (mutation for mutation in scene.mutations() if mutation.name == name)
    return found


def test_the_table_is_long_enough_and_spans_configurations_and_environments() -> None:
    assert len(MUTATIONS) >= 60
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
    assert sum(bool(mutation.environ) for mutation in MUTATIONS) >= 20
    assert all(m.key and m.rule and m.fix for m in MUTATIONS)


@pytest.mark.parametrize("name", [m.name for m in MUTATIONS if m.name != LOCKED])
def test_a_mutation_is_refused_in_this_process(
    name: str, scene: Scene, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a process group is made")

    mutation = of(scene, name)
    monkeypatch.chdir(scene.folder)
    monkeypatch.setattr("torch.distributed.init_process_group", refuse)
    for variable in [v for v in os.environ if v.startswith(OF_A_LAUNCHER)]:
        monkeypatch.delenv(variable)
    for variable, value in mutation.environ.items():
        monkeypatch.setenv(variable, value)
    before = set(scene.folder.rglob("*"))
    exit_code = main(scene.arguments(mutation))
    out, err = capfd.readouterr()
    refusal = Refusal(
        exit_code=exit_code,
        said=out + err,
        cpu_s=0.0,
        wall_s=0.0,
        made_group=False,
        left=tuple(map(str, set(scene.folder.rglob("*")) - before)),
    )
    assert not faults(mutation, refusal), refusal.said


@pytest.mark.alone  # times the command
@pytest.mark.parametrize("name", IN_THEIR_OWN_PROCESS)
def test_a_mutation_is_refused_by_the_command(name: str, scene: Scene) -> None:
    refusal = scene.attempt(of(scene, name))
    assert not faults(of(scene, name), refusal), refusal


@pytest.mark.chaos
@pytest.mark.parametrize("name", [m.name for m in MUTATIONS if m.name not in IN_THEIR_OWN_PROCESS])
def test_every_mutation_is_refused_by_the_command(name: str, scene: Scene) -> None:
    refusal = scene.attempt(of(scene, name))
    assert not faults(of(scene, name), refusal), refusal


def test_what_nothing_is_wrong_with_is_not_refused_and_its_process_group_is_seen(
    scene: Scene,
) -> None:
    dry = scene.attempt(replace(PLAIN, command=("train", "--nproc", "2", "--dry-run")))
    assert (dry.exit_code, dry.made_group) == (0, False), dry.said
    # The prepared data has no tokens, which is found after ranks have met.
    started = scene.attempt(PLAIN)
    assert started.made_group, started.said
    assert "a process group was made" in faults(PLAIN, started)


GOOD = Refusal(
    exit_code=2,
    said="configuration: parallel.ep=3 must divide the world size 2: use parallel.ep=2\n",
    cpu_s=1.0,
    wall_s=9.0,
    made_group=False,
    left=(),
)
EP = replace(PLAIN, key="parallel.ep=3", rule="must divide the world size 2", fix="use parallel.ep")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"exit_code": 1}, "exit code 1 is not 2"),
        ({"said": f"Traceback (most recent call last)\n{GOOD.said}"}, "a traceback"),
        ({"made_group": True}, "a process group was made"),
        ({"left": ("run",)}, "left run"),
        ({"cpu_s": 3.1}, "took 3.1 s of processor time, above 3"),
        ({"said": GOOD.said.replace("ep=3", "ep")}, "no line with 'parallel.ep=3'"),
        ({"said": GOOD.said.replace("2:", "4:")}, "no line with"),
        ({"said": GOOD.said.replace("use", "try")}, "no line with"),
        ({"said": GOOD.said.replace(": use", "\nuse")}, "no line with"),
    ],
)
def test_what_is_missing_from_a_refusal_is_told(changes: dict[str, object], fault: str) -> None:
    assert faults(EP, GOOD) == []
    (found,) = faults(EP, replace(GOOD, **changes))  # type: ignore[arg-type]
    assert fault in found
