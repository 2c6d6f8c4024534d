"""The loads of the last step, in numbers and as pictures."""

from pathlib import Path

import numpy as np

from moesys.train.metrics import read_metrics
from tests.report.page_reader import Page


def test_the_last_loads_are_written_out(full_run: Path, full_page: Page) -> None:
    last = [
        record for record in read_metrics(full_run / "metrics.jsonl") if record["kind"] == "train"
    ][-1]
    load_LE = np.array(last["expert_load"])
    relative_LE = load_LE / load_LE.mean(axis=1, keepdims=True)
    at = full_page.texts.index("All layers at step 600")
    for layer in range(4):
        row = full_page.texts.index(f"layer\xa0{layer}", at)
        assert full_page.texts[row + 1 : row + 17] == [
            f"{value:.2f}" for value in relative_LE[layer]
        ]
    assert [image["alt"][:11] for image in full_page.images] == [f"MoE layer {i}" for i in range(4)]
    assert f"with {relative_LE[1].max():.2f} times the mean" in full_page.images[1]["alt"]
