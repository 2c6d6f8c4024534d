"""A prep that dies anywhere is finished by the same command, to the same bytes, from the parts it had."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from moesys.data.parts import tokenise_part
from moesys.data.prepare import Prepared, prepare
from moesys.data.recipe import PrepArguments, Recipe
from tests.data.files import Silent, write_words

PREP = """
import sys
from moesys.data.prepare import prepare
from moesys.data.recipe import PrepArguments
from tests.data.files import Silent

source, output, workers = sys.argv[1:]
prepare(
    PrepArguments(inputs=[source], output=output, vocab_size=400, part_bytes=6000, workers=int(workers)),
    Silent(),
)
"""


class PowerCut(BaseException):
    pass


def run(
    source: Path, output: Path, reporter: Silent | None = None, **changed: Any
) -> tuple[Prepared, list[str]]:
    reporter = reporter or Silent()
    arguments = PrepArguments(
        inputs=[str(source)], output=str(output), vocab_size=400, part_bytes=6000, **changed
    )
    return prepare(arguments, reporter), reporter.lines


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "words"
    write_words(folder, 300, 400)
    return folder


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("undisturbed")
    run(corpus, output)
    return contents(output)


@pytest.mark.parametrize("workers", [1, 3])
def test_killed_while_tokenising(
    corpus: Path, undisturbed: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    output = tmp_path / "data"
    process = subprocess.Popen([sys.executable, "-c", PREP, str(corpus), str(output), str(workers)])
    deadline = time.monotonic() + 60
    while len(done := list(output.glob(".prep/part-*.npz"))) < 3:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive, "workers outlived their parent"
    times = {path.name: path.stat().st_mtime_ns for path in output.glob(".prep/part-*.npz")}
    assert not (output / "manifest.json").exists()
    with pytest.raises(ValueError, match=r"finished parts of something else \(seed was 0, now 9\)"):
        run(corpus, output, seed=9)
    assert {p.name: p.stat().st_mtime_ns for p in output.glob(".prep/part-*.npz")} == times
    prepared, lines = run(corpus, output)
    assert prepared.reused_parts == len(times) >= len(done)
    assert prepared.reused_parts < prepared.num_parts
    assert f"resumed: {len(times)} of {prepared.num_parts} parts were done" in lines
    assert contents(output) == undisturbed


def test_a_killed_worker_is_told(
    corpus: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    def kill_one() -> None:
        while len(list(tmp_path.glob(".prep/part-*.npz"))) < 3:
            time.sleep(0.001)
        multiprocessing.active_children()[0].kill()

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    with pytest.raises(ValueError, match="a worker process was killed, perhaps for lack of memory"):
        run(corpus, tmp_path, workers=2)
    killer.join()
    assert multiprocessing.active_children() == []
    prepared, _ = run(corpus, tmp_path)
    assert prepared.reused_parts >= 3
    assert contents(tmp_path) == undisturbed


def test_cut_off_before_any_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything becomes visible by os.replace, so these are all the states that a kill can leave."""
    write_words(tmp_path / "words", 80, 40)
    replace = os.replace
    renames: list[str] = []
    cut_at = -1

    def replace_until_cut(source: Any, target: Any) -> None:
        if len(renames) == cut_at:
            raise PowerCut
        renames.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_until_cut)
    run(tmp_path / "words", tmp_path / "undisturbed")
    wanted, count = contents(tmp_path / "undisturbed"), len(renames)
    assert renames[:3] == ["inputs.json", "plan.json", "tokenizer.json"]
    assert renames[-1] == "manifest.json"
    assert count == 10
    for cut in range(count):
        output = tmp_path / f"cut-{cut}"
        renames.clear()
        cut_at = cut
        with pytest.raises(PowerCut):
            run(tmp_path / "words", output)
        cut_at = -1
        reporter = Silent()
        prepared, _ = run(tmp_path / "words", output, reporter)
        assert contents(output) == wanted
        assert ("training the tokenizer" in reporter.phases) == (cut <= 2)
        assert not prepared.was_finished
        assert prepared.reused_parts == (prepared.num_parts if cut > 2 else 0)


def test_cut_off_while_cleaning_up(
    corpus: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    run(corpus, tmp_path)
    (tmp_path / ".prep").mkdir()
    (tmp_path / ".prep" / "part-000000.npz").touch()
    prepared, _ = run(corpus, tmp_path)
    assert prepared.was_finished
    assert contents(tmp_path) == undisturbed


def leave_parts(corpus: Path, output: Path) -> list[Path]:
    """A prep that dies with all parts done and no .bin moved into place."""
    replace = os.replace

    def replace_until_cut(source: Any, target: Any) -> None:
        if Path(target).name == "train.bin":
            raise PowerCut
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace_until_cut)
        with pytest.raises(PowerCut):
            run(corpus, output, workers=2)
    return sorted(output.glob(".prep/part-*.npz"))


def test_a_damaged_part_is_made_again(
    corpus: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    parts = leave_parts(corpus, tmp_path)
    flipped = bytearray(parts[2].read_bytes())
    flipped[len(flipped) // 2] ^= 1
    parts[2].write_bytes(flipped)
    os.truncate(parts[4], 100)
    for part in (parts[2], parts[4]):
        with pytest.raises(ValueError, match=rf"{part.name}: a damaged part, now removed"):
            run(corpus, tmp_path)
    prepared, _ = run(corpus, tmp_path)
    assert prepared.reused_parts == prepared.num_parts - 1
    assert contents(tmp_path) == undisturbed


def test_overwrite_takes_over_no_part_of_another_prep(corpus: Path, tmp_path: Path) -> None:
    leave_parts(corpus, tmp_path / "data")
    prepared, lines = run(corpus, tmp_path / "data", seed=9, overwrite=True)
    assert prepared.reused_parts == 0
    assert "starting over" in lines[0]
    run(corpus, tmp_path / "fresh", seed=9)
    assert contents(tmp_path / "data") == contents(tmp_path / "fresh")


def test_overwrite_resumes_its_own_parts(corpus: Path, tmp_path: Path) -> None:
    parts = leave_parts(corpus, tmp_path)
    prepared, _ = run(corpus, tmp_path, overwrite=True)
    assert prepared.reused_parts == len(parts)


def test_a_part_is_not_there_before_it_is_whole(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_parts(corpus, tmp_path)
    recipe = Recipe(PrepArguments(inputs=[str(corpus)], output="x"), Silent())
    job = recipe.jobs(tmp_path / "tokenizer.json", tmp_path)[0]

    def half(file: Any, **_: Any) -> None:
        file.write(b"half")
        raise PowerCut

    monkeypatch.setattr("numpy.savez", half)
    with pytest.raises(PowerCut):
        tokenise_part(job)
    assert not job.path.exists()
