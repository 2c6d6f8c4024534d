"""The share that waits in host memory, as a start finds it, by what a micro-batch's attention stays within."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moesys.config.compose import compose
from moesys.parallelize.offload import Offload
from moesys.plan.activations import token_bytes
from moesys.plan.batch.local import LocalPiece, LocalPieces
from moesys.plan.offload import HostLink
from moesys.profile.host_link import host_link
from moesys.train.offload import hidden_ratio, lengths_and_sizes, measure_offload
from tests.train.launched import overrides, records, run

CONFIG = compose(["model=small", "train.offload_ratio=null", "data.seq_len=256", "parallel.cp=2"])
CPU = torch.device("cpu")
FAST = HostLink(out_bytes_per_s=1e11, back_bytes_per_s=1e11)


def test_sequences_and_the_ranks_of_each() -> None:
    pieces = LocalPieces((LocalPiece(9, (0,), 0), LocalPiece(100, (1, 0, 2), 1)))
    assert lengths_and_sizes(CONFIG, pieces) == ([9, 100], [1, 3])
    assert lengths_and_sizes(CONFIG, None) == ([256] * 4, 2)
    documents = (56, 256), (256,)
    assert lengths_and_sizes(CONFIG, documents) == ([56, 200, 256], 2)


def test_longer_sequences_let_more_leave() -> None:
    """At a product rate at which samples of 256 tokens let a share leave."""
    ratio_of = hidden_ratio(CONFIG, FAST, flops_per_s=1e15)
    one = LocalPieces((LocalPiece(65_536, (0, 1), 0),))
    assert 0 < ratio_of(((128, 256),)) < ratio_of(None) < ratio_of(one) < 1
    assert ratio_of(LocalPieces(())) == 0
    slow = HostLink(out_bytes_per_s=1e11, back_bytes_per_s=1e11, start_s=1.0)
    assert hidden_ratio(CONFIG, slow, flops_per_s=1e15)(None) == 0


def test_ranks_that_share_products_and_bytes_have_the_same_ratio() -> None:
    shared = compose(["model=small", "data.seq_len=256", "parallel.tp=2"])
    ours, theirs = (
        hidden_ratio(config, FAST, flops_per_s=1e15)(None) for config in (shared, CONFIG)
    )
    assert ours == pytest.approx(theirs * token_bytes(CONFIG) / token_bytes(shared) / 2)


def test_the_way_to_the_host_is_measured() -> None:
    link = host_link(CPU, repeats=1)
    assert 1e8 < link.out_bytes_per_s < 1e13
    assert 1e8 < link.back_bytes_per_s < 1e13
    assert 0 < link.start_s < 1


def test_a_start_sets_what_was_left_open() -> None:
    """A CPU's product is slow beside its copies."""
    for ratio, expected in (("null", 1.0), ("0.25", 0.25)):
        config = compose(["model=small", f"train.offload_ratio={ratio}"])
        offload = Offload(CPU, lambda _, given=config.train.offload_ratio: given or 0.0)
        parallel, process = SimpleNamespace(offload=offload), SimpleNamespace(device=CPU)
        run: Any = SimpleNamespace(config=config, parallel=parallel, process=process)
        assert bool(measure_offload(run, torch.float32)) == (ratio == "null")
        assert offload.ratio_of(LocalPieces((LocalPiece(10**6, (0,), 0),))) == expected


def test_a_job_finds_its_ratio_and_learns_the_same(tiny_data: Path, tmp_path: Path) -> None:
    losses = {}
    for ratio in ("0", "null"):
        folder = tmp_path / ratio
        more = [f"train.offload_ratio={ratio}", "model.num_layers=3", "train.steps=4"]
        run(1, overrides(folder, tiny_data, *more, "parallel.ep=1"))
        (begun,) = records(folder, "start")
        losses[ratio] = [record["loss"] for record in records(folder, "train")]
        assert ("offload" in begun) == (ratio == "null")
        if "offload" in begun:
            assert begun["offload"]["out_gbytes_per_s"] > 0.1
    assert losses["0"] == losses["null"]
