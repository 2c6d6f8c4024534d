"""Benchmark results have one form, and docs/benchmarks.md says what they say."""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import docs, gpu, results
from benchmarks.measured import BEGIN, END
from moesys.cli import bench

ROOT = Path(__file__).resolve().parents[2]
ROWS: list[dict[str, results.Cell]] = [
    {"ranks": 2, "time_ms": 1.5},
    {"test": "a|b", "outcome": None},
]


def record(**changes: Any) -> dict[str, Any]:
    whole = {
        "name": "step",
        "command": "moesys bench step",
        "quick": False,
        "headline": {"step_ms": 1.25},
    }
    return whole | {"rows": ROWS, "env": results.environment()} | changes


@pytest.mark.parametrize("path", [None, *sorted(results.RESULTS.glob("*.json"))], ids=str)
def test_results_have_the_form(path: Path | None) -> None:
    if path is None:  # so that the list is never empty
        assert not results.form_faults(record())
        return
    found = json.loads(path.read_text())
    assert not results.form_faults(found)
    assert found["name"] == path.stem
    assert not found["quick"], "a quick result is no result"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"name": "Step 1"}, "name 'Step 1' is not lower_case"),
        ({"headline": {}}, "headline is empty"),
        ({"headline": {"step_ms": math.nan}}, "headline.step_ms = nan is not a finite number"),
        ({"headline": {"step_ms": "fast"}}, "headline.step_ms = 'fast' is not a finite number"),
        ({"rows": [{}]}, "rows[0] is not a row"),
        ({"rows": [{"times": [1, 2]}]}, "rows[0].times = [1, 2] is neither"),
        ({"rows": {}}, "rows is a dict, must be a list"),
        ({"env": {"cpu": "x"}}, "env has ['cpu']"),
        ({"extra": 1}, "keys are"),
    ],
)
def test_a_broken_form_is_found(changes: dict[str, Any], fault: str) -> None:
    assert any(fault in found for found in results.form_faults(record(**changes)))


def test_write_result_is_whole_and_says_where_it_ran(tmp_path: Path) -> None:
    path = results.write_result(
        "step", {"step_ms": 2.0}, ROWS, "moesys bench step", quick=False, folder=tmp_path
    )
    assert [p.name for p in tmp_path.iterdir()] == ["step.json"]
    written = json.loads(path.read_text())
    assert written["rows"] == ROWS
    assert written["env"]["packages"]["torch"].startswith("2.")
    assert written["env"]["memory_gib"] > 0
    with pytest.raises(ValueError, match=r"(?s)headline.*\n.*rows\[0\]"):
        results.write_result("step", {}, [{}], "moesys bench step", quick=False, folder=tmp_path)
    assert json.loads(path.read_text()) == written


def test_page_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.docs", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_stale_page_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    monkeypatch.setattr(docs, "PAGE", tmp_path / "docs" / "benchmarks.md")
    reliability = tmp_path / "docs" / "reliability.md"
    monkeypatch.setattr(sys, "argv", ["docs", "--check"])
    assert docs.main() == 1
    assert not docs.PAGE.exists()
    monkeypatch.setattr(sys, "argv", ["docs"])
    assert docs.main() == 0
    monkeypatch.setattr(sys, "argv", ["docs", "--check"])
    assert docs.main() == 0
    docs.PAGE.write_text(docs.PAGE.read_text() + "by hand")
    assert docs.main() == 1
    monkeypatch.setattr(sys, "argv", ["docs"])
    reliability.write_text(f"# Page\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    assert docs.main() == 0
    assert reliability.read_text().startswith(f"# Page\n\n{BEGIN}\n\n")
    assert reliability.read_text().endswith(f"\n{END}\n\nafter\n")
    assert "old" not in reliability.read_text()
    monkeypatch.setattr(sys, "argv", ["docs", "--check"])
    assert docs.main() == 0
    reliability.write_text(reliability.read_text().replace(END, f"by hand\n{END}"))
    assert docs.main() == 1
    reliability.write_text("without marks")
    with pytest.raises(ValueError, match="must have the lines"):
        docs.main()


def test_page_shows_headline_rows_and_machine() -> None:
    env = results.environment() | {
        "gpus": ["A100", "A100"],
        "driver": "550.1",
        "commit": "0" * 40,
        "dirty": True,
    }
    text = docs.page([record(env=env)])
    assert "| [step](#step) | step_ms | 1.25 |" in text
    assert "| ranks | time_ms |\n| --- | --- |\n| 2 | 1.5 |\n" in text
    assert "| test | outcome |\n| --- | --- |\n| a\\|b |  |\n" in text
    assert "    moesys bench step\n" in text
    assert "2 x A100 (driver 550.1)" in text
    assert "000000000000 with local changes" in text


def test_rows_of_another_run_say_which(tmp_path: Path) -> None:
    """Also after a third run, which measures neither."""
    first = results.write_result(
        "step", {"step_ms": 1}, ROWS, "first", quick=False, folder=tmp_path
    )
    for command in ("second", "third"):
        rows, sources = results.rows_of_before(first, ["test"])
        assert (rows, sources["test"]["command"]) == (ROWS[1:], "first")
        assert not results.form_faults(record(rows=rows, sources=sources))
        results.write_result(
            *("step", {"step_ms": 1}, [{"ranks": 1}, *rows], command),
            quick=False,
            folder=tmp_path,
            sources=sources,
        )
    text = docs.page([json.loads(first.read_text())])
    assert text.index("    third\n") < text.index("| ranks |") < text.index("`first`. ")
    assert text.index("`first`. ") < text.index("| test |")
    assert "second" not in text
    broken = {"test": {"command": "first", "env": {"cpu": "x"}}}
    assert any("env has ['cpu']" in f for f in results.form_faults(record(sources=broken)))


@pytest.fixture
def source_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The real benchmarks folder with one more benchmark, `tiny`, whose quick results go to tmp_path."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "results.py").touch()
    (folder / "tiny.py").write_text(
        'from benchmarks.results import Result\nDESCRIPTION = "adds"\nGPU = True\n'
        "def run(quick, progress):\n"
        '    progress("adding")\n'
        '    return Result(headline={"sum_steps": 2.0 if quick else 3.0}, rows=[{"a": 1}])\n'
    )
    import benchmarks

    monkeypatch.setattr(benchmarks, "__path__", [*benchmarks.__path__, str(folder)])
    monkeypatch.setattr(bench, "benchmarks_folder", lambda: folder)
    monkeypatch.setattr(results, "QUICK_RESULTS", tmp_path / "quick")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "full")
    monkeypatch.delitem(sys.modules, "benchmarks.tiny", raising=False)
    return tmp_path


def moesys_bench(*words: str) -> int:
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers())
    return bench.run(parser.parse_args(["bench", *words]))


def test_bench_lists_runs_and_keeps_quick_apart(
    source_tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert moesys_bench("--list") == 0
    assert capsys.readouterr().out.split() == ["tiny", "adds"]
    assert moesys_bench("tiny", "--quick", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["headline"] == {"sum_steps": 2.0}
    assert err == "adding\n"
    assert (source_tree / "quick" / "tiny_cpu.json").exists()
    assert not (source_tree / "full").exists()
    assert moesys_bench("all") == 0
    assert (
        json.loads((source_tree / "full" / "tiny_cpu.json").read_text())["command"]
        == "moesys bench tiny"
    )
    assert "sum_steps" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no benchmark fast; there are: tiny"):
        moesys_bench("fast")


def test_bench_without_sources_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesys.__file__", str(tmp_path / "moesys" / "__init__.py"))
    with pytest.raises(ValueError, match="part of the source tree"):
        moesys_bench("--list")


def test_gpu_runs_benchmarks_marked_for_it_and_survives_their_errors(source_tree: Path) -> None:
    folder = source_tree / "benchmarks"
    (folder / "broken.py").write_text(
        "GPU = True\ndef run(quick, progress):\n    raise RuntimeError('no memory')\n"
    )
    (folder / "cpu_only.py").write_text("raise AssertionError\n")
    headline, rows, failures = gpu.run_benchmarks(folder)
    assert headline["tiny_sum_steps"] == 3.0
    assert rows == [{"benchmark": "tiny", "a": 1}]
    assert failures == ["benchmark broken: RuntimeError: no memory"]


def test_gpu_tests_are_rows_and_their_failures_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert gpu.run_tests() == ([], "no test is marked gpu")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_other.py").write_text("import a_package_that_is_not_there\n")
    # The mark in two halves: this file is itself searched for it.
    mark = "import pytest\n@pytest.mark" + ".gpu\ndef "
    one = tmp_path / "tests" / "test_one.py"
    one.write_text(mark + "test_a():\n    pass\ndef test_unmarked():\n    assert 0\n")
    rows, problem = gpu.run_tests()
    assert problem is None
    assert [(row["test"], row["outcome"]) for row in rows] == [("tests.test_one.test_a", "passed")]
    one.write_text(mark + "test_a():\n    assert 0\n")
    rows, problem = gpu.run_tests()
    assert problem == "pytest ended with status 1"
    assert rows[0]["outcome"] == "failed"
    one.write_text(mark + "test_a():\n    pytest.skip('no')\n")
    assert gpu.run_tests()[1] == "no test marked gpu passed"


def test_gpu_result_is_written_also_when_something_failed(
    source_tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "ROOT", source_tree)
    monkeypatch.setattr(gpu, "missing", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    failed: gpu.Rows = [{"test": "test_a", "outcome": "failed", "time_s": 0.1}]
    monkeypatch.setattr(gpu, "run_tests", lambda: (failed, "pytest ended with status 1"))
    monkeypatch.setattr(gpu, "run_benchmarks", lambda: ({"tiny_sum_steps": 3.0}, [], []))
    assert gpu.main() == 1
    written = json.loads((source_tree / "full" / "gpu.json").read_text())
    assert written["headline"] == {
        "tests_passed": 0,
        "tests_failed": 1,
        "tests_skipped": 0,
        "tiny_sum_steps": 3.0,
    }
    assert written["rows"] == [{"failure": "pytest ended with status 1"}, *failed]
    assert "gpu: pytest ended with status 1" in capsys.readouterr().err
    passed: gpu.Rows = [{"test": "test_a", "outcome": "passed", "time_s": 0.1}]
    monkeypatch.setattr(gpu, "run_tests", lambda: (passed, None))
    assert gpu.main() == 0


def test_the_figures_that_the_project_promises_are_there() -> None:
    for name, figure in (
        ("layer_cpu", "min_ratio_to_best_peer"),
        ("step_cpu", "min_ratio_to_transformers"),
    ):
        record = json.loads((results.RESULTS / f"{name}.json").read_text())
        assert record["headline"][figure] >= 1.0, name
        assert not record["quick"]
