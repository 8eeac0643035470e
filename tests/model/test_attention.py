"""The packed attention by itself: any documents, padding anywhere, grouped heads, never a T x T tensor."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from phi3v_dist.model.attention import Layout, make_layout, packed_attention, padded_layout

HEADS, DIM = 4, 8


def random_qkv(batch: int, length: int, kv_heads: int = HEADS) -> list[torch.Tensor]:
    """[B, heads, T, d], laid out as a projection leaves them."""
    torch.manual_seed(length)
    shapes = [(batch, length, heads, DIM) for heads in (HEADS, kv_heads, kv_heads)]
    return [torch.randn(shape).transpose(1, 2).requires_grad_() for shape in shapes]


def alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of one document [heads, L, d] by hand; out [L, heads, d]."""
    k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * DIM**-0.5
    later = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return (scores.masked_fill(later, float("-inf")).softmax(-1) @ v).transpose(0, 1)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(
    "lengths",
    [[7], [5, 5, 5], [1], [1, 1, 30], [30, 1, 29, 2, 28, 3], [64, 3, 3, 3, 40, 41, 42], list(range(1, 20))],
)
def test_documents_attend_within_themselves(lengths: list[int], kv_heads: int) -> None:
    total = sum(lengths)
    q, k, v = random_qkv(1, total, kv_heads)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    layout = make_layout(bounds)
    found, _ = packed_attention(None, q, k, v, None, scaling=DIM**-0.5, layout=layout)
    parts = [
        alone(*(x[0, :, start:end] for x in (q, k, v)))
        for start, end in zip(bounds, bounds[1:], strict=False)
    ]
    expected = torch.cat(parts)
    torch.testing.assert_close(found[0], expected, atol=1e-6, rtol=1e-5)
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((found[0] * weights).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_groups_waste_little_and_lose_nothing(seed: int) -> None:
    lengths = torch.randint(1, 300, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
    layout = make_layout(torch.tensor([0, *torch.tensor(lengths).cumsum(0)]))
    padded = sum(rows * length for rows, length, _ in layout.groups)
    assert sum(rows for rows, _, _ in layout.groups) == len(lengths)
    assert padded <= 1.25 * sum(lengths) and len(layout.groups) < len(lengths) / 2
    assert layout.max_length == max(lengths)
    assert layout.restore is not None and len(layout.restore.unique()) == sum(lengths)


def test_padding_on_either_side_and_in_the_middle() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]])
    q, k, v = random_qkv(4, 6)
    found, _ = packed_attention(None, q, k, v, None, scaling=DIM**-0.5, layout=padded_layout(mask))
    for row, real in enumerate(mask.bool()):
        expected = alone(*(x[row][:, real] for x in (q, k, v)))
        torch.testing.assert_close(found[row][real], expected, atol=1e-6, rtol=1e-5)
        assert not found[row][~real].any()


@pytest.mark.parametrize("queries", [1, 3, 2000])
def test_new_tokens_after_a_cache(queries: int) -> None:
    """More queries than a block holds; the second row starts with padding."""
    keys = queries + 40
    q, k, v = random_qkv(2, keys)
    mask = torch.ones(2, keys)
    mask[1, :5] = 0
    found, _ = packed_attention(None, q[:, :, -queries:], k, v, mask, scaling=DIM**-0.5)
    for row, real in enumerate(mask.bool()):
        expected = alone(*(x[row][:, real] for x in (q, k, v)))[-queries:]
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-4)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_operation_makes_a_square_of_the_length(tiny) -> None:
    """Forward and backward of a row, a padded batch, and a step after a cache, 1,500 positions each."""
    model = tiny.model(original_max_position_embeddings=4096, max_position_embeddings=131072)
    length = 1500
    row = tiny.pack([tiny.document(1, 1400), tiny.document(2, 50)], pad=50)
    ids = torch.randint(4, 140, (2, length))
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[0, :300] = 0
    with Largest() as largest:
        model(row=row).backward()
        model(ids, mask, labels=ids, use_cache=False).loss.backward()
        with torch.no_grad():
            cache = model(ids[:, :-1], mask[:, :-1], use_cache=True).past_key_values
            model(ids[:, -1:], mask, past_key_values=cache)
    assert largest.elements < length * length / 3


def test_sdpa_is_left_alone() -> None:
    """CLIP uses it under its own name."""
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not packed_attention
    assert ALL_ATTENTION_FUNCTIONS["phi3v_packed"] is packed_attention


def test_any_kernel_asked_for_becomes_the_private_one(tiny) -> None:
    model = tiny.model(attn_implementation="sdpa")
    assert model.config._attn_implementation == "phi3v_packed"
    assert model.model.vision_embed_tokens.img_processor.vision_model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("flash_attention_2")
    assert model.config._attn_implementation == "phi3v_packed"
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_cuda_call_has_the_kernels_shapes(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: fake CUDA tensors go through the kernel's own checks; no number is computed."""
    calls = []
    kernel = varlen.varlen_attn

    def counted(*args, **kwargs):
        calls.append(kwargs["window_size"])
        return kernel(*args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", counted)
    with FakeTensorMode(), torch.no_grad():
        q, k, v = (
            torch.randn(1, heads, 20, 96, device="cuda", dtype=torch.bfloat16)
            for heads in (4, kv_heads, kv_heads)
        )
        bounds = torch.empty(4, dtype=torch.int32, device="cuda")
        layout = Layout(bounds, 9, (), None)
        out, _ = packed_attention(None, q, k, v, None, scaling=0.1, layout=layout)
        real = Layout(bounds, 9, (), None, tokens=torch.empty(15, dtype=torch.int64, device="cuda"))
        padded, _ = packed_attention(None, q, k, v, None, scaling=0.1, layout=real)
    assert out.shape == padded.shape == (1, 20, 4, 96) and out.dtype == torch.bfloat16
    assert calls == [(-1, 0)] * 2  # causal
