"""How near the output with a codec is: measured beside the plain one, which the model goes on with."""

import torch

from moesys.moe.fidelity import Fidelity
from moesys.moe.listening import Listening
from tests.moe.test_lsh import D, T, as_in_paper, make_layer, tokens


def test_the_error_is_that_of_the_coded_output_and_nothing_else_changes() -> None:
    codec = as_in_paper(d_model=D, hashes=1)
    layer, plain = make_layer(codec).eval(), make_layer(None).eval()
    coded = make_layer(codec).train()
    x_TD, heard = tokens("random").detach(), []
    listening = Listening({2: layer}, lambda at, *_: heard.append(at))
    fidelity = Fidelity({2: layer, 0: plain}, 3, torch.device("cpu"))
    with listening, fidelity:
        y_TD, _, _ = layer(x_TD, seq_len=T)
        plain(x_TD, seq_len=T)
    expected_TD = plain(x_TD, seq_len=T)[0]
    assert torch.equal(y_TD, expected_TD), "the model goes on with the plain one"
    difference_TD = coded(x_TD, seq_len=T)[0] - expected_TD
    sums = [x.double().square().sum() for x in (difference_TD, expected_TD)]
    torch.testing.assert_close(fidelity.squares_M2[2], torch.stack(sums).detach())
    assert fidelity.squares_M2[2, 0] > 0
    assert fidelity.squares_M2[:2].eq(0).all(), "of layers that compress"
    assert heard == [2], "routed once"
    assert layer.coded_rows == 0, "an evaluation is no training"
    assert torch.equal(layer(x_TD, seq_len=T)[0], expected_TD)
