"""The snapshot: what the tree was, whole or not at all, and untouched by what happens to the tree later."""

import json
import subprocess
from pathlib import Path

import pytest

from moesys.config.compose import compose, load_resolved
from moesys.launch.snapshot import has_source, take_snapshot, write_config


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree under git, with an ignored library, a new module and a new file outside the package."""
    tree = tmp_path / "tree"
    for name, text in {
        ".gitignore": "*.so\n/runs\n",
        "moesys/__init__.py": "",
        "moesys/a b.py": "1",
        "moesys/gone.py": "",
        "launch/job.sh": "",
        "docs/page.md": "",
    }.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    git(tree, "init", "--quiet")
    git(tree, "add", "-A")
    git(tree, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "x")
    return tree


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(folder), *words], check=True)


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_the_tree_as_it_lies_on_the_disk(tree: Path, tmp_path: Path) -> None:
    (tree / "moesys" / "a b.py").write_text("2")
    (tree / "moesys" / "new.py").write_text("")
    (tree / "moesys" / "libmoesys.so").write_text("built")
    (tree / "moesys" / "gone.py").unlink()
    (tree / "data.bin").write_text("a large file of the user's")
    run = tmp_path / "run"
    run.mkdir()
    snapshot = take_snapshot(run, tree)
    assert files(run / "code") == {
        *(".gitignore", "moesys/__init__.py", "moesys/a b.py", "moesys/new.py", "docs/page.md"),
        *("moesys/libmoesys.so", "launch/job.sh", "snapshot.json"),
    }
    assert (run / "code" / "moesys" / "a b.py").read_text() == "2"
    assert snapshot.has_package
    assert snapshot.is_changed
    facts = json.loads((run / "code" / "snapshot.json").read_text())
    assert len(facts["commit"]) == 40
    assert [p.name for p in run.iterdir()] == ["code"]


def test_a_later_one_replaces_it_and_keeps_nothing(tree: Path, tmp_path: Path) -> None:
    assert not take_snapshot(tmp_path, tree).is_changed
    git(tree, "rm", "--quiet", "docs/page.md")
    take_snapshot(tmp_path, tree)
    assert "docs/page.md" not in files(tmp_path / "code")
    assert not list(tmp_path.glob(".code*"))


def test_an_installed_package_leaves_launch_alone(tmp_path: Path) -> None:
    """In an environment inside another project's tree, too: what that tracks is not ours."""
    site = tmp_path / "project" / "site-packages"
    (site / "launch").mkdir(parents=True)
    (site / "launch" / "job.sh").write_text("")
    git(tmp_path / "project", "init", "--quiet")
    assert not has_source(site)
    snapshot = take_snapshot(tmp_path, site)
    assert not snapshot.has_package
    assert snapshot.commit is None
    assert files(tmp_path / "code") == {"launch/job.sh", "snapshot.json"}


def test_without_job_sh_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reinstall moesys"):
        take_snapshot(tmp_path, tmp_path / "nothing")


def test_the_configuration_is_read_back(tmp_path: Path) -> None:
    config = compose(["optim.lr=0.5"])
    assert load_resolved(write_config(tmp_path / "run", config)) == config
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["config.yaml"]
