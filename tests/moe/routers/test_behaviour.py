"""What routers do that no formula of one token says: noise, jitter, hashing, groups, decreed loads, replay.

Shapes: T tokens, D model, E experts, K experts per token.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from moesys.moe.contract import route
from moesys.moe.routers import (
    CosineRouter,
    ExpertChoiceRouter,
    GroupLimitedRouter,
    HashRouter,
    LoadReplayRouter,
    NoisyTopKRouter,
    PreGatedRouter,
    RoundRobinRouter,
    SoftRouter,
    SwitchRouter,
    TopKRouter,
    ZipfRouter,
)
from moesys.moe.routers.hash import mixed, mixed_int
from moesys.moe.routers.load_replay import recorded_loads, sampled
from moesys.moe.routing import StepLoad
from moesys.moe.tokens import Tokens
from moesys.ops import tokens_per_expert

T, D, E, K = 64, 8, 8, 2


def drawn(router: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return router


def made(cls, **options):
    return drawn(cls(**({"d_model": D, "num_experts": E, "top_k": K} | options)))


X_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(1))


def test_noise_is_as_wide_as_its_weights_say_and_only_in_training():
    router = made(NoisyTopKRouter)
    clean = route(router.eval(), X_TD).logits_TE
    assert torch.equal(clean, route(router, X_TD, seed=2).logits_TE)
    router.train()
    draws = torch.stack([route(router, X_TD, seed=s).logits_TE for s in range(400)])
    width = torch.nn.functional.softplus(X_TD @ router.noise_weight.t())
    torch.testing.assert_close(draws.mean(0), clean, rtol=0, atol=0.3 * width.max().item())
    ratio = draws.std(0) / width
    assert ratio.min() > 0.8
    assert ratio.max() < 1.25
    # The width learns.
    (grad,) = torch.autograd.grad(route(router, X_TD).logits_TE.sum(), router.noise_weight)
    assert grad.any()


def test_jitter_stays_within_its_bounds_and_out_of_evaluation():
    router = made(SwitchRouter, top_k=1, jitter=0.1)
    seen = []
    router.weight.data.copy_(torch.eye(E, D))
    for seed in range(50):
        seen.append(route(router, X_TD, seed=seed).logits_TE / X_TD)
    ratios = torch.stack(seen)
    assert 0.9 <= ratios.min() < 0.91
    assert 1.09 < ratios.max() <= 1.1 + 1e-6
    assert torch.equal(route(router.eval(), X_TD).logits_TE, X_TD)
    weights = route(router, X_TD).topk_weights_TK[:, 0]
    assert torch.equal(weights, X_TD.softmax(-1).max(-1)[0])


def test_the_temperature_of_cosines_is_kept_in_bounds():
    router = made(CosineRouter)
    for log_scale, largest in [(50.0, 100.0), (-50.0, 1.0)]:
        router.log_scale.data.fill_(log_scale)
        assert route(router, X_TD).logits_TE.abs().max() <= largest * (1 + 1e-5)
    scaled = route(router, 7 * X_TD).logits_TE
    torch.testing.assert_close(scaled, route(router, X_TD).logits_TE)


def test_a_hash_is_by_token_id_layer_and_seed_alone():
    ids_T = torch.arange(4096) % 1024
    tokens = Tokens(num_tokens=4096, seq_len=64, ids_T=ids_T)
    x_TD = torch.zeros(4096, D)

    def ids(**options):
        return made(HashRouter, num_experts=12, top_k=3, **options)(x_TD, None, tokens).topk_ids_TK

    plain = ids()
    assert torch.equal(plain[:1024], plain[1024:2048])
    assert all(len(set(row)) == 3 for row in plain[:1024].tolist())
    for other in (ids(layer=1), ids(seed=1)):
        assert (other == plain).float().mean() < 0.2
    load_E = tokens_per_expert(plain[:1024], 12)
    assert load_E.min() > 0.75 * load_E.float().mean()
    with pytest.raises(ValueError, match="HashRouter routes by token id"):
        made(HashRouter)(x_TD, None, Tokens(num_tokens=4096, seq_len=64))


def test_the_hash_is_lowbias32() -> None:
    """Its published test: 32-bit arithmetic, here with numpy's."""
    x = torch.tensor([0, 1, 2, 0xFFFFFFFF, 123456789])
    n = x.numpy().astype(np.uint32)
    n = (n ^ (n >> 16)) * np.uint32(0x7FEB352D)
    n = (n ^ (n >> 15)) * np.uint32(0x846CA68B)
    expected = (n ^ (n >> 16)).astype(np.int64).tolist()
    assert mixed(x).tolist() == expected
    assert [mixed_int(int(value)) for value in x] == expected


def test_a_token_stays_within_its_groups():
    options = {"num_groups": 4, "top_groups": 2, "group_score_top": 1}
    ids_TK = route(made(GroupLimitedRouter, num_experts=16, top_k=5, **options), X_TD).topk_ids_TK
    assert {len({e // 4 for e in row}) for row in ids_TK.tolist()} == {2}
    free = route(made(TopKRouter, num_experts=16, top_k=5), X_TD).topk_ids_TK
    assert max(len({e // 4 for e in row}) for row in free.tolist()) > 2


def test_one_group_is_no_limit():
    one = made(GroupLimitedRouter, num_groups=1, top_groups=1, group_score_top=1)
    assert torch.equal(route(one, X_TD).topk_ids_TK, route(made(TopKRouter), X_TD).topk_ids_TK)


def test_experts_that_choose_have_equal_loads_in_each_sequence():
    router = made(ExpertChoiceRouter)
    result = router(X_TD, None, Tokens(num_tokens=T, seq_len=16))
    for ids_SE in result.topk_ids_TK.view(4, 16, E):
        assert tokens_per_expert(ids_SE, E).tolist() == [16 * K // E] * E
    assert len(set((result.topk_ids_TK >= 0).sum(1).tolist())) > 1


def test_a_sequence_is_routed_and_blended_for_itself():
    for cls in (ExpertChoiceRouter, SoftRouter):
        router = made(cls)
        both = router(X_TD, None, Tokens(num_tokens=T, seq_len=T // 2))
        half = router(X_TD[: T // 2], None, Tokens(num_tokens=T // 2, seq_len=T // 2))
        rows = len(half.topk_ids_TK)
        assert torch.equal(both.topk_ids_TK[:rows], half.topk_ids_TK)
        torch.testing.assert_close(both.probs_TE[: T // 2], half.probs_TE)
        if half.blend is not None:
            slots = [r.blend.slots(x) for r, x in ((both, X_TD), (half, X_TD[: T // 2]))]
            torch.testing.assert_close(slots[0][:rows], slots[1])


def test_a_pre_gated_layer_routes_as_the_layer_before_said():
    first, second = (made(PreGatedRouter, layer=layer, num_layers=2) for layer in (0, 1))
    assert [n for n, _ in second.named_parameters()] == []
    ahead = route(first, X_TD)
    torch.testing.assert_close(ahead.state, X_TD @ first.next_weight.t())
    later = route(second, torch.randn_like(X_TD), ahead.state)
    assert torch.equal(later.topk_ids_TK, ahead.state.softmax(-1).topk(K)[1])
    (grad,) = torch.autograd.grad(later.topk_weights_TK[:, 0].sum(), first.next_weight)
    assert grad.any()


def test_round_robin_is_even():
    ids_TK = route(made(RoundRobinRouter, num_experts=6, top_k=4), X_TD[:3]).topk_ids_TK
    assert tokens_per_expert(ids_TK, 6).tolist() == [2] * 6


def test_zipf_is_as_skewed_as_its_exponent_says():
    x_TD = torch.randn(40_000, D, generator=torch.Generator().manual_seed(2))
    for exponent in (0.0, 1.2):
        router = made(ZipfRouter, top_k=1, exponent=exponent)
        load_E = tokens_per_expert(route(router, x_TD).topk_ids_TK, E) / len(x_TD)
        wanted = torch.arange(1, E + 1).float() ** -exponent
        torch.testing.assert_close(load_E, wanted / wanted.sum(), rtol=0.08, atol=0)
    ids_TK = route(made(ZipfRouter, top_k=3), X_TD).topk_ids_TK
    assert all(len(set(row)) == 3 for row in ids_TK.tolist())


def recorded(folder: Path, loads_SME: list) -> str:
    lines = [{"kind": "start"}]
    lines += [
        {"kind": "train", "step": s, "expert_load": load} for s, load in enumerate(loads_SME, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recorded_loads.cache_clear()
    return str(folder)


def test_replay_has_the_recorded_loads_step_by_step(tmp_path):
    loads_SME = [[[600, 100, 200, 300], [300] * 4], [[0, 600, 0, 600], [1, 2, 3, 1194 // 2]]]
    run = recorded(tmp_path, loads_SME)
    router = made(LoadReplayRouter, num_experts=4, run=run, layer=0, num_layers=2)
    x_TD = torch.randn(6000, D, generator=torch.Generator().manual_seed(0))
    step = StepLoad(load_ME=torch.zeros(2, 4), layer=0, num_tokens=6000)
    for loads_E in (loads_SME[0][0], loads_SME[1][0], loads_SME[0][0]):
        ids_TK = route(router, x_TD).topk_ids_TK
        assert all(len(set(row)) == K for row in ids_TK[:200].tolist())
        found = tokens_per_expert(ids_TK, 4) / (6000 * K)
        wanted = torch.tensor(loads_E) / sum(loads_E)
        torch.testing.assert_close(found, wanted.float(), rtol=0, atol=5e-4)
        router.end_step(step)
    other = made(LoadReplayRouter, num_experts=4, run=run, layer=1, num_layers=2)
    found = tokens_per_expert(route(other, x_TD).topk_ids_TK, 4)
    assert found.max() - found.min() <= 4


def test_replay_of_a_pyramid_has_each_layers_own_experts(tmp_path):
    run = recorded(tmp_path, [[[100] * 4, [300, 100] * 4]])
    router = made(LoadReplayRouter, num_experts=8, run=run, layer=1, num_layers=2)
    x_TD = torch.randn(6000, D, generator=torch.Generator().manual_seed(0))
    found = tokens_per_expert(route(router, x_TD).topk_ids_TK, 8) / (6000 * K)
    assert found.tolist() == pytest.approx([3 / 16, 1 / 16] * 4, abs=5e-4)
    with pytest.raises(ValueError, match="layer 1 of 8 experts, this model 2, layer 1 of 4"):
        made(LoadReplayRouter, num_experts=4, run=run, layer=1, num_layers=2)


def test_replay_names_what_does_not_fit(tmp_path):
    run = recorded(tmp_path, [[[1, 2, 3, 4]]])
    with pytest.raises(
        ValueError, match="has 1 MoE layers, layer 0 of 4 experts, this model 2, layer 0 of 8"
    ):
        made(LoadReplayRouter, run=run, num_layers=2)
    with pytest.raises(ValueError, match="must be a run folder"):
        made(LoadReplayRouter, run=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="no step with MoE layers"):
        made(LoadReplayRouter, run=recorded(tmp_path, []))


def test_sampling_gives_no_token_an_expert_twice_however_uneven():
    ids_TK = sampled(torch.tensor([500, 500, 1, 0]), 500, 2)
    assert all(len(set(row)) == 2 for row in ids_TK.tolist())
    assert 3 not in ids_TK


WRONG = [
    (TopKRouter, {"scaling_factor": 0.0}, "scaling_factor=0.0 must be above 0"),
    (SwitchRouter, {"top_k": 2}, "needs model.moe.top_k=1, not 2"),
    (SwitchRouter, {"top_k": 1, "jitter": 1.0}, "jitter=1.0 must be at least 0 and below 1"),
    (GroupLimitedRouter, {"num_groups": 3, "top_groups": 1}, "must divide model.moe.num_experts=8"),
    (GroupLimitedRouter, {"num_groups": 4, "top_groups": 5}, "must be in 1..num_groups=4"),
    (
        GroupLimitedRouter,
        {"num_groups": 8, "top_groups": 1, "group_score_top": 1},
        "fewer than model.moe.top_k=2",
    ),
    (
        GroupLimitedRouter,
        {"num_groups": 8, "top_groups": 2},
        "group_score_top=2 must be in 1..1",
    ),
    (CosineRouter, {"projected_width": 9}, "must be in 1..model.d_model=8"),
    (CosineRouter, {"temperature": 0.0}, "temperature=0.0 must be above 0"),
    (SoftRouter, {"slots_per_expert": 0}, "slots_per_expert=0 must be at least 1"),
    (ZipfRouter, {"exponent": -1.0}, "exponent=-1.0 must be at least 0"),
]


@pytest.mark.parametrize(("cls", "options", "rule"), WRONG)
def test_wrong_options_are_refused(cls, options, rule):
    with pytest.raises(ValueError, match=rule):
        made(cls, **options)
