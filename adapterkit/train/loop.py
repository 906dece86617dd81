"""The training loop: gradients summed over the batches and processes of a step, then AdamW.

A step's rows and dropout depend only on the seed, the step number and the process. So the full state is the
parameters, the optimizer's two moments, the loss scale and the step number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from adapterkit.algebra.counter_rng import seed_for
from adapterkit.errors import AdapterkitError, FormatError
from adapterkit.train.causal_lm import Batch, CausalModel
from adapterkit.train.data.order import Order, Row
from adapterkit.train.data.tokenize import Example
from adapterkit.train.recipe import Recipe

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
MIN_SCALE = 1.0  # fp16 loss scale: gradients that overflow at this scale are not finite themselves


@dataclass(frozen=True, slots=True)
class Stepped:
    """One step: mean loss over its counted tokens, learning rate, gradient norm, and number of tokens."""

    step: int
    steps: int
    loss: float
    lr: float
    norm: float
    tokens: int
    stop: bool = False  # requested in any process


class Loop:
    """A model in training; this is process `rank` of the `world` processes that divide each step."""

    def __init__(self, model: CausalModel, order: Order, recipe: Recipe, rank: int = 0, world: int = 1) -> None:
        self.model, self.order, self.recipe, self.rank, self.world = model, order, recipe, rank, world
        self.step = 0
        self.trained: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in model.model.named_parameters() if parameter.requires_grad
        }
        self.device = next(iter(self.trained.values())).device
        self.optimizer = torch.optim.AdamW(
            list(_groups(self.trained, recipe)), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True
        )
        half = next(model.model.parameters()).dtype is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)

    def advance(self, stop: bool = False) -> Stepped:
        """Run one step; raises AdapterkitError where the loss or the gradient is not finite."""
        rows = self.order.step(self.step)
        counted = sum(int(example.counted.sum()) for row in rows for example in row)
        torch.manual_seed(seed_for(self.recipe.seed, f"step {self.step} of process {self.rank}"))
        loss, stop = self._share(self._gradients(rows[self.rank :: self.world], counted), stop)
        if not math.isfinite(loss):
            raise AdapterkitError(f"step {self.step + 1}: the loss is {loss}, {self._blame(rows)}")
        lr = self._set_rate()
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.trained.values(), self.recipe.clip or math.inf))
        if not math.isfinite(norm) and (not self.scaler.is_enabled() or self.scaler.get_scale() <= MIN_SCALE):
            raise AdapterkitError(f"step {self.step + 1}: the gradient's norm is {norm}, {self._blame(rows)}")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        tokens = sum(len(example.ids) for row in rows for example in row)
        return Stepped(self.step, self.order.steps, loss, lr, norm, tokens, stop)

    def evaluate(self, examples: Iterable[Example]) -> float:
        """The mean loss over the counted tokens of `examples`."""
        self.model.model.eval()
        rows = sorted(examples, key=lambda example: len(example.ids))
        mine, size = rows[self.rank :: self.world], self.recipe.batch_size
        total = torch.zeros(2, dtype=torch.float64)
        for first in range(0, len(mine), size):
            batch = Batch.of(mine[first : first + size], self.device)
            losses, _ = self.model.token_losses(batch)
            total += torch.tensor([losses.sum(dtype=torch.float64).item(), batch.counted])
        self.model.model.train()
        if self.world > 1:
            total = self._summed(total)
        return float(total[0] / total[1])

    def without_gradient(self) -> list[str]:
        """The modules that never had a gradient: the model does not call them."""
        moved: dict[str, bool] = {}
        for name, parameter in self.trained.items():
            module, moment = name.rpartition(".")[0], self.optimizer.state[parameter].get("exp_avg_sq")
            moved[module] = moved.get(module, False) or (moment is not None and bool(moment.any()))
        return [module for module, has_moved in moved.items() if not has_moved]

    def layout(self) -> dict[str, torch.Tensor]:
        """A tensor of the same shape and dtype for each tensor of `state`, without using memory."""
        scalar = torch.empty((), device="meta")
        tensors: dict[str, torch.Tensor] = {"scale": torch.empty(2, device="meta")}
        tensors |= {f"trained.{name}": parameter for name, parameter in self.trained.items()}
        tensors |= {f"kept.{name}": buffer for name, buffer in self._buffers().items()}
        for name, parameter in self.trained.items():
            tensors |= {f"{moment}.{name}": scalar if moment == "step" else parameter for moment in MOMENTS}
        return tensors

    def state(self) -> dict[str, torch.Tensor]:
        """All tensors of a checkpoint; parameters that never had a gradient have zero moments."""
        tensors = {"scale": torch.tensor([self.scaler.get_scale(), self.scaler.state_dict().get("_growth_tracker", 0)])}
        tensors |= {f"trained.{name}": parameter.detach() for name, parameter in self.trained.items()}
        tensors |= {f"kept.{name}": buffer for name, buffer in self._buffers().items()}
        zero = {"exp_avg": torch.zeros_like, "exp_avg_sq": torch.zeros_like, "step": lambda _: torch.zeros(())}
        for name, parameter in self.trained.items():
            for moment in MOMENTS:
                value = self.optimizer.state[parameter].get(moment)
                tensors[f"{moment}.{name}"] = zero[moment](parameter) if value is None else value
        return tensors

    @torch.no_grad()
    def restore(self, step: int, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from the `state` after `step` steps.

        Raises FormatError, before anything changes, where the optimizer's steps or the loss scale are impossible.
        """
        scale, growth = state["scale"].tolist()
        for name, value in {name: state[f"step.{name}"].item() for name in self.trained}.items():
            if not (0 <= value <= step and value == int(value)):
                raise FormatError(f"{name}: the optimizer has done {value:g} steps, the run {step:,}")
        if not (0 < scale < math.inf and 0 <= growth < math.inf) and self.scaler.is_enabled():
            raise FormatError(f"the loss scale is {scale:g}, changed {growth:g} steps ago: expected positive numbers")
        self.step = step
        for name, parameter in self.trained.items():
            parameter.copy_(state[f"trained.{name}"])
            moments = {moment: state[f"{moment}.{name}"].to(self.device) for moment in MOMENTS}
            self.optimizer.state[parameter] = moments
        for name, buffer in self._buffers().items():
            buffer.copy_(state[f"kept.{name}"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(self.scaler.state_dict() | {"scale": scale, "_growth_tracker": int(growth)})

    def _buffers(self) -> dict[str, torch.Tensor]:
        """The initial factors that are subtracted from the base."""
        names = (".first_A", ".first_B")
        return {name: buffer for name, buffer in self.model.model.named_buffers() if name.endswith(names)}

    def _gradients(self, rows: list[Row], counted: int) -> torch.Tensor:
        """Accumulate the gradients of `rows`, one batch at a time; returns their part of the mean loss."""
        total, size = torch.zeros((), device=self.device), self.recipe.batch_size
        for first in range(0, len(rows), size):
            batch = Batch.of([example for row in rows[first : first + size] for example in row], self.device)
            loss = self.model.loss(batch) / counted
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def _share(self, loss: torch.Tensor, stop: bool) -> tuple[float, bool]:
        """Sum the gradients, losses and stop requests of all processes in one message."""
        if self.world == 1:
            return loss.item(), stop
        for parameter in self.trained.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = [parameter.grad for parameter in self.trained.values() if parameter.grad is not None]
        extra = torch.tensor([loss.item(), float(stop)], device=self.device)
        flat = self._summed(torch.cat([*(grad.reshape(-1).float() for grad in grads), extra]))
        for grad, part in zip(grads, torch.split(flat[:-2], [grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))
        return float(flat[-2]), bool(flat[-1] > 0)

    def _summed(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(self.device)
        dist.all_reduce(tensor)
        return tensor

    def _set_rate(self) -> float:
        """Set the learning rate of this step, times each group's multiplier."""
        rate = self.recipe.lr * scheduled(self.step, self.order.steps, self.recipe.warmup, self.recipe.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["times"]
        return rate

    def _blame(self, rows: list[Row]) -> str:
        wheres = [example.where for row in rows for example in row]
        more = f" and {len(wheres) - 3} more" if len(wheres) > 3 else ""
        broken = [name for name, parameter in self.trained.items() if not parameter.isfinite().all()]
        cause = f"because {broken[0]} overflowed" if broken else f"on {', '.join(wheres[:3])}{more}"
        return f"{cause}; try a lower `lr`, or `dtype='fp32'`"


def scheduled(step: int, steps: int, warmup: float, schedule: str) -> float:
    """The learning-rate factor at `step`: rises during the warmup, then falls to 0 at `steps` or stays constant."""
    rise = warmup * steps if warmup < 1 else warmup
    if step < rise:
        return (step + 1) / (rise + 1)
    if schedule == "constant":
        return 1.0
    done = (step - rise) / max(1.0, steps - rise)
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def _groups(trained: Mapping[str, nn.Parameter], recipe: Recipe) -> Iterator[dict[str, object]]:
    """Parameter groups with their learning-rate multipliers: B has a larger one with LoRA+ (arXiv 2402.12354)."""
    B = [parameter for name, parameter in trained.items() if name.endswith(".B")]
    others = [parameter for name, parameter in trained.items() if not name.endswith(".B")]
    yield from ({"params": group, "times": times} for group, times in ((others, 1.0), (B, recipe.lora_plus)) if group)
