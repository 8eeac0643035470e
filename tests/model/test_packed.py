"""A packed row is its documents, each as if it were alone: logits, loss, gradients, RoPE factors, tower
calls.
"""

import copy
from dataclasses import fields, replace

import pytest
import torch

from phi3v_dist.config import RunConfig
from phi3v_dist.model.attention import NAME
from phi3v_dist.model.groups import freeze
from phi3v_dist.model.memory import save_memory
from phi3v_dist.model.modeling import LossHead


@pytest.fixture(scope="module")
def six(tiny):
    """Short and long (past 64 positions), text-only, one and several pictures."""
    return [
        tiny.document(1, 20),
        tiny.document(2, 120),
        tiny.document(3, 12, ((1, 2),)),
        tiny.document(4, 20),
        tiny.document(5, 30, ((2, 2), (1, 1), (3, 1))),
        tiny.document(6, 63),
    ]


@pytest.mark.parametrize("attention", [NAME, "eager"])
def test_logits_and_gradients_equal_documents_alone(tiny, six, attention) -> None:
    model = tiny.model(attn_implementation=attention)
    row = tiny.pack(six, pad=7)
    before = copy.deepcopy(row)
    with torch.no_grad():
        logits = model(row=row, return_logits=True)
    loss = model(row=row)
    assert logits.dtype == loss.dtype == torch.float32 and loss.ndim == 0
    for field in fields(row):
        value = getattr(row, field.name)
        same = torch.equal(value, getattr(before, field.name)) if isinstance(value, torch.Tensor) else True
        assert same, f"{field.name} was modified"
    loss.backward()
    packed = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    start, total = 0, 0.0
    for document in six:
        inputs = tiny.published(document)
        alone = model(**inputs)
        stop = start + len(document.input_ids)
        torch.testing.assert_close(logits[start:stop], alone.logits[0], atol=1e-5, rtol=0)
        targets = int((inputs["labels"] != -100).sum())
        (alone.loss * targets).backward()
        total += alone.loss.item() * targets
        start = stop
    assert abs(loss.item() - total) < 1e-4 * total
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert packed[name] is None, name
            continue
        norm = parameter.grad.norm()
        assert (packed[name] - parameter.grad).norm() <= 1e-4 * norm + 1e-6, name


def test_packed_and_eager_attention_agree(tiny, six) -> None:
    row = tiny.pack(six)
    with torch.no_grad():
        one = tiny.model()(row=row, return_logits=True)
        other = tiny.model(attn_implementation="eager")(row=row, return_logits=True)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_order_and_neighbours_do_not_matter(tiny, six) -> None:
    model = tiny.model()
    with torch.no_grad():
        first = model(row=tiny.pack([six[2], six[1]]), return_logits=True)[: len(six[2].input_ids)]
        last = model(row=tiny.pack([six[4], six[2]]), return_logits=True)[-len(six[2].input_ids) :]
    torch.testing.assert_close(first, last, atol=1e-5, rtol=0)


def test_row_without_target_is_zero_and_touches_every_parameter(tiny, six) -> None:
    model = tiny.model()
    row = tiny.pack(six)
    loss = model(row=replace(row, labels=torch.full_like(row.labels, -100)))
    loss.backward()
    assert loss.item() == 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and not parameter.grad.any(), name


def test_row_without_pictures_still_runs_the_tower(tiny, six) -> None:
    model = tiny.model()
    calls = count_tower_calls(model)
    row = tiny.pack([six[0], six[1]])
    loss = model(row=row)
    loss.backward()
    assert calls == [1]
    vision = dict(model.model.vision_embed_tokens.named_parameters())
    for name, parameter in vision.items():
        if parameter.requires_grad:
            assert parameter.grad is not None and not parameter.grad.any(), name
    expected = tiny.published(six[0])
    alone = model(**expected)
    other = model(**tiny.published(six[1]))
    total = alone.loss * sum(x != -100 for x in six[0].labels) + other.loss * sum(
        x != -100 for x in six[1].labels
    )
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=0)


@pytest.mark.parametrize("calls", [1, 2, 3, 14, 20])
def test_tower_is_called_as_often_as_told(tiny, six, calls) -> None:
    """14 views: 10 tiles and 4 global views. More calls than views add blanks that change nothing."""
    model = tiny.model()
    row = tiny.pack(six)
    assert len(row.tiles) + len(row.grids) == 14
    with torch.no_grad():
        expected = model(row=row)
        views = count_tower_calls(model)
        found = model(row=replace(row, vision_calls=calls))
    assert len(views) == calls
    assert sum(views) == max(14, calls) and max(views) - min(views) <= 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_swapped_pictures_change_the_loss(tiny, six) -> None:
    model = tiny.model()
    row = tiny.pack([six[2]])
    with torch.no_grad():
        assert abs(model(row=row) - model(row=replace(row, tiles=255 - row.tiles))) > 1e-3


@pytest.mark.parametrize("calls", [1, 3])
def test_gradient_checkpointing_changes_nothing(tiny, six, calls) -> None:
    row = replace(tiny.pack(six), vision_calls=calls)
    plain, saving = tiny.model().train(), tiny.model().train()
    saving.gradient_checkpointing_enable()
    losses = [model(row=row) for model in (plain, saving)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for (name, p), q in zip(plain.named_parameters(), saving.parameters(), strict=True):
        if p.grad is None:
            assert q.grad is None and ("encoder.layers.2" in name or "post_layernorm" in name), name
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)


def count_tower_calls(model) -> list[int]:
    """Views of each call from here on."""
    views: list[int] = []
    tower = model.model.vision_embed_tokens.img_processor.vision_model
    tower.register_forward_pre_hook(lambda module, inputs: views.append(len(inputs[0])))
    return views


@pytest.mark.parametrize("number", [1, 3])
def test_checkpointing_leaves_a_frozen_tower_alone(tiny, six, number) -> None:
    """It is run once, forward; gradients are those of a model without checkpointing."""
    plain, saving = tiny.model().train(), tiny.model().train()
    settings = {"name": "x", "model": {"path": "x"}, "data": {"path": "x"}, "train": {"steps": 1}}
    calls = []
    for model in (plain, saving):
        freeze(model, ["vision"])
        layer = model.model.vision_embed_tokens.img_processor.vision_model.encoder.layers[0]
        layer.register_forward_pre_hook(lambda module, inputs, model=model: calls.append(model is saving))
    save_memory(saving, RunConfig.model_validate(settings))
    for model in (plain, saving):
        model(row=replace(tiny.pack(six), vision_calls=number)).backward()
    assert calls.count(True) == calls.count(False) == number
    for (name, p), q in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)


def test_training_goes_on_after_generation_in_inference_mode(tiny, six) -> None:
    model = tiny.model()
    inputs = tiny.published(six[2])
    del inputs["labels"]
    with torch.inference_mode():
        model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=150)
    model.train()
    model(row=tiny.pack(six)).backward()


def test_bf16_stays_near_float32(tiny, six) -> None:
    """The reference in bf16 is within 0.005 of its float32 loss per token and 0.6 % of its gradient norm."""
    exact, rounded = tiny.model(), tiny.model().to(torch.bfloat16)
    row = tiny.pack(six)
    losses, norms = [], []
    for model in (exact, rounded):
        loss = model(row=row)
        loss.backward()
        assert loss.dtype == torch.float32
        grads = [p.grad.float().norm() for p in model.parameters() if p.grad is not None]
        losses.append(loss.item() / row.num_targets)
        norms.append(torch.stack(grads).norm().item())
    assert losses[1] == pytest.approx(losses[0], abs=0.005)
    assert norms[1] == pytest.approx(norms[0], rel=0.006)


def test_the_loss_of_confident_tokens_is_not_rounded_away_in_bf16() -> None:
    """The better a model, the smaller its losses: sums of exponentials in bf16 make half of them 0."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(4000, 256, generator=draw).to(torch.bfloat16)
    targets = torch.randint(0, 4000, (256,), generator=draw)
    noise = 0.15 * torch.randn(256, 256, generator=draw)
    hidden = (0.08 * weight[targets].float() + noise).to(torch.bfloat16).requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact @ weight.double().T, targets, reduction="sum")
    expected.backward()
    assert expected < 0.05 * 256, "confident"
    head = LossHead(256, 4000, bias=False).to(torch.bfloat16)
    head.weight.data.copy_(weight)
    loss = head(hidden, targets)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=0.003)
    assert hidden.grad is not None and exact.grad is not None
    assert float((hidden.grad - exact.grad).norm() / exact.grad.norm()) < 0.006


def test_a_document_never_predicts_the_first_token_of_the_next(tiny) -> None:
    """Even where a row breaks its contract and labels first tokens."""
    model = tiny.model()
    documents = [tiny.document(1, 20), tiny.document(2, 33), tiny.document(3, 7)]
    row = tiny.pack(documents)
    with torch.no_grad():
        loss = model(row=replace(row, labels=row.input_ids))
        expected = 0.0
        for document in documents:
            ids = torch.tensor([document.input_ids])
            expected += model(ids, labels=ids).loss * (len(document.input_ids) - 1)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_a_grown_vocabulary_still_learns(tiny, six) -> None:
    model = tiny.model()
    row = tiny.pack(six)
    with torch.no_grad():
        before = model(row=row, return_logits=True)
        model.resize_token_embeddings(168, mean_resizing=False)
        torch.testing.assert_close(model(row=row, return_logits=True)[:, :160], before)
    model(row=row).backward()
    assert model.lm_head.weight.grad.shape == (168, 64) and model.config.vocab_size == 168
