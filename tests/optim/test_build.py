"""AdamW as configured: what decays, and its state under canonical names."""

import pytest
import torch

from moesys.config.schema import OptimConfig
from moesys.optim.build import build_optimizer, optimizer_tensors, set_learning_rate
from moesys.parallelize.build import build_model
from tests.plan.test_costs import MODEL

CONFIG = OptimConfig(lr=0.01, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.5)


def make():
    model = build_model(MODEL, None, torch.device("cpu"), 0)
    return model, build_optimizer(model, CONFIG)


def test_one_update_is_adamw_by_its_formula_and_vectors_do_not_decay():
    model, optimizer = make()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.3)
    set_learning_rate(optimizer, 0.02)
    optimizer.step()
    for name, p in model.named_parameters():
        decay = 0.5 if p.ndim > 1 else 0.0
        # At the first step the bias-corrected moments are the gradient and its square.
        expected = before[name] * (1 - 0.02 * decay) - 0.02 * 0.3 / (0.3 + 1e-6)
        torch.testing.assert_close(p.detach(), expected, msg=name)


def test_state_made_before_the_first_step_is_the_state_that_the_step_uses():
    model, optimizer = make()
    tensors = optimizer_tensors(model, optimizer)
    assert len(tensors) == 3 * len(list(model.parameters()))
    assert all(not t.any() for t in tensors.values())
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.3)
    optimizer.step()
    assert tensors["optim.norm.weight.step"].item() == 1
    expected = torch.full_like(model.norm.weight, 0.2 * 0.3)
    torch.testing.assert_close(tensors["optim.norm.weight.exp_avg"], expected)
    fresh, other = make()
    for p in fresh.parameters():
        p.grad = torch.full_like(p, 0.3)
    other.step()
    for (name, a), b in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_learning_rate_reaches_every_group():
    _, optimizer = make()
    set_learning_rate(optimizer, 0.123)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(
        [0.123] * len(optimizer.param_groups)
    )
