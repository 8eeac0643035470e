"""The decoder's attention: causal within each document, and never from one document to another.

A `Layout` states once per forward which positions form which document; every layer uses it. A padded batch is
treated as documents too: the real tokens of each of its entries. On CUDA one variable-length kernel computes
all documents. On the CPU documents of similar length are computed together by SDPA, padded at the end: a
causal query never attends to later positions, so no mask is needed. No T x T mask is built, except by
`block_mask` for "eager".

The function is registered with transformers under a name of its own, because CLIP uses "sdpa".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from phi3v_dist.parallel.sequence import SequenceGroup

NAME = "phi3v_packed"
_WASTE = 1.25  # a group of documents may have this many times the positions of its tokens
_HALF = (torch.bfloat16, torch.float16)  # dtypes of the variable-length kernel
_QUERY_BLOCK = 1024  # queries at a time where a mask is needed: several new tokens after a cache


@dataclass(frozen=True)
class Layout:
    """Documents of a sequence of N tokens, each attending causally within itself.

    cu_seqlens: int32 [documents + 1], on the device. max_length: tokens of the longest document.
    groups: for the CPU, (count, length, take): `count` documents of at most `length` tokens, and the int64
        [count * length] positions of their tokens, or a slice of positions if these are contiguous and
        without padding.
    restore: int64 [N], where each token is in the concatenated groups; None if they are in order already.
    tokens: int64 [N], positions of the real tokens in a flattened padded batch; None if all are real.
    """

    cu_seqlens: torch.Tensor
    max_length: int
    groups: tuple[tuple[int, int, torch.Tensor | slice], ...]
    restore: torch.Tensor | None
    tokens: torch.Tensor | None = None


def make_layout(cu_seqlens: torch.Tensor, tokens: torch.Tensor | None = None) -> Layout:
    """The layout of documents cu_seqlens[d] .. cu_seqlens[d + 1] - 1 (int [documents + 1], on any device).

    For the CPU it groups the documents, longest first: a document joins the current group while the padded
    group has at most _WASTE times as many positions as tokens.
    """
    bounds = cu_seqlens.tolist()
    spans = [(end - start, start) for start, end in zip(bounds, bounds[1:], strict=False) if end > start]
    longest = max(length for length, _ in spans)
    device = cu_seqlens.device
    cu_seqlens = cu_seqlens.to(torch.int32)
    if device.type != "cpu":
        return Layout(cu_seqlens, longest, (), None, tokens)
    if all(length == longest for length, _ in spans):
        whole = slice(0, longest * len(spans))
        return Layout(cu_seqlens, longest, ((len(spans), longest, whole),), None, tokens)
    spans.sort(reverse=True)
    batches: list[list[tuple[int, int]]] = []
    used = 0
    for length, start in spans:
        fits = batches and (len(batches[-1]) + 1) * batches[-1][0][0] <= _WASTE * (used + length)
        if fits:
            batches[-1].append((length, start))
            used += length
        else:
            batches.append([(length, start)])
            used = length
    groups: list[tuple[int, int, torch.Tensor | slice]] = []
    restore = torch.empty(bounds[-1], dtype=torch.int64)
    base = 0
    for batch in batches:
        length = batch[0][0]
        if len(batch) == 1:
            start = batch[0][1]
            groups.append((1, length, slice(start, start + length)))
            restore[start : start + length] = torch.arange(base, base + length)
        else:
            starts = torch.tensor([start for _, start in batch])
            lengths = torch.tensor([n for n, _ in batch])
            steps = torch.arange(length)
            take = starts[:, None] + torch.minimum(steps, lengths[:, None] - 1)
            real = steps < lengths[:, None]
            restore[take[real]] = (base + torch.arange(len(batch) * length)).view(len(batch), length)[real]
            groups.append((len(batch), length, take.flatten()))
        base += length * len(batch)
    return Layout(cu_seqlens, longest, tuple(groups), restore, tokens)


def padded_layout(attention_mask: torch.Tensor) -> Layout:
    """The layout of a padded batch: in each of its B sequences the real tokens are a document.

    attention_mask: [B, T], 1 = real.
    """
    real = attention_mask.bool()
    lengths = real.sum(1)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
    return make_layout(cu_seqlens, None if bool(real.all()) else real.flatten().nonzero()[:, 0])


def causal_mask(attention_mask: torch.Tensor, queries: int) -> torch.Tensor:
    """The causal mask of the last `queries` of K positions: bool [B, 1, queries, K], True = attend.

    attention_mask: [B, K], 1 = real.
    """
    keys = attention_mask.shape[1]
    places = torch.arange(keys, device=attention_mask.device)
    visible = places[None, :] <= places[keys - queries :, None]
    return visible[None, None] & attention_mask.bool()[:, None, None, :]


def block_mask(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """The mask of a packed row: bool [1, 1, T, T], True = attend. Only for "eager", with which tests check
    the packed attention.
    """
    lengths = cu_seqlens.diff()
    document = torch.repeat_interleave(torch.arange(len(lengths), device=cu_seqlens.device), lengths)
    same = document[:, None] == document[None, :]
    return (same & torch.ones_like(same).tril())[None, None]


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    layout: Layout | None = None,
    sequence: SequenceGroup | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: [B, heads, T, head_dim] -> [B, T, heads, head_dim].

    With `layout` (no cache) every document attends within itself; outputs at padding are zero. Without
    `layout` the queries belong to the last positions of the cached keys, and attention_mask [B, K] is 1 at
    real keys. With `sequence` T is this rank's slice of the row, B is 1, and `layout` is that
    of the whole row: each rank computes its share of the heads over all positions.
    """
    if layout is None:
        return _cached(query, key, value, attention_mask=attention_mask, scaling=scaling), None
    batch, length = query.shape[0], query.shape[2]
    # [B, heads, T, d] -> [B * T, heads, d]: a view, because the projection stores it in this order
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    if layout.tokens is not None:
        q, k, v = (x.index_select(0, layout.tokens) for x in (q, k, v))
    attend = _varlen if q.is_cuda and q.dtype in _HALF else _grouped
    if sequence is not None:
        q, k, v = sequence.to_heads(q, k, v)
    out = attend(q, k, v, layout=layout, scaling=scaling)
    if sequence is not None:
        out = sequence.to_positions(out)
    if layout.tokens is not None:
        out = out.new_zeros(batch * length, *out.shape[1:]).index_copy(0, layout.tokens, out)
    return out.view(batch, length, *out.shape[1:]), None


def _varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layout: Layout, scaling: float | None
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    cu, longest = layout.cu_seqlens, layout.max_length
    same_heads = q.shape[1] == k.shape[1]
    out = varlen_attn(
        q, k, v, cu, cu, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=not same_heads
    )
    assert isinstance(out, torch.Tensor)
    return out


def _grouped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layout: Layout, scaling: float | None
) -> torch.Tensor:
    gqa = q.shape[1] != k.shape[1]
    groups = layout.groups
    if not groups:  # float32 on CUDA: document by document
        bounds = layout.cu_seqlens.tolist()
        groups = tuple((1, e - s, slice(s, e)) for s, e in zip(bounds, bounds[1:], strict=False) if e > s)
    outs = []
    for count, length, take in groups:
        parts = [x[take] if isinstance(take, slice) else x.index_select(0, take) for x in (q, k, v)]
        qs, ks, vs = (x.unflatten(0, (count, length)).transpose(1, 2) for x in parts)
        out = F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, scale=scaling, enable_gqa=gqa)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    joined = outs[0] if len(outs) == 1 else torch.cat(outs)
    return joined if layout.restore is None else joined.index_select(0, layout.restore)


def _cached(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    queries, keys = query.shape[2], key.shape[2]
    gqa = query.shape[1] != key.shape[1]
    if queries == 1:
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=gqa)
        return out.transpose(1, 2).contiguous()
    if attention_mask is None:
        attention_mask = torch.ones(query.shape[0], keys, dtype=torch.bool, device=query.device)
    outs = []
    for start in range(0, queries, _QUERY_BLOCK):
        block = query[:, :, start : start + _QUERY_BLOCK]
        seen = keys - queries + start + block.shape[2]
        mask = causal_mask(attention_mask[:, :seen], block.shape[2])
        outs.append(
            F.scaled_dot_product_attention(
                block, key[:, :, :seen], value[:, :, :seen], attn_mask=mask, scale=scaling, enable_gqa=gqa
            )
        )
    return torch.cat(outs, dim=2).transpose(1, 2).contiguous()


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
