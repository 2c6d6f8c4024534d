"""The commands of README.md work, and those that start a training have a configuration that is accepted.

Every bash block of README.md says on the line before what becomes of it here:

    <!-- run -->             each line is run from the root of the repository; `make X` as `make -n X`,
                             since making X is what runs these tests, or takes minutes
    <!-- shown: reason -->   not run

A line that trains, in any bash block of README.md or docs/, is checked: its configuration, on the
ranks that the line starts, by `moesys config check`, in a folder with the files that the page
writes out and the data that its lines prepare.

`.venv/bin/` stands for the interpreter that runs the tests, whatever its folder is called.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from test_router_page import FILE

from moesys.cli import prep
from tests.config.prepared import prepared_data

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(
    r"^(?P<mark>[^\n]*)\n```(?:bash|sh|shell|console)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
TRAINING = re.compile(r"(?:\bmoesys train|-m moesys\.train|\blaunch/run\.sh)(?= |$)")
RUN_SH_RANKS = 2  # per machine, where launch/run.sh sees no GPU


def blocks(markdown: str) -> Iterator[tuple[str, list[str]]]:
    """The line before each bash block, and the block's commands."""
    for block in BLOCK.finditer(markdown):
        lines = block["text"].replace("\\\n", " ").splitlines()
        yield (
            block["mark"].strip(),
            [line.strip() for line in lines if line.strip() and not line.startswith("#")],
        )


def commands(markdown: str) -> list[str]:
    """The commands to run. ValueError for a block that says neither run nor shown."""
    found = []
    for mark, lines in blocks(markdown):
        if mark == "<!-- run -->":
            found += lines
        elif not re.fullmatch(r"<!-- shown: .+ -->", mark):
            raise ValueError("a bash block is neither run nor shown:\n" + "\n".join(lines))
    return found


class Training(NamedTuple):
    """What a line trains."""

    ranks: int
    configuration: list[str]
    """Overrides and --config-dir."""


def training(command: str) -> Training | None:
    """Of `moesys train`, launch/run.sh, torchrun, mpirun or a fabric, each under srun or not; None of another command."""
    found = TRAINING.search(command)
    if found is None:
        return None
    launcher = argparse.ArgumentParser(allow_abbrev=False)
    launcher.add_argument("--nnodes", "--nodes", "-N", type=int, default=1)
    names = (
        "--nproc-per-node",
        "--nproc_per_node",
        "-n",
        "--ranks-per-node",
    )  # the last: a fabric's
    launcher.add_argument(*names, dest="nproc_per_node", type=int)
    launcher.add_argument("--ntasks-per-node", type=int, default=1)  # above 1 every task is a rank
    outer, _ = launcher.parse_known_args(shlex.split(command[: found.start()]))
    job = argparse.ArgumentParser(allow_abbrev=False)
    if "-m" not in found[0]:  # the module is one rank, and takes neither
        job.add_argument("--nproc", type=int)
        job.add_argument("--dry-run", action="store_true")
    if "run.sh" in found[0]:
        job.add_argument("--relaunch")
        job.add_argument("--nodes", default="")
        job.add_argument("--meeting")
    words = shlex.split(command[found.end() :], comments=True)
    inner, configuration = job.parse_known_args(words)
    nodes, per_node = outer.nnodes, outer.nproc_per_node
    if "run.sh" in found[0]:
        nodes = int(inner.nodes.rpartition(":")[2] or nodes)  # as many as may come
        per_node = inner.nproc or max(RUN_SH_RANKS, outer.ntasks_per_node)
    elif "-m" not in found[0]:
        per_node = inner.nproc
    return Training(nodes * (per_node or 1), configuration)


def prepare(page: str, folder: Path) -> None:
    """The files that a page writes out; the data of its lines and of `make`, as far as a check looks."""
    for name, text in FILE.findall(page):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    parser = argparse.ArgumentParser()
    prep.add_parser(parser.add_subparsers())
    said = [line for _, lines in blocks(page) for line in lines]
    for line in (ROOT / "Makefile").read_text().splitlines() + said:
        _, found, options = line.partition("moesys prep ")
        if found:
            args = parser.parse_args(["prep", *shlex.split(options, comments=True)])
            prepared_data(folder / args.output, vocab_size=args.vocab_size or 4096)


def check(line: Training, folder: Path) -> subprocess.CompletedProcess[str]:
    command = f"-m moesys config check --world-size {line.ranks}"
    return subprocess.run(
        [sys.executable, *command.split(), *line.configuration],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
TRAININGS = [
    (name, line)
    for name, page in sorted(PAGES.items())
    for _, lines in blocks(page)
    for line in lines
    if TRAINING.search(line)
]


def test_readme_has_the_two_commands() -> None:
    assert {"make quickstart", "make test"} <= set(commands(README))


@pytest.mark.parametrize("command", commands(README))
def test_command_works(command: str) -> None:
    binaries = f"{Path(sys.executable).parent}/"
    line = re.sub(r"^make\b", "make -n", command).replace(".venv/bin/", binaries)
    environment = {k: v for k, v in os.environ.items() if k != "MAKEFLAGS"}
    environment["PATH"] = f"{binaries}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert done.stdout, "a command of the README says something"


def test_every_way_to_start_is_shown() -> None:
    ways = {found[0] for name, line in TRAININGS if (found := TRAINING.search(line))}
    assert ways == {"moesys train", "-m moesys.train", "launch/run.sh"}
    assert {name for name, _ in TRAININGS} == {
        "README.md",
        "batches.md",
        "launch.md",
        "placement.md",
        "custom_router.md",
        "data.md",
        "fabric.md",
    }


@pytest.mark.parametrize(("name", "line"), TRAININGS)
def test_what_a_line_trains_is_accepted(name: str, line: str, tmp_path: Path) -> None:
    prepare(PAGES[name], tmp_path)
    found = training(line)
    assert found is not None
    done = check(found, tmp_path)
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert f"ok on {found.ranks} ranks" in done.stdout


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("moesys train --nproc 2 experiment=quikstart", "did you mean quickstart"),
        ("moesys train --nproc 2 experiment=quickstart optim.lrr=1", "did you mean optim.lr"),
        ("srun launch/run.sh --nproc 3 experiment=quickstart", "must divide the world size 3"),
        ("torchrun -m moesys.train experiment=quickstart", "must divide the world size 1"),
        ("torchrun --nproc-per-node 2 -m moesys.train --nproc 2", "does not take --nproc"),
        ("moesys train parallel.ep=1 data.path=data/other", "does not exist"),
        ("moesys train parallel.ep=1 model.vocab_size=2047", "at least the 2048 tokens"),
        ("moesys train --config-dir my_configs router=cosine", "my_configs"),
    ],
)
def test_what_a_wrong_line_trains_is_refused(line: str, message: str, tmp_path: Path) -> None:
    prepare(README, tmp_path)
    found = training(line)
    assert found is not None
    done = check(found, tmp_path)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    ("line", "ranks"),
    [
        ("moesys train a=b  # alone", 1),
        (".venv/bin/moesys train a=b --nproc 4", 4),
        ("X=1 python -m moesys train --dry-run a=b", 1),
        ("launch/run.sh a=b", RUN_SH_RANKS),
        ("srun --nodes=3 --ntasks-per-node=1 launch/run.sh --nproc 8 a=b", 24),
        ("srun --nodes=2 --ntasks-per-node=8 launch/run.sh a=b", 16),
        ("launch/run.sh --nodes 2:4 --meeting host:1 --nproc 8 --relaunch 0 a=b", 32),
        ("torchrun --nnodes 2 --nproc-per-node=4 -m moesys.train a=b", 8),
        ("moesys-fabric run --nodes 4 --ranks-per-node 2 -- python -m moesys.train a=b", 8),
    ],
)
def test_ranks_and_overrides_are_read_off_a_line(line: str, ranks: int) -> None:
    assert training(line) == Training(ranks, ["a=b"])


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_blocks_are_told_apart() -> None:
    run = "text\n\n<!-- run -->\n```bash\n# a comment\nmake a\nb \\\n  c\n```\n"
    assert commands(run) == ["make a", "b    c"]
    assert commands("<!-- shown: slow -->\n```bash\nsleep 99\n```\n") == []
    with pytest.raises(ValueError, match="neither run nor shown"):
        commands("text\n\n```bash\nrm x\n```\n")
