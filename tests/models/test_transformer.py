"""The decoder's parts against independent formulas."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from moesys.models.attention import Attention
from moesys.models.rope import apply_rope, rope_tables
from moesys.models.transformer import Transformer
from moesys.parallelize.build import build_model
from tests.plan.test_costs import MODEL


def test_rope_turns_pairs_by_position_over_theta():
    tables = rope_tables(torch.arange(7), 8, 100.0)
    x = torch.randn(1, 1, 7, 8)
    y = apply_rope(x, tables)
    for s in range(7):
        for i in range(4):
            turned = torch.view_as_complex(torch.stack([x[0, 0, s, i], x[0, 0, s, i + 4]])[None])
            turned = turned * torch.polar(torch.tensor(1.0), torch.tensor(s / 100.0 ** (2 * i / 8)))
            torch.testing.assert_close(y[0, 0, s, [i, i + 4]], torch.view_as_real(turned)[0])


def test_attention_equals_softmax_of_scores_with_repeated_heads():
    torch.manual_seed(0)
    attention = Attention(MODEL)
    x = torch.randn(2, 9, MODEL.d_model)
    tables = rope_tables(torch.arange(9), 8, MODEL.rope_theta)
    q, k, v = (
        w(x).unflatten(-1, (-1, 8)).transpose(1, 2)
        for w in (attention.wq, attention.wk, attention.wv)
    )
    q, k = apply_rope(q, tables), apply_rope(k, tables)
    k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2)) / 8**0.5
    scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf"))
    expected = attention.wo((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x.flatten(0, 1), tables), expected.flatten(0, 1))


def test_loss_sum_ignores_masked_targets_and_the_future():
    model = build_model(MODEL, None, torch.device("cpu"), seed=1)
    ids = torch.randint(0, 96, (2, 10), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1, 1)
    targets[:, 6:] = -100
    loss, _ = model.loss_sum(ids, targets)
    logp = model.logits(ids)[:, :6].log_softmax(-1)
    torch.testing.assert_close(loss, -logp.gather(-1, targets[:, :6, None]).sum())
    changed = ids.clone()
    changed[:, 6:] = 0
    torch.testing.assert_close(model.loss_sum(changed, targets)[0], loss)


def test_weights_depend_on_seed_and_name_alone():
    one, same, other = (build_model(MODEL, None, torch.device("cpu"), s) for s in (3, 3, 4))
    for (name, a), (_, b), (_, c) in zip(
        *(m.named_parameters() for m in (one, same, other)), strict=True
    ):
        assert torch.equal(a, b), name
        assert name.endswith("norm.weight") or not torch.equal(a, c), name
    with torch.no_grad():
        experts = one.layers["1"].moe.experts.gate_up
        assert abs(experts.std().item() / MODEL.init_std - 1) < 0.05
        down = one.layers["1"].moe.experts.down.std().item()
        assert abs(down / (MODEL.init_std / 6**0.5) - 1) < 0.05
        assert not torch.equal(experts[0], experts[1])


def test_tied_embeddings_are_one_parameter():
    model = build_model(replace(MODEL, tie_embeddings=True), None, torch.device("cpu"), 0)
    assert model.head.weight is model.embed.weight
    assert "head.weight" not in dict(model.named_parameters())


def test_an_untrained_model_predicts_like_chance():
    model = build_model(MODEL, None, torch.device("cpu"), 0)
    ids = torch.randint(0, 96, (4, 32))
    loss = F.cross_entropy(model.logits(ids).flatten(0, 1), ids.roll(-1, 1).flatten())
    assert abs(loss.item() - torch.tensor(96.0).log().item()) < 0.1
    assert isinstance(model, Transformer)
