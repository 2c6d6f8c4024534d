"""A router that breaks the contract ends a job before its ranks meet, with its class and the rule."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moesys.config.dispatch_schema import CandidateConfig, DispatchConfig
from moesys.config.schema import BalanceConfig, ComponentConfig
from moesys.moe.contract import ContractError, check_configured
from moesys.testing.small_run import small_model
from tests.train.launched import overrides

RULES = {
    "OutOfRange": "topk_ids_TK must lie in -1..7",
    "NotANumber": "logits_TE must be finite numbers",
    "WrongShape": "probs_TE must be [16, 8], is [16, 7]",
    "Detached": "topk_weights_TK must come from the parameters with a gradient",
    "NoState": "forward must take (x_TD, state)",
    "Fails": "RuntimeError",
}


@pytest.mark.parametrize(
    "name",
    [n if n == "Detached" else pytest.param(n, marks=pytest.mark.chaos) for n in RULES],
)
def test_it_is_named(name: str, tiny_data: Path, tmp_path: Path) -> None:
    words = overrides(tmp_path / "run", tiny_data, "model.moe.num_experts=8", "parallel.ep=1")
    words.append(f"model.moe.router._target_=tests.moe.routers.broken.{name}")
    job = subprocess.run(
        [sys.executable, "-m", "moesys.train", *words], capture_output=True, text=True, timeout=120
    )
    assert job.returncode == 2, job.stderr
    assert f"tests.moe.routers.broken.{name}" in job.stderr
    assert RULES[name] in job.stderr
    assert "Traceback" not in job.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"copy_experts": 1, "balance": BalanceConfig()}, "chooses no expert: set model.moe.zero_"),
        ({"balance": BalanceConfig(global_loss_coef=0.1)}, "always even, .*: use balance=none"),
    ],
)
def test_what_a_router_that_blends_cannot_have_is_refused(changes: dict, rule: str) -> None:
    router = ComponentConfig(target="moesys.moe.routers.SoftRouter")
    model = small_model()
    blending = replace(model.moe, router=router)
    with pytest.raises(ContractError, match=rule):
        check_configured(replace(model, moe=replace(blending, **changes)))
    check_configured(replace(model, moe=blending))


def test_a_codec_of_tokens_is_refused_where_blends_travel() -> None:
    model = small_model()
    router = ComponentConfig(target="moesys.moe.routers.SoftRouter")
    lsh = ComponentConfig(target="moesys.moe.codecs.LshCodec")
    candidates = {"wire": CandidateConfig(), "near": CandidateConfig(codec=lsh)}
    codecs = DispatchConfig(candidates=candidates).codecs
    rule = r"candidates.near.codec=.*LshCodec is of tokens, .*SoftRouter sends blends"
    with pytest.raises(ContractError, match=rule):
        check_configured(replace(model, moe=replace(model.moe, router=router)), codecs)
    check_configured(model, codecs)


@pytest.mark.parametrize(("name", "fits"), [("PreGatedRouter", False), ("RecurrentRouter", True)])
def test_a_pyramid_is_refused_where_layers_hand_on_a_number_for_each_expert(name, fits) -> None:
    model = small_model(router=f"moesys.moe.routers.{name}", experts_by_layer=(4, 8))
    if fits:
        check_configured(model)
        return
    with pytest.raises(
        ContractError, match=r"4 in MoE layer 0 and 8 in MoE layer 1: use model.moe"
    ):
        check_configured(model)
