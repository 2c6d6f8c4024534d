"""Our import of a tiny Mixtral against DeepSpeed 0.19.8's AutoEP of the same checkpoint: AdamW over 5 steps.

Same loss, gradient norm and slots per expert at every step. DeepSpeed's conventions:
- its optimizer decays norms too, so weight decay is 0 here;
- with tp every rank routes all tokens and counts all slots, and a folded layer needs tensor_parallel.preset_model:
  transformers' own tp_plan of Mixtral is refused;
- with tp its ZeRO counts only parameters marked as model parallel, or those of tp rank 0, in the gradient norm, and
  marks no experts: the norm it reports, and clips by, leaves out the experts of the other tp ranks (seen: 4.42 for
  4.59). So tp is compared without ZeRO and clipping, on the norm of the gradients that it leaves for the optimizer.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest

from moesys.testing.ranks import run_ranks
from tests.oracles.deepspeed_mixtral import STEPS, Case, run_both

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed"),
    pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed"),
]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random one, in a folder."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=None,
        initializer_range=0.15,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("mixtral")
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("size", "case"),
    [
        (2, Case(tp=1, ep=2, clip=1.0)),
        (2, Case(tp=2, ep=2, clip=0.0)),
        (4, Case(tp=2, ep=4, clip=0.0)),
    ],
    ids=["ep2", "tp2 ep2", "dp2 tp2 ep4"],
)
def test_steps_are_those_of_autoep(mixtral: Path, size: int, case: Case) -> None:
    for ours, theirs in run_ranks(run_both, size, mixtral, case):
        assert len(ours) == len(theirs) == STEPS
        for our, their in zip(ours, theirs, strict=True):
            assert our.loss == pytest.approx(their.loss, rel=1e-5)
            assert our.grad_norm == pytest.approx(their.grad_norm, rel=1e-5)
            assert our.load_ME == their.load_ME
        assert ours[-1].loss < 0.95 * ours[0].loss
        assert not case.clip or all(step.grad_norm > case.clip for step in ours)
