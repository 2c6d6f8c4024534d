"""The commands of README.md work.

Every bash block says on the line before what becomes of it here:

    <!-- run -->             each line is run from the root of the repository; `make X` as `make -n X`,
                             since making X is what runs these tests, or takes minutes
    <!-- shown: reason -->   not run

`.venv/bin/` stands for the interpreter that runs the tests, whatever its folder is called.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(
    r"^(?P<mark>[^\n]*)\n```(?:bash|sh|shell|console)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


def commands(markdown: str) -> list[str]:
    """The commands to run. ValueError for a block that says neither run nor shown."""
    found = []
    for block in BLOCK.finditer(markdown):
        mark = block["mark"].strip()
        if mark == "<!-- run -->":
            lines = block["text"].replace("\\\n", " ").splitlines()
            found += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        elif not re.fullmatch(r"<!-- shown: .+ -->", mark):
            raise ValueError(f"a bash block is neither run nor shown:\n{block['text']}")
    return found


README = (ROOT / "README.md").read_text()


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
