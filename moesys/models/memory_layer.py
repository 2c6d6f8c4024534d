"""A memory layer: each token reads K of N * N learned values, found through product keys, and adds them up
(UltraMem, 2411.12364; UltraMemV2, 2508.18756).

    q_a = norm(W_q x)_a,   S_a = norm(keys_a) q_a / sqrt(C),   a = rows, columns          R scores of each of N keys
    score of value (i, j) in head h:   s_h = S_rows[:, i]^T core_h S_columns[:, j]        Tucker, several cores
    y = W_down sum_k  s_hk gelu(pre_k . W_pre x)  values_hk                               PEER's pre-values (2407.04153)

Candidates are the K best rows and the K best columns under the best approximation of sum_h core_h of rank one; the K best
pairs of these are chosen by their exact scores, summed over heads. A head weighs its own slice of a value.

Left out of the papers: the loss on the core's further singular values, and virtual values (implicit value expansion),
which the second paper has given up.

Shapes: T tokens on this rank, U tokens of all ranks that share out the table, D model, K values of a token, N keys of an
axis, C key, R rank of the core, H heads, P pre-value, V value, w columns on this rank.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesys.config.schema import MemoryLayersConfig, ModelConfig
from moesys.models.norm import RMSNorm
from moesys.ops.autocast import compute_type
from moesys.ops.shard import local_tensor
from moesys.plan.batch.local import LocalPieces

_SQUARINGS = 6
"""The leading singular pair is what 2^6 steps of power iteration give."""


class Columns(Protocol):
    """How tokens move between the ranks that share out the columns of a table, each of as many; differentiable."""

    def num_rows(self, own: int, pieces: LocalPieces | None, /) -> int:
        """To which each rank fills up its own tokens, of these pieces of sequences; None = all have as many."""
        ...

    def all_tokens(self, x: Tensor, /) -> Tensor:
        """[U, ...] from each rank's [T, ...]."""
        ...

    def own_tokens(self, partial: Tensor, /) -> Tensor:
        """[T, ...] of the sum of the ranks' [U, ...]."""
        ...

    def to_columns(self, x_TW: Tensor, /) -> Tensor:
        """[T, ..., W] of this rank's tokens to [U, ..., w] of all tokens."""
        ...

    def from_columns(self, x_Uw: Tensor, /) -> Tensor:
        """The inverse."""
        ...


class AllColumns:
    """One rank has them all, and only its own tokens to serve."""

    def num_rows(self, own: int, pieces: LocalPieces | None) -> int:
        return own

    def _same(self, x: Tensor) -> Tensor:
        return x

    all_tokens = own_tokens = to_columns = from_columns = _same


class MemoryLayer(nn.Module):
    """From x [T, D] to what the token's values give, [T, D]. Queries, scores and sums are fp32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        memory, d_model = config.memory_layers, config.d_model
        self.top_k, self.num_keys = memory.top_k, memory.num_keys
        self.query = nn.Parameter(torch.empty(2 * memory.d_key, d_model))
        self.query_norm = RMSNorm(memory.d_key, config.norm_eps)
        self.keys = nn.Parameter(torch.empty(2, memory.rank, memory.num_keys, memory.d_key))
        self.core = nn.Parameter(torch.empty(memory.heads, memory.rank, memory.rank))
        self.pre = nn.Parameter(torch.empty(memory.d_pre, d_model)) if memory.d_pre else None
        self.table = MemoryTable(memory)
        self.down = nn.Parameter(torch.empty(d_model, memory.d_value))

    def forward(self, x_TD: Tensor, pieces: LocalPieces | None = None) -> Tensor:
        """[T, D] in the compute type. `pieces`: of sequences, of which ranks have different numbers of tokens."""
        with torch.autocast(x_TD.device.type, enabled=False):
            row_TRN, column_TRN = self.key_scores(x_TD.float())
            with torch.no_grad():
                ids_TK = self.choose(row_TRN, column_TRN)
            scores_TKH = self.value_scores(row_TRN, column_TRN, ids_TK)
        x_TD = compute_type(x_TD)
        asked_TP = None if self.pre is None else F.linear(x_TD, compute_type(self.pre))
        y_TV = self.table(ids_TK, scores_TKH, asked_TP, pieces)
        return F.linear(y_TV, compute_type(self.down))

    def key_scores(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """[T, R, N] of the rows and of the columns."""
        query_T2C = F.linear(x_TD, self.query).unflatten(-1, (2, -1))
        query_T2C = self.query_norm(query_T2C) / query_T2C.shape[-1] ** 0.5
        keys_2RNC = F.rms_norm(self.keys, self.keys.shape[-1:])
        row_TRN, column_TRN = torch.einsum("tac,arnc->atrn", query_T2C, keys_2RNC)
        return row_TRN, column_TRN

    def choose(self, row_TRN: Tensor, column_TRN: Tensor) -> Tensor:
        """int32 [T, K]: the values, row * N + column. No host sync."""
        core_RR = self.core.sum(0)
        left_R, right_R = leading_pair(core_RR)
        near_row_TK = torch.einsum("r,trn->tn", left_R, row_TRN).topk(self.top_k)[1]
        near_column_TK = torch.einsum("r,trn->tn", right_R, column_TRN).topk(self.top_k)[1]
        left_TRK = torch.einsum("rs,trk->tsk", core_RR, _of_keys(row_TRN, near_row_TK))
        right_TRK = _of_keys(column_TRN, near_column_TK)
        pairs_TKK = torch.einsum("tsk,tsl->tkl", left_TRK, right_TRK)
        best_TK = pairs_TKK.flatten(1).topk(self.top_k)[1]
        rows_TK = near_row_TK.gather(1, best_TK // self.top_k)
        columns_TK = near_column_TK.gather(1, best_TK % self.top_k)
        return (rows_TK * self.num_keys + columns_TK).int()

    def value_scores(self, row_TRN: Tensor, column_TRN: Tensor, ids_TK: Tensor) -> Tensor:
        """[T, K, H], exact."""
        ids_TK = ids_TK.long()
        row_TRK = _of_keys(row_TRN, ids_TK // self.num_keys)
        column_TRK = _of_keys(column_TRN, ids_TK % self.num_keys)
        return torch.einsum("trk,hrs,tsk->tkh", row_TRK, self.core, column_TRK)


class MemoryTable(nn.Module):
    """N * N values of H slices, and as many pre-values. Ranks may share out the columns of both."""

    def __init__(self, memory: MemoryLayersConfig) -> None:
        super().__init__()
        num_values, d_slice = memory.num_keys**2, memory.d_value // memory.heads
        self.values = nn.Parameter(torch.empty(memory.heads, num_values, d_slice))
        self.pre_values = (
            nn.Parameter(torch.empty(num_values, memory.d_pre)) if memory.d_pre else None
        )
        self.columns: Columns = AllColumns()
        """`parallelize` swaps it where ranks share out the columns."""

    def forward(
        self,
        ids_TK: Tensor,
        scores_TKH: Tensor,
        asked_TP: Tensor | None,
        pieces: LocalPieces | None = None,
    ) -> Tensor:
        """y [T, V] in the compute type, before W_down; `asked_TP` is W_pre x."""
        columns, num_tokens = self.columns, len(ids_TK)
        # Rows that fill up read value 0 with score 0.
        missing = columns.num_rows(num_tokens, pieces) - num_tokens
        ids_TK, scores_TKH = _with_rows(ids_TK, missing), _with_rows(scores_TKH, missing)
        asked_TP = None if asked_TP is None else _with_rows(asked_TP, missing)
        ids_UK = columns.all_tokens(ids_TK)
        if asked_TP is not None:
            assert self.pre_values is not None, "what is asked for is there"
            asked_Uw = columns.to_columns(asked_TP).float()
            with torch.autocast(asked_Uw.device.type, enabled=False):
                gate_UK = _dots(ids_UK, local_tensor(self.pre_values), asked_Uw)
            scores_TKH = scores_TKH * F.gelu(columns.own_tokens(gate_UK))[..., None]
        scores_UKH = columns.all_tokens(scores_TKH)
        y_UHw = compute_type(_sums(ids_UK, scores_UKH, local_tensor(self.values)))
        return columns.from_columns(y_UHw).flatten(1)[:num_tokens]


def leading_pair(core_RR: Tensor) -> tuple[Tensor, Tensor]:
    """The left and right singular vectors [R] of the largest singular value, mostly positive. No host sync."""
    gram_RR = core_RR.T @ core_RR
    for _ in range(_SQUARINGS):
        gram_RR = F.normalize(gram_RR.flatten(), dim=0).view_as(gram_RR)
        gram_RR = gram_RR @ gram_RR
    # Of a matrix of rank one any column will do that is not 0.
    largest = gram_RR.diagonal().argmax().view(1)
    right_R = F.normalize(gram_RR.index_select(1, largest)[:, 0], dim=0)
    right_R = torch.where(right_R.sum() < 0, -right_R, right_R)
    return F.normalize(core_RR @ right_R, dim=0), right_R


def _with_rows(x: Tensor, number: int) -> Tensor:
    """So many of zeros more along the first dim."""
    return torch.cat([x, x.new_zeros(number, *x.shape[1:])]) if number else x


def _of_keys(scores_TRN: Tensor, keys_TK: Tensor) -> Tensor:
    """[T, R, K]."""
    return _Gather.apply(scores_TRN, keys_TK[:, None].expand(-1, scores_TRN.shape[1], -1))


class _Gather(torch.autograd.Function):
    """torch's along the last dim, but for its keeping all scores for their shape."""

    @staticmethod
    def forward(ctx, scores: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = scores.shape
        return scores.gather(-1, index)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).scatter_add_(-1, index, grad), None


def _dots(ids_UK: Tensor, pre_values_Nw: Tensor, asked_Uw: Tensor) -> Tensor:
    """[U, K]: of each token's rows with what it asks."""
    return (F.embedding(ids_UK, pre_values_Nw) @ asked_Uw[..., None])[..., 0]


def _sums(ids_UK: Tensor, scores_UKH: Tensor, values_HNw: Tensor) -> Tensor:
    """[U, H, w]: of each token's rows, weighed by each head, without a copy of them."""
    slices = zip(scores_UKH.unbind(-1), values_HNw.unbind(0), strict=True)
    return torch.stack(
        [
            F.embedding_bag(
                ids_UK, values_Nw, mode="sum", per_sample_weights=scores_UK.contiguous()
            )
            for scores_UK, values_Nw in slices
        ],
        dim=1,
    )
