"""Ulysses sequence parallelism: the ranks of a group share a packed row.

Outside attention a rank has a slice of the positions and all heads. Inside attention it has all positions and
a share of the heads, so that document boundaries need no special treatment. One all-to-all precedes attention
and one follows it, in the dtype of the activations; the backward of each is an all-to-all again
(DeepSpeed-Ulysses, arXiv:2309.14509). The views of the row's images are divided among the ranks too, and each
rank sends the image tokens that it computed to the ranks whose slices hold them.

In: a process group. Out: `SequenceGroup`, which the mesh holds and the model uses. Gradients of weights need
nothing here: each rank has those of its slice, and ZeRO-3 adds them up over the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share a row. group: their process group. rank, size: of this process in `group`."""

    group: Any
    rank: int
    size: int

    def part(self, length: int) -> slice:
        """This rank's positions in a row of `length` positions, a multiple of `size`."""
        each = length // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def share(self, total: int) -> list[int]:
        """The bounds [size + 1] of the ranks' parts of `total` views, as equal as possible."""
        return [total * rank // self.size for rank in range(self.size + 1)]

    def to_heads(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Slices with all heads -> whole rows with a share of the heads, in one exchange.

        [T / size, heads, d] -> [T, heads / size, d], for each of the three.
        The number of key-value heads may differ from that of the queries; `size` must divide both.
        """
        parts = [x.unflatten(1, (self.size, -1)).transpose(0, 1) for x in (query, key, value)]
        heads = [part.shape[2] for part in parts]
        sent = torch.cat(parts, dim=2)  # [size, T / size, heads / size, d], copied once
        whole = self._exchange_even(sent).flatten(0, 1)
        q, k, v = whole.split(heads, dim=1)
        return q, k, v

    def to_positions(self, attended: torch.Tensor) -> torch.Tensor:
        """[T, heads / size, d] -> [T / size, heads, d]: the inverse of `to_heads`."""
        received = self._exchange_even(attended.unflatten(0, (self.size, -1)))
        return received.transpose(0, 1).flatten(1, 2)

    def send_tokens(
        self, made: torch.Tensor, wanted: Sequence[torch.Tensor], starts: Sequence[int]
    ) -> torch.Tensor:
        """Sends entries of a table that is divided among the ranks to the ranks that need them.

        made: this rank's entries of the table, [starts[rank + 1] - starts[rank], H]. wanted: for each rank
        int64 [n] on the CPU, the entries that it needs, in its order; negative for none. Out: [n, H], zero
        where `wanted` is negative. All ranks have the same `wanted` and `starts`, so only entries are sent.
        """
        bounds = torch.tensor(list(starts[1:-1]), dtype=torch.int64)
        owners = [torch.bucketize(rows, bounds, right=True).where(rows >= 0, -1) for rows in wanted]
        sent = [rows[owner == self.rank] for rows, owner in zip(wanted, owners, strict=True)]
        places = [(owners[self.rank] == source).nonzero()[:, 0] for source in range(self.size)]
        chosen = made.index_select(0, (torch.cat(sent) - starts[self.rank]).to(made.device))
        received: torch.Tensor = _AllToAll.apply(
            chosen, self.group, [len(each) for each in sent], [len(each) for each in places]
        )
        out = made.new_zeros(len(wanted[self.rank]), made.shape[1])
        return out.index_put((torch.cat(places).to(made.device),), received)

    def _exchange_even(self, x: torch.Tensor) -> torch.Tensor:
        """Sends part r of x [size, ...] to rank r. Out: [size, ...], of which part r is from rank r."""
        ones = [1] * self.size
        exchanged: torch.Tensor = _AllToAll.apply(x, self.group, ones, ones)
        return exchanged


class _AllToAll(torch.autograd.Function):
    """Exchanges entries along the first dimension: sent[r] go to rank r, and received[r] come from it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any, sent: list[int], received: list[int]) -> torch.Tensor:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        return _all_to_all(x, group, sent=sent, received=received)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        back = _all_to_all(grads[0], ctx.group, sent=ctx.received, received=ctx.sent)
        return back, None, None, None


def _all_to_all(x: torch.Tensor, group: Any, *, sent: list[int], received: list[int]) -> torch.Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out
