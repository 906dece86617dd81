"""The products of training and their gradients, against autograd on the dense formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks

from adapterkit.train import products
from adapterkit.train.products import dora, low_rank, plain, times, times_transposed

S = 1.75  # alpha 7, rank 4
TOKENS, INNER, OUT, RANK = 9, 7, 5, 4
Tensors = dict[str, torch.Tensor]


pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(dtype: torch.dtype = torch.float64, dropout: bool = False, trained: bool = True) -> Tensors:
    """Return x, W, factors as after training, a magnitude other than the norm, and a dropout mask."""
    made = {
        "x": torch.randn(TOKENS, INNER), "W": torch.randn(OUT, INNER), "A": torch.randn(RANK, INNER),
        "B": torch.randn(OUT, RANK) * 0.5, "m": torch.rand(OUT) + 0.5, "G": torch.randn(TOKENS, OUT),
    }  # fmt: skip
    if dropout:
        made["mask"] = torch.empty(TOKENS, INNER).bernoulli_(0.7) / 0.7
    made = {name: tensor.to(dtype) for name, tensor in made.items()}
    made["n"] = (made["W"].double() + S * made["B"].double() @ made["A"].double()).norm(dim=1).to(dtype)
    return {name: t.requires_grad_(trained) if name in "xABm" else t for name, t in made.items()}


def formula(t: Tensors, magnitude: bool) -> torch.Tensor:
    """Compute `y` by the papers' formulas, with a dense update: arXiv 2106.09685, 2402.09353."""
    x, seen = t["x"], t["x"] * t.get("mask", 1.0)
    y = x @ t["W"].T + seen @ (S * t["B"] @ t["A"]).T
    return y * (t["m"] / t["n"]) if magnitude else y


def ours(t: Tensors, magnitude: bool) -> torch.Tensor:
    common = (t["x"], t["A"], t["B"], t.get("mask"), S, lambda: t["W"])
    return dora(*common, t["m"], t["n"]) if magnitude else low_rank(*common)


def results(t: Tensors, magnitude: bool, function: Callable[[Tensors, bool], torch.Tensor]) -> list[torch.Tensor]:
    """Return the output, and its gradients of x, A, B and the magnitude, for the cotangent G."""
    y = function(t, magnitude)
    return [y.detach(), *torch.autograd.grad(y, [t[name] for name in ("xABm" if magnitude else "xAB")], t["G"])]


def off(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Return the largest difference, relative to the largest value of the same tensor."""
    pairs = zip(found, wanted, strict=True)
    return max(float((one.double() - other).abs().max() / other.abs().max()) for one, other in pairs)


def wide(t: Tensors) -> Tensors:
    return {name: tensor.detach().double().requires_grad_(tensor.requires_grad) for name, tensor in t.items()}


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 0.03)])
def test_values_and_gradients_equal_the_dense_formula(
    magnitude: bool, dropout: bool, dtype: torch.dtype, limit: float
) -> None:
    t = inputs(dtype, dropout)
    assert off(results(t, magnitude, ours), results(wide(t), magnitude, formula)) < limit


@pytest.mark.parametrize("magnitude", [False, True])
def test_expanded_and_transposed_gradients(magnitude: bool) -> None:
    for cotangent in (
        torch.ones(1, 1).expand(TOKENS, OUT),
        torch.randn(OUT, TOKENS).T,
        torch.randn(TOKENS, 2 * OUT)[:, ::2],
    ):
        t = inputs(torch.float32) | {"G": cotangent}
        assert off(results(t, magnitude, ours), results(wide(t), magnitude, formula)) < 2e-6


@pytest.mark.parametrize("dropout", [False, True])
def test_gradcheck(dropout: bool) -> None:
    t = inputs(dropout=dropout)
    x, A, B, m = t["x"], t["A"], t["B"], t["m"]
    W, mask, n = t["W"], t.get("mask"), t["n"]
    assert gradcheck(lambda x, A, B: low_rank(x, A, B, mask, S, lambda: W), (x, A, B))
    assert gradcheck(lambda x, A, B, m: dora(x, A, B, mask, S, lambda: W, m, n), (x, A, B, m))


def test_gradcheck_of_the_base() -> None:
    t = inputs()
    assert gradcheck(lambda x: plain(x, None, lambda: t["W"]), (t["x"],))
    assert gradcheck(lambda x, W: plain(x, W, lambda: W), (t["x"], t["W"].requires_grad_()))
    x = t["x"].detach()
    assert gradcheck(lambda W: plain(x, W, lambda: W), (t["W"],))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "inner", "out"), [(1, 1, 1), (1, 33, 7), (17, 3, 129), (5, 257, 1), (0, 4, 3), (3, 0, 4)]
)
def test_products_of_odd_shapes_and_strides(dtype: torch.dtype, rows: int, inner: int, out: int) -> None:
    x, W = torch.randn(rows, inner, dtype=dtype), torch.randn(out, inner, dtype=dtype)
    laid = [
        (x, W), (x.T.contiguous().T, W), (x, W.T.contiguous().T), (x.repeat_interleave(2, 1)[:, ::2], W),
        (x.repeat_interleave(2, 0)[::2], W.repeat_interleave(3, 0)[::3]), (x, W.repeat_interleave(2, 1)[:, ::2]),
    ]  # fmt: skip
    eps = torch.finfo(dtype).eps
    for one, other in laid:
        torch.testing.assert_close(times_transposed(one, other), F.linear(x, W), rtol=4 * eps, atol=4 * eps * inner)
        torch.testing.assert_close(times(one, other.t()), F.linear(x, W), rtol=4 * eps, atol=4 * eps * inner)


def test_float32_products_with_and_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W = torch.randn(19, 65), torch.randn(31, 65)
    found = times_transposed(x, W)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    without = times_transposed(x, W)
    torch.testing.assert_close(found, without, rtol=1e-5, atol=1e-5)
    assert torch.equal(without, F.linear(x, W))


def saved(run: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors that autograd saves during `run` for the gradients."""
    found: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda tensor: (found.append(tensor), tensor)[1], lambda tensor: tensor):
        run()
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_saves_its_input_and_tensors_of_the_rank(dtype: torch.dtype) -> None:
    t = inputs(torch.float32)
    x, W = t["x"].detach().to(dtype).requires_grad_(), t["W"].to(dtype)
    x0, h, A, B = saved(lambda: low_rank(x, t["A"], t["B"], None, S, lambda: W))
    assert x0.data_ptr() == x.data_ptr() and A.data_ptr() == t["A"].data_ptr() and B.data_ptr() == t["B"].data_ptr()
    assert h.shape == (TOKENS, RANK) and h.dtype is dtype
    tensors = saved(lambda: dora(x, t["A"], t["B"], None, S, lambda: W, t["m"], t["n"]))
    assert [tuple(one.shape) for one in tensors[4:]] == [(TOKENS, OUT), (OUT,), (OUT,)] and tensors[4].dtype is dtype
    assert saved(lambda: plain(x, None, lambda: W)) == []
    [only] = saved(lambda: plain(x, W.requires_grad_(), lambda: W))
    assert only.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("magnitude", [False, True])
def test_the_base_is_not_read_for_unneeded_gradients(magnitude: bool) -> None:
    t, read = inputs(), []

    def dense() -> torch.Tensor:
        read.append(1)
        return t["W"]

    def run(x: torch.Tensor) -> int:
        read.clear()
        common: Any = (x, t["A"], t["B"], None, S, dense)
        y = dora(*common, t["m"], t["n"]) if magnitude else low_rank(*common)
        y.backward(t["G"])
        return len(read)

    assert run(t["x"].detach()) == 1
    assert run(t["x"]) == 2


def test_gradients_form_no_dense_matrix() -> None:
    shapes: list[tuple[int, ...]] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            made = isinstance(result, torch.Tensor) and not any(r.alias_info for r in func._schema.returns)
            shapes.extend([tuple(result.shape)] if made else [])
            return result

    for magnitude in (False, True):
        t = inputs()
        with Watch():
            ours(t, magnitude).backward(t["G"])
        assert shapes and (OUT, INNER) not in shapes and (INNER, OUT) not in shapes


@pytest.mark.parametrize("times_norm", [1.02, 1.035, 0.9785])
def test_a_magnitude_is_not_rounded_to_the_dtype_of_activations(times_norm: float) -> None:
    t = inputs(torch.float32, trained=False)  # the bfloat16 nearest to 1.02 is 1.0234
    x, W = torch.randn(4000, INNER).bfloat16(), t["W"].bfloat16()
    n = W.float().norm(dim=1)
    y = dora(x, t["A"], t["B"] * 0, None, S, lambda: W, n * times_norm, n).double()
    exact = x.double() @ W.double().T
    assert float((y * exact).sum() / exact.square().sum()) == pytest.approx(times_norm, abs=5e-4)


def test_a_row_of_zeros_stays_zero_without_nan() -> None:
    t = inputs()
    with torch.no_grad():
        t["W"][2], t["B"][2], t["m"][2], t["n"][2] = 0, 0, 0, 0
    y, dx, dA, dB, dm = results(t, True, ours)
    assert not y[:, 2].any() and not dB[2].any() and dm[2] == 0
    others = torch.arange(OUT) != 2
    less = {name: one[others] if name in ("W", "B", "m", "n") else one for name, one in t.items()}
    less["G"] = t["G"][:, others]
    less = {name: less[name].detach().requires_grad_(less[name].requires_grad) for name in less}
    assert off([y[:, others], dx, dA, dB[others], dm[others]], results(less, True, formula)) < 1e-12


def test_the_gradient_of_a_zero_magnitude_is_not_nan() -> None:
    assert products.gain(torch.zeros(2), torch.tensor([0.0, 2.0])).tolist() == [0, 0]
    t = inputs()
    with torch.no_grad():
        t["m"][1] = 0.0
    assert all(bool(one.isfinite().all()) for one in results(t, True, ours))
