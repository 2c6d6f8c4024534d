"""Our MoE layer against megatron-core 0.16.1's MoELayer on 4 ranks, its CUDA calls answered by the CPU.

Same weights, same tokens: same output, input gradient, gradients of router, experts and shared experts, balance and
z-losses, slots per expert, and selection biases over several steps.

Megatron's conventions, mapped in `megatron_layer`:
- x is [S, B, D]; with tp the ranks share out the positions of each sample, ours the samples' tokens in one run;
- `aux_loss` (our level micro), `seq_aux_loss` (sequence) and `z_loss` are divided by tp, `global_aux_loss` by all
  ranks: a rank's loss is its share of a sum, ours a mean over its tokens. With its own averaging of gradients over dp,
  the coefficient of global_aux_loss is therefore dp times weaker than the same coefficient of aux_loss;
- with a selection bias, f_i of the losses is counted on the top-k without the bias (eq. 18 of DeepSeek-V3), in both;
- expert_tensor_parallel_size > 1 fails on gloo, and without sequence parallelism tp with MoE is refused, so neither
  is compared here.
"""

from importlib.util import find_spec

import pytest
import torch

from moesys.testing.ranks import run_ranks
from tests.oracles.megatron_layer import BIAS_RATE, Case, E, Outcome, run_cases

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed"),
]

SIGMOID = {"score_function": "sigmoid", "scaling_factor": 2.5}
SAME = {
    "dp4": Case(level="micro"),
    "ep2": Case(ep=2, level="micro"),
    "ep4": Case(ep=4, level="micro"),
    "tp2 ep2": Case(tp=2, ep=2, level="micro"),
    "tp2 ep4": Case(tp=2, ep=4, level="micro"),
    "tp4 ep2": Case(tp=4, ep=2, level="micro"),
    "sequence": Case(ep=2, level="sequence"),
    "sequence tp4": Case(tp=4, ep=4, level="sequence"),
    "global": Case(ep=4, level="global", steps=3),
    "global tp2": Case(tp=2, ep=2, level="global", steps=3),
    "shared": Case(ep=2, level="micro", num_shared_experts=2),
    "shared tp2": Case(tp=2, ep=4, level="micro", num_shared_experts=2),
    "not normalised": Case(ep=2, level="micro", normalize_weights=False),
    "sigmoid": Case(ep=2, level="micro", **SIGMOID),
    "sigmoid sequence tp4": Case(tp=4, ep=2, level="sequence", **SIGMOID),
    "bias": Case(ep=4, moves_bias=True, steps=6, **SIGMOID),
    "bias tp2": Case(tp=2, ep=2, moves_bias=True, steps=6, **SIGMOID),
    "capacity": Case(ep=2, level="micro", capacity_factor=0.75),
}
BIASED = Case(ep=2, level="micro", start_bias=9.0, moves_bias=True, **SIGMOID)
UNBIASED = Case(ep=2, level="micro", **SIGMOID)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[Outcome, Outcome]]:
    """Of rank 0: all results are whole."""
    return run_ranks(run_cases, 4, SAME | {"biased": BIASED, "unbiased": UNBIASED})[0]


@pytest.mark.parametrize("name", SAME)
def test_the_layer_is_megatrons(outcomes, name):
    ours, theirs = outcomes[name]
    assert_close(ours.y_ND, theirs.y_ND)
    assert_close(ours.dx_ND, theirs.dx_ND)
    assert ours.gradients.keys() == theirs.gradients.keys()
    for parameter, gradient in theirs.gradients.items():
        assert gradient.abs().max() > 0.1, parameter
        assert_close(ours.gradients[parameter], gradient)


@pytest.mark.parametrize("name", [name for name, case in SAME.items() if case.level])
def test_the_losses_are_megatrons(outcomes, name):
    ours, theirs = outcomes[name]
    assert ours.balance == pytest.approx(theirs.balance, rel=1e-6)
    assert ours.z == pytest.approx(theirs.z, rel=1e-6)
    assert ours.balance > 1.01


@pytest.mark.parametrize("name", SAME)
def test_the_slots_per_expert_are_megatrons(outcomes, name):
    """Ours count what was routed and how much of it was dropped, theirs what is left."""
    ours, theirs = outcomes[name]
    assert len(ours.loads) == SAME[name].steps
    for (*routed_E, dropped), kept_E in zip(ours.loads, theirs.loads, strict=True):
        assert len(set(routed_E)) > 1
        assert sum(routed_E) - dropped == sum(kept_E)
        assert (dropped > 0) == (name == "capacity")
        assert dropped or routed_E == kept_E


@pytest.mark.parametrize("name", ["bias", "bias tp2"])
def test_the_selection_bias_moves_as_megatrons(outcomes, name):
    ours, theirs = outcomes[name]
    assert len(ours.biases) == SAME[name].steps
    for our_bias_E, their_bias_E in zip(ours.biases, theirs.biases, strict=True):
        assert torch.equal(our_bias_E, their_bias_E)
    assert len(set(ours.biases[-1].tolist())) > 2
    assert ours.biases[-1].abs().max() > 2 * BIAS_RATE


def test_a_bias_is_not_in_the_balance_loss(outcomes):
    """With every token on expert 0: output, load and loss as theirs, the loss that of the unbiased top-k."""
    ours, theirs = outcomes["biased"]
    unbiased, _ = outcomes["unbiased"]
    assert_close(ours.y_ND, theirs.y_ND)
    assert ours.loads[0][:E] == theirs.loads[0]
    assert theirs.balance == pytest.approx(unbiased.balance, rel=1e-6)
    assert ours.balance == pytest.approx(theirs.balance, rel=1e-6)
    assert ours.loads[0] != unbiased.loads[0]


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6 * theirs.abs().max().item())
