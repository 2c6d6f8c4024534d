"""The peak is measured once for a run folder, and again where what it depends on has changed."""

from pathlib import Path

import pytest

from moesys.train.job import main
from moesys.train.peak import FILE_NAME, Conditions, kept
from tests.train.launched import overrides, records

HERE: Conditions = {"node": "n1", "device": "x86_64", "threads": 1, "dtype": "fp32", "torch": "2"}


def test_a_later_start_measures_only_what_is_other(tmp_path: Path) -> None:
    measured = iter((1.0, 2.0, 3.0))
    path = tmp_path / FILE_NAME

    def ask(**changes: str | int) -> tuple[float, bool]:
        return kept(path, HERE | changes, lambda: next(measured))

    assert ask() == (1.0, False)
    assert ask() == (1.0, True)
    assert ask(threads=2) == (2.0, False)
    assert ask(threads=2) == (2.0, True)
    assert ask(node="n2") == (3.0, False)
    assert [file.name for file in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parity
def test_a_start_that_goes_on_multiplies_no_large_matrices(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    products = []

    def measure(device: object, dtype: object) -> float:
        products.append(dtype)
        return 0.5

    monkeypatch.setattr("moesys.train.peak.matmul_tflops", measure)
    run = tmp_path / "run"
    for steps in (4, 8):
        words = overrides(run, tiny_data, "parallel.ep=1", "train.eval_every_steps=0")
        assert main([*words, f"train.steps={steps}"]) == 0
    assert len(products) == 1
    first, second = records(run, "start")
    assert (first["peak_tflops"], second["peak_tflops"]) == (0.5, 0.5)
    assert second["peak_source"] == f"kept from {FILE_NAME}, a large fp32 matrix product on rank 0"
    assert main([*words, "train.steps=8", "metrics.peak_tflops=2"]) == 0
    assert len(products) == 1
    assert records(run, "start")[-1]["peak_source"] == "set by metrics.peak_tflops"
