"""Other files, the same checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from moesys.checkpoint.diff import diff
from moesys.checkpoint.errors import CheckpointError
from moesys.checkpoint.manifest import read_manifest
from moesys.checkpoint.reshard import plan_reshard, reshard
from moesys.checkpoint.store import load, save
from moesys.checkpoint.verify import verify
from moesys.testing.ranks import run_ranks
from tests.checkpoint.test_cli_ckpt import call
from tests.checkpoint.test_store import expert_tensors, same_bits, save_job

NUM_BYTES = 33 * 8 * 2 + 8 * 4 + 8 + 8 * 2 * 3 * 5 * 4 + 4 * 3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved by four ranks, the experts in four boxes."""
    directory = tmp_path_factory.mktemp("source")
    run_ranks(save_job, 4, directory, [4])
    return directory / "step_00000044"


@pytest.mark.parametrize("ranks", [1, 3, 50])
def test_it_is_the_same_checkpoint_in_even_files(source: Path, tmp_path: Path, ranks: int) -> None:
    seen: list[tuple[int, int]] = []
    plan = plan_reshard(source, ranks)
    path = reshard(plan, tmp_path, lambda done, total: seen.append((done, total)))
    assert path == tmp_path / "step_00000044"
    assert list(tmp_path.iterdir()) == [path]
    assert verify(path) == []
    assert all(result.is_equal for result in diff(source, path))

    old, new = read_manifest(source), read_manifest(path)
    num_chunks = sum(len(record.chunks) for record in old.tensors.values())
    assert num_chunks == 11
    assert len(new.file_bytes) == min(ranks, num_chunks) == len(plan.file_bytes)
    assert max(plan.file_bytes.values()) - min(plan.file_bytes.values()) <= 33 * 8 * 2
    assert (new.step, new.state, new.world_size) == (old.step, old.state, 4)
    # What was saved where, and each rank's own tensors, stay as they were.
    assert new.tensors.keys() == old.tensors.keys()
    assert {n: r.grid for n, r in new.tensors.items()} == {
        n: r.grid for n, r in old.tensors.items()
    }
    # All is read once, written and read back once.
    assert plan.num_bytes == NUM_BYTES
    assert seen[-1] == (2 * NUM_BYTES, 2 * NUM_BYTES)
    assert sorted(seen) == seen

    whole, request = expert_tensors(1)
    for tensor in request.values():
        tensor.zero_()
    assert load(path, request).state == {"ep": 4}
    assert all(same_bits(request[name], whole[name]) for name in whole)


def test_large_shares_are_cut_and_other_programs_read_the_files(
    source: Path, tmp_path: Path
) -> None:
    path = reshard(plan_reshard(source, 1, max_file_bytes=300), tmp_path)
    names = sorted(read_manifest(path).file_bytes)
    assert names[:2] == ["shard-00000-001.safetensors", "shard-00000-002.safetensors"]
    found = {}
    for name in names:
        with safe_open(path / name, framework="pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    whole, _ = expert_tensors(1)
    assert same_bits(found["dense@0,0"], whole["dense"])
    assert same_bits(found["experts@2,0,0,0"], whole["experts"][2:4])
    assert same_bits(found["steps@"], whole["steps"])


def test_a_damaged_source_leaves_nothing(source: Path, tmp_path: Path) -> None:
    tensors = {"x": torch.ones(4), "y": torch.ones(3)}
    bad = save(tmp_path / "bad", 3, tensors, {}, keep_last=1).path
    shard = bad / "shard-00000.safetensors"
    content = shard.read_bytes()
    for damaged in (content[:-1] + b"\xff", content[:-2]):
        shard.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"shard-00000\.safetensors"):
            reshard(plan_reshard(bad, 2), tmp_path / "new")
        assert list((tmp_path / "new").iterdir()) == []


def test_a_step_that_is_there_is_never_replaced(source: Path) -> None:
    before = sorted(source.parent.rglob("*"))
    with pytest.raises(ValueError, match="has step 44 already: name another folder"):
        reshard(plan_reshard(source, 2), source.parent)
    assert sorted(source.parent.rglob("*")) == before


def test_what_another_save_is_writing_there_stays(source: Path, tmp_path: Path) -> None:
    under_way = tmp_path / "step_00000050.tmp-ab12"
    under_way.mkdir()
    reshard(plan_reshard(source, 2), tmp_path)
    assert under_way.is_dir()


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("reshard", source, tmp_path / "new", "--ranks", 2, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "4 files" in lines[0]
    assert "2 files of 11 chunks" in lines[1]
    planned = {line.split()[0]: int(line.split()[1].replace(",", "")) for line in lines[3:5]}
    assert sum(planned.values()) == NUM_BYTES
    assert "Nothing was written" in lines[-1]
    assert not (tmp_path / "new").exists()

    # A folder of checkpoints stands for its newest.
    assert call("reshard", source.parent, tmp_path / "new", "--ranks", 2, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["files"] == planned
    assert told["path"] == str(tmp_path / "new" / "step_00000044")
    assert call("diff", source, tmp_path / "new") == 0
    with pytest.raises(ValueError, match="--ranks 0 must be at least 1"):
        call("reshard", source, tmp_path / "new", "--ranks", 0)
