"""One compiled graph serves every block, whatever its documents are."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from moesys.models.init import initialize
from moesys.models.transformer import Transformer
from moesys.parallelize.compile import compile_blocks
from moesys.parallelize.expert_backend import set_expert_backend
from moesys.testing.layouts import BASE


@pytest.mark.parity
def test_all_blocks_share_one_graph():
    config = replace(BASE.model, num_layers=12, num_dense_layers=2)
    plain, compiled = Transformer(config), Transformer(config)
    for model in (plain, compiled):
        initialize(model, config, 1)
        set_expert_backend(model, "loop")
    compile_blocks(compiled)
    torch._dynamo.reset()
    counters.clear()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        ids_BS = torch.randint(0, config.vocab_size, (2, 8), generator=generator)
        documents_BS = torch.randint(0, 4, (2, 8), generator=generator).sort(1)[0]
        for model in (plain, compiled):
            model(ids_BS, documents=documents_BS)[0].square().mean().backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
