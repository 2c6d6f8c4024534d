"""The all-to-all of rows: values, gradients and the exact bytes it counts."""

import pytest
import torch
import torch.distributed as dist

from moesys.parallel.exchange import FlatExchange
from moesys.testing.ranks import run_ranks

WIDTH = 3


def _splits(rank: int, size: int) -> list[int]:
    """Uneven, with zeros: rank r sends (r + 2p) % 3 rows to rank p."""
    return [(rank + 2 * peer) % 3 for peer in range(size)]


def _exchange(rank: int, size: int, dtype: torch.dtype):
    exchange = FlatExchange(dist.group.WORLD)
    send = _splits(rank, size)
    recv = [_splits(peer, size)[rank] for peer in range(size)]
    owner = torch.cat([torch.full((n,), 100 * rank + p) for p, n in enumerate(send)])
    rows = owner[:, None].expand(-1, WIDTH).to(dtype).clone().requires_grad_()
    received = exchange.rows(rows, send, recv)
    received.backward(received.detach() * 2)
    return received.detach(), rows.grad, rows.detach(), exchange.meter.read()[0]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_arrive_by_source_rank_and_gradients_return(size, dtype):
    for rank, (received, grad, rows, sent_bytes) in enumerate(run_ranks(_exchange, size, dtype)):
        expected = [
            100 * peer + rank for peer in range(size) for _ in range(_splits(peer, size)[rank])
        ]
        assert received[:, 0].tolist() == torch.tensor(expected, dtype=dtype).tolist()
        assert torch.equal(grad, rows * 2)
        away = sum(n for p, n in enumerate(_splits(rank, size)) if p != rank)
        back = sum(_splits(p, size)[rank] for p in range(size) if p != rank)
        assert sent_bytes == (away + back) * WIDTH * rows.element_size()


def _counts(rank: int, size: int):
    exchange = FlatExchange(dist.group.WORLD)
    return exchange.counts(torch.arange(size * 2).view(size, 2) + 100 * rank).tolist()


def test_counts_go_to_the_rank_they_are_meant_for():
    for rank, received in enumerate(run_ranks(_counts, 3)):
        assert received == [[100 * p + 2 * rank, 100 * p + 2 * rank + 1] for p in range(3)]
