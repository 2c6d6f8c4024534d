"""Our zero=1 against megatron-core 0.16.1's distributed optimizer, its CUDA calls answered by the CPU: 5 steps of AdamW.

Same gradient norms, same weights, with dense parameters sharded over all 4 ranks and experts over those that ep leaves.
Megatron averages over data ranks where we sum and divide by the global token count, and scales the experts' gradients
by 1 / dp for it: the same numbers. Its sequence-parallel and tensor-parallel reductions are of its own layers, so tp is
not compared here.
"""

from importlib.util import find_spec

import pytest

from moesys.testing.ranks import run_ranks
from tests.oracles.megatron_optimizer import CONFIG, STEPS, run_both

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed"),
]

EPS = [1, 2, 4]


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(run_both, 4, EPS)


@pytest.mark.parametrize("ep", EPS)
def test_gradient_norms_are_megatrons(ranks, ep):
    for outcomes in ranks:
        ours, theirs = outcomes[ep]
        assert len(ours.grad_norms) == STEPS
        assert ours.grad_norms == pytest.approx(theirs.grad_norms, rel=1e-5)
        assert min(ours.grad_norms) > CONFIG.optim.clip_grad_norm


@pytest.mark.parametrize("ep", EPS)
def test_weights_are_megatrons(ranks, ep):
    for outcomes in ranks:
        ours, theirs = outcomes[ep]
        assert ours.weights.keys() == theirs.weights.keys()
        for name, weight in theirs.weights.items():
            assert (ours.weights[name] - weight).abs().max() < 1e-6, name
