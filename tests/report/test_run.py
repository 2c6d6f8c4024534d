"""A run folder in bounded memory."""

from pathlib import Path

import numpy as np
import pytest

from moesys.report.run import read_run
from moesys.train.metrics import MetricsLog, read_metrics


def test_loads_and_holders_are_sampled_but_never_the_last(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with MetricsLog(tmp_path) as log:
        for step in range(1, 3001):
            log.write(
                {
                    "kind": "train",
                    "step": step,
                    "loss": 1.0,
                    "expert_holders": [[1, 1]],
                    "expert_load": [[step, 0]],
                }
            )
        log.write(
            {
                "kind": "train",
                "step": 3001,
                "loss": 1.0,
                "expert_holders": [[1, 4]],
                "expert_load": rng.integers(1, 9, (1, 2)).tolist(),
            }
        )
    run = read_run(tmp_path)
    assert run.loads is not None
    assert run.loads.stride > 1
    assert run.num_steps == 3001
    last = np.array(read_metrics(tmp_path / "metrics.jsonl")[-1]["expert_load"][0])
    assert run.loads.final_LE[0] == pytest.approx(last / last.mean())
    assert run.holders is not None
    assert run.holders.final_LE.tolist() == [[1, 4]]
    assert run.loads.final_step == run.holders.final_step == 3001
    assert len(run.loads.binned_SLE) == len(run.holders.binned_SLE) <= 320
    assert "expert_holders" not in run.last_train
