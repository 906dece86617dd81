"""Chunked cross entropy, compared with torch's in one piece and in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from adapterkit.train import loss
from adapterkit.train.loss import chunked_cross_entropy, rows_at_a_time, token_losses

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS, DIM, VOCAB = 23, 6, 31


@pytest.fixture(params=[7 * VOCAB, 1, 1 << 23], ids=["ragged", "row by row", "whole"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(loss, "CHUNK", request.param)
    return int(request.param)


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    h, W = (torch.randn(TOKENS, DIM).to(dtype), (torch.randn(VOCAB, DIM) * 1.5).to(dtype))
    labels = torch.randint(VOCAB, (TOKENS,))
    labels[[0, 5, 6, TOKENS - 1]] = -100  # 19 count: two chunks of 7 and one of 5
    return h.requires_grad_(), W.requires_grad_(), labels


def reference(h: torch.Tensor, W: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """Return the sum and its gradients, times 0.3, from the same numbers in float64."""
    h, W = (tensor.detach().double().requires_grad_() for tensor in (h, W))
    total = F.cross_entropy(h @ W.T, labels, reduction="sum", ignore_index=-100)
    return [total.detach(), *torch.autograd.grad(total * 0.3, [h, W])]


def test_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 7 * VOCAB)
    assert (rows_at_a_time(VOCAB), rows_at_a_time(7 * VOCAB + 1), rows_at_a_time(2 * VOCAB)) == (7, 1, 3)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 0.02)])
def test_value_and_gradients(dtype: torch.dtype, limit: float) -> None:
    h, W, labels = inputs(dtype)
    total = chunked_cross_entropy(h, W, labels)
    found = [total.detach(), *torch.autograd.grad(total * 0.3, [h, W])]
    assert total.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert [one.dtype for one in found[1:]] == [dtype, dtype]
    for one, wanted in zip(found, reference(h, W, labels), strict=True):
        assert float((one.double() - wanted).abs().max() / wanted.abs().max()) < limit
    assert not found[1][labels == -100].any()


@pytest.mark.usefixtures("chunk")
def test_each_gradient_alone_and_none() -> None:
    h, W, labels = inputs(torch.float64)
    total, dh, dW = reference(h, W, labels)
    [only] = torch.autograd.grad(chunked_cross_entropy(h, W.detach(), labels) * 0.3, [h])
    torch.testing.assert_close(only, dh)
    [only] = torch.autograd.grad(chunked_cross_entropy(h.detach(), W, labels) * 0.3, [W])
    torch.testing.assert_close(only, dW)
    without = chunked_cross_entropy(h.detach(), W.detach(), labels)
    assert not without.requires_grad
    torch.testing.assert_close(without, total)


@pytest.mark.usefixtures("chunk")
def test_gradcheck() -> None:
    h, W, labels = inputs(torch.float64)
    assert gradcheck(lambda h, W: chunked_cross_entropy(h, W, labels), (h, W))


@pytest.mark.usefixtures("chunk")
def test_no_counted_labels() -> None:
    h, W, labels = inputs(torch.float32)
    total = chunked_cross_entropy(h, W, torch.full_like(labels, -100))
    dh, dW = torch.autograd.grad(total, [h, W])
    assert total == 0 and not dh.any() and not dW.any()
    losses, right = token_losses(h, lambda h: h @ W.T, torch.full_like(labels, -100), VOCAB)
    assert not losses.any() and not right.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_logits_do_not_overflow(dtype: torch.dtype) -> None:
    h = torch.tensor([[200.0], [-200.0]], dtype=dtype, requires_grad=True)
    W = torch.tensor([[1.0], [-1.0], [0.5]], dtype=dtype)
    total = chunked_cross_entropy(h, W, torch.tensor([2, 0]))
    [dh] = torch.autograd.grad(total, [h])
    assert total.item() == 100 + 400
    assert dh.tolist() == [[1 - 0.5], [-1 - 1]]  # the likeliest's weight less the label's


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_losses_of_tokens(dtype: torch.dtype, limit: float) -> None:
    h, W, labels = inputs(dtype)
    with torch.no_grad():
        likeliest = (h.double() @ W.double().T).argmax(dim=1)
        labels[::4] = likeliest[::4]
        labels[4] = -100
        wanted = F.cross_entropy(h.double() @ W.double().T, labels, reduction="none", ignore_index=-100)
    rows: list[int] = []

    def logits(some: torch.Tensor) -> torch.Tensor:
        rows.append(len(some))
        return some @ W.T

    losses, right = token_losses(h, logits, labels, VOCAB)
    assert not losses.requires_grad and sum(rows) == int((labels != -100).sum()) and max(rows) <= rows_at_a_time(VOCAB)
    assert float((losses.double() - wanted).abs().max() / wanted.max()) < limit
    assert right.tolist() == ((labels == likeliest) & (labels != -100)).tolist() and right.any() and not right.all()
    torch.testing.assert_close(
        losses.sum().double(), chunked_cross_entropy(h, W, labels).detach().double(), rtol=max(limit, 1e-12), atol=0
    )
