"""docs/custom_router.md is true: its files, written out as they stand, make a router that trains."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "custom_router.md"
FILE = re.compile(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```\n", re.DOTALL)


def write_files(folder: Path) -> list[str]:
    names = []
    for name, text in FILE.findall(PAGE.read_text()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        names.append(name)
    return names


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_page_has_its_three_files(tmp_path):
    assert write_files(tmp_path) == [
        "my_router.py",
        "check_router.py",
        "my_configs/router/cosine.yaml",
    ]


def test_the_router_passes_the_contract(tmp_path):
    write_files(tmp_path)
    done = run(tmp_path, "check_router.py")
    assert done.returncode == 0, done.stderr


def test_the_router_trains_alike_under_a_layout(tmp_path):
    write_files(tmp_path)
    check = 'from moesys.testing import router_contract as c; c.check_layouts("my_router.CosineRouter", layouts=["pp"], steps=1)'
    (tmp_path / "layouts.py").write_text(f'if __name__ == "__main__":\n    {check}\n')
    done = run(tmp_path, "layouts.py")
    assert done.returncode == 0, done.stderr


def test_the_router_trains_and_its_options_arrive(tmp_path, tiny_data):
    write_files(tmp_path)
    vocab_size = json.loads((tiny_data / "manifest.json").read_text())["tokenizer"]["vocab_size"]
    done = run(
        tmp_path,
        *("-m", "moesys", "train", "--config-dir", "my_configs"),
        *("experiment=quickstart", "model=tiny", "router=cosine", "parallel.ep=1"),
        *(f"data.path={tiny_data}", f"model.vocab_size={vocab_size}", "data.seq_len=32"),
        *("train.steps=3", "schedule.warmup_steps=1", "train.global_batch_tokens=128"),
        *("train.micro_batch_tokens=64", "train.eval_tokens=64", "run.dir=run"),
    )
    assert done.returncode == 0, done.stderr
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "my_router.CosineRouter" in config
    assert "temperature: 0.07" in config
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["kind"] == "train" for line in metrics) == 3


def test_a_misspelt_option_is_refused_with_a_suggestion(tmp_path):
    write_files(tmp_path)
    done = run(
        tmp_path,
        *("-m", "moesys", "config", "check", "--config-dir", "my_configs"),
        *("experiment=quickstart", "router=cosine", "model.moe.router.temp_erature=1"),
    )
    assert done.returncode == 2
    assert "temperature" in done.stderr
