"""Words that a public project does not hold: paths of one machine, hosts that serve packages."""

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOT_OURS = {".git", ".venv", "build", "dist", "runs", "__pycache__", ".ruff_cache", ".hypothesis"}

# In two halves, so that this file does not hold them.
BANNED = [
    first + second
    for first, second in [
        ("/wo", "rk/"),
        ("/r", "oot/"),
        ("/ho", "me/"),
        ("/opt/wh", "eels"),
        ("/opt/py", "pi"),
        ("py", "pi.org"),
        ("python", "hosted.org"),
        ("download.pyt", "orch.org"),
        ("--index", "-url"),
        ("--extra", "-index"),
        ("--find", "-links"),
    ]
]


def own_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        skipped = NOT_OURS | ({"data"} if Path(folder) == root else set())
        folders[:] = [
            name for name in folders if name not in skipped and not name.endswith(".egg-info")
        ]
        yield from (
            Path(folder, name) for name in files if not name.endswith((".so", ".o", ".bin", ".idx"))
        )


def banned_words(root: Path) -> list[str]:
    found = []
    for path in own_files(root):
        text = path.read_text(errors="replace")
        found += [f"{path.relative_to(root)}: {word}" for word in BANNED if word in text]
    return found


def test_no_file_names_a_machine_or_a_host() -> None:
    assert len(list(own_files(ROOT))) > 20
    assert not banned_words(ROOT)


def test_a_banned_word_is_found(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "corpus.txt").write_text(BANNED[0])
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text(f"see {BANNED[0]}main and {BANNED[5]}")
    assert banned_words(tmp_path) == [f"docs/page.md: {BANNED[0]}", f"docs/page.md: {BANNED[5]}"]
