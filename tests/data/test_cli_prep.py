"""moesys prep as a user meets it: a summary, JSON, plain lines or a bar."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moesys.cli import prep
from moesys.data.manifest import DataManifest
from tests.data.files import write_words


def call(*words: str) -> int:
    parser = argparse.ArgumentParser()
    prep.add_parser(parser.add_subparsers())
    return prep.run(parser.parse_args(["prep", *words]))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("cli")
    write_words(folder / "words", 30, 40)
    flags = ["--vocab-size", "300", "--val-fraction", "0.2", "--workers", "1"]
    return ["--input", str(folder / "words"), "--output", str(folder / "data"), *flags]


def test_prep_then_json_then_other_arguments(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    output = words[3]
    assert call(*words, "--dry-run") == 0
    assert "the output folder: empty\n30 files" in capsys.readouterr().out
    assert not Path(output).exists()
    assert call(*words) == 0
    said = capsys.readouterr()
    splits = DataManifest.load(output).splits
    assert f"{output}: 1 parts, 0 of them from before" in said.out
    assert f"{splits['train'].tokens:,} tokens" in said.out
    assert "tokenising: " in said.err
    assert call(*words, "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == DataManifest.load(output).to_json()
    assert call(*words) == 0
    assert f"{output}: finished before, nothing to do" in capsys.readouterr().out
    assert call(*words, "--dry-run", "--json", "--seed", "5") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["state"] == "another prep (seed was 0, now 5): needs --overwrite"
    assert sum(plan["documents"].values()) == 30
    with pytest.raises(ValueError, match="seed was 0, now 5"):
        call(*words, "--seed", "5")


def test_plain_progress_tells_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([100.0, 102.0, 106.0, 108.0])
    monkeypatch.setattr(prep.time, "monotonic", lambda: next(clock))
    with prep.PlainReporter() as reporter:
        reporter.phase("tokenising", 10_000_000, 4_000_000)
        for _ in range(3):
            reporter.advance(1_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "tokenising: 10.0 MB",
        "tokenising: 6.0 MB of 10.0 MB, 60%, 0.3 MB/s, 12 s left",
    ]


def test_a_terminal_gets_a_bar(words: list[str]) -> None:
    ours, theirs = os.openpty()
    script = "import sys; from tests.data.test_cli_prep import call; sys.exit(call(*sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", script, *words, "--dry-run", "--json"],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
        check=True,
    )
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert json.loads(done.stdout)["files"] == 30
    assert "reading" in shown
    assert "━" in shown


def test_a_write_that_fails_is_told_in_one_message(words: list[str], tmp_path: Path) -> None:
    limited = (
        "import resource, sys; from moesys.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512)); sys.exit(main(sys.argv[1:]))"
    )
    flags = [*words[:3], str(tmp_path / "data"), *words[4:]]
    done = subprocess.run(
        [sys.executable, "-c", limited, "prep", *flags], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "File too large" in done.stderr
    assert "the same command goes on from the finished parts" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_stops_at_once_and_says_how_to_go_on(tmp_path: Path) -> None:
    write_words(tmp_path / "words", 300, 400)
    large = tmp_path / "words" / "0.txt"  # the first part, at work for seconds
    large.write_bytes((tmp_path / "words" / "0000.txt").read_bytes() * 4000)
    script = "import sys; from moesys.cli import main; sys.exit(main(sys.argv[1:]))"
    flags = ["--input", str(tmp_path / "words"), "--output", str(tmp_path / "data")]
    flags += ["--vocab-size", "300", "--part-bytes", "6000", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, "prep", *flags], stderr=subprocess.PIPE, text=True
    )
    while len(list(tmp_path.glob("data/.prep/part-*.npz"))) < 3:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "stopped: the same command goes on from the finished parts" in said
    assert "Traceback" not in said
    assert not (tmp_path / "data" / ".prep" / "part-000000.npz").exists(), "waited for a part"


def test_help_needs_nothing_heavy() -> None:
    script = "import sys, moesys.cli.prep; assert not {'numpy', 'torch', 'rich', 'tokenizers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
