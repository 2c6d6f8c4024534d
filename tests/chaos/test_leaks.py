"""A job that was hurt and restarted leaves nothing behind, and holds no more than before."""

import os
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest

from moesys.chaos.job import Watched
from moesys.chaos.outcome import Sample
from moesys.chaos.processes import SHARED_MEMORY
from moesys.checkpoint.folder import step_folders
from tests.chaos.witness import Witness, train

MOST_GROWN_BYTES = 16 << 20
"""Of rank 0: between its starts, and over the steps of one."""
SETTLED_SAMPLES = 10
"""Of a start: buffers and allocator have their size."""


def assert_nothing_is_left(watched: Watched, witness: Witness) -> None:
    assert watched.exit_code == 0
    assert watched.launches == 1
    assert (watched.leaks.processes, watched.leaks.ports) == (0, 0)
    assert witness.shared_memory_left() == []
    assert len(witness.processes) > len(witness.ranks)  # an agent, and a rank of each start
    temporary = [path for path in watched.run_dir.rglob("*") if ".tmp" in path.name]
    assert temporary == []
    folders = {path.name for path in (watched.run_dir / "checkpoints").iterdir()}
    assert folders == {path.name for path in step_folders(watched.run_dir / "checkpoints")}


def descriptors(samples: Sequence[Sample]) -> int:
    """Open at all looks: files of a save come and go."""
    return min(sample.num_descriptors for sample in samples)


def test_shared_memory_is_known_by_the_process_in_its_name(tmp_path: Path) -> None:
    witness = Witness(tmp_path, processes={os.getpid()})
    name = f"moesys-test_{os.getpid()}_0"
    ours, others = SHARED_MEMORY / name, SHARED_MEMORY / name.replace("test_", "test_9")
    try:
        ours.touch()
        others.touch()
        assert witness.shared_memory_left() == [name]
    finally:
        ours.unlink(missing_ok=True)
        others.unlink(missing_ok=True)


@pytest.mark.timeout(1500)
@pytest.mark.chaos
def test_a_restart_leaves_nothing_and_opens_nothing_more(tiny_data: Path, tmp_path: Path) -> None:
    """Killed with a checkpoint half written, which only the next start can remove."""
    watched, witness = train(
        tiny_data, tmp_path / "run", "kill rank=0 step=10 phase=save", steps=24, nproc=1
    )
    assert_nothing_is_left(watched, witness)
    assert watched.outcomes[0].restarts == 1
    before, after = witness.agents
    assert descriptors(after) <= descriptors(before)
    before, after = witness.ranks
    assert descriptors(after) <= descriptors(before)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_many_restarts_and_steps_cost_no_memory(tiny_data: Path, tmp_path: Path) -> None:
    faults = [
        f"{kind} rank={number % 2} step={60 * number} phase={phase}"
        for number, (kind, phase) in enumerate(
            [
                *(("kill", "forward"), ("exception", "backward"), ("corrupt_checkpoint", "data")),
                *(("kill", "save"), ("exception", "save"), ("kill", "optimizer")),
            ],
            1,
        )
    ]
    watched, witness = train(tiny_data, tmp_path / "run", "; ".join(faults), steps=1200)
    assert_nothing_is_left(watched, witness)
    assert [outcome.survived for outcome in watched.outcomes] == [True] * len(faults)
    restarts = [outcome.restarts for outcome in watched.outcomes]
    assert restarts == [1, 1, 1, 1, 0, 1]  # a save that fails is told, and steps go on
    assert len(witness.ranks) == sum(restarts) + 1
    first, last = witness.agents[0], witness.agents[-1]
    assert descriptors(last) <= descriptors(first)
    settled = [
        statistics.median(sample.memory_bytes for sample in samples[-5:])
        for samples in witness.ranks[:-1]
    ]
    print(f"rank 0 by start: {[round(size / 2**20) for size in settled]} MiB")
    assert max(settled[1:]) - settled[0] <= MOST_GROWN_BYTES
    sizes = [sample.memory_bytes for sample in witness.ranks[-1]]
    quarter = len(sizes) // 4
    assert quarter > SETTLED_SAMPLES
    early = statistics.median(sizes[SETTLED_SAMPLES:quarter])
    late = statistics.median(sizes[-quarter:])
    print(f"rank 0 over {len(sizes)} looks: {(late - early) / 2**20:.1f} MiB more")
    assert late - early <= MOST_GROWN_BYTES
