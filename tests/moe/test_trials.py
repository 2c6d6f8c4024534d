"""Every candidate of a layer is tried on the same tokens, and the model goes on as if none had been."""

import torch

from moesys.moe.compression import Compression
from moesys.moe.trials import Trials
from moesys.testing.ranks import run_ranks
from tests.moe.test_lsh import D, T, as_in_paper, make_layer, tokens

NEAR, FAR = as_in_paper(d_model=D, hashes=3), as_in_paper(d_model=D, hashes=1)


def _try(rank: int, size: int) -> dict:
    layer = make_layer(None).eval()
    layer.candidates = {"near": Compression(codec=NEAR), "far": Compression(codec=FAR)}
    x_TD = tokens("random").detach()
    expected_TD = layer(x_TD, seq_len=T)[0]
    trials = Trials({1: layer}, num_layers=2, num_candidates=2)
    with trials:
        y_TD = layer(x_TD, seq_len=T)[0]
    found = trials.of_all_ranks(torch.device("cpu"))
    after_TD = layer(x_TD, seq_len=T)[0]
    return {
        "is_plain": torch.equal(y_TD, expected_TD) and torch.equal(after_TD, expected_TD),
        "load": layer.load.take(torch.device("cpu")).sum().item(),
        "rows": layer.coded_rows,
        "trials": [[tuple(trial) for trial in of_layer] for of_layer in found],
    }


def test_errors_are_those_of_the_coded_outputs_and_nothing_else_changes() -> None:
    first, second = run_ranks(_try, 2)
    assert first["trials"] == second["trials"], "all ranks know the same"
    assert first["is_plain"]
    assert first["rows"] == first["load"] == 0, "an evaluation is no training"
    x_TD = tokens("random").detach()
    plain_TD = make_layer(None).eval()(x_TD, seq_len=T)[0]
    not_here, here = first["trials"]
    assert {error for error, _, _ in not_here} == {0.0}
    for codec, (error, sent_bytes, ms) in zip([None, NEAR, FAR], here, strict=True):
        coded_TD = make_layer(codec).train()(x_TD, seq_len=T)[0]
        expected = (coded_TD - plain_TD).norm() / plain_TD.norm()
        torch.testing.assert_close(torch.tensor(error), expected.detach())
        assert sent_bytes == 0, "all experts are here"
        assert ms > 0
    errors = [error for error, _, _ in here]
    assert errors[0] == 0.0 < errors[1] < errors[2]
