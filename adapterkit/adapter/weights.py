"""The in-memory form of adapters, independent of file formats.

Opening an adapter reads only headers: names, shapes and scalings are known, weights are read on demand. So
`LoraWeights` is generic: over `LazyTensor` for weights in a file, over `torch.Tensor` for weights in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

from adapterkit.adapter.module_names import layer_of, target_of
from adapterkit.adapter.summary import Summary, distinct
from adapterkit.files.safetensors import TensorInfo, read_tensors, tensor_bytes
from adapterkit.files.stamps import Stamp
from adapterkit.reprs import Displayed
from adapterkit.text import given

if TYPE_CHECKING:
    import torch

Kind = Literal["linear", "embedding", "conv", "parameter"]
ORIENTATIONS = ("plain", "transposed")  # of the Δ of stacked experts, as PEFT adds it


class Shaped(Protocol):
    """Anything with a shape and a dtype: a tensor, or one still on disk."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> object: ...


T = TypeVar("T", bound=Shaped)
V = TypeVar("V")


@dataclass(frozen=True, slots=True, repr=False)
class LazyTensor(Displayed):
    """A tensor that is read on demand; `view` converts the stored tensor to adapterkit's layout."""

    source: TensorInfo | torch.Tensor
    shape: tuple[int, ...]
    dtype: str
    view: Callable[[torch.Tensor], torch.Tensor] | None = None  # a module-level function or a partial: plans pickle

    @classmethod
    def of(cls, source: TensorInfo | torch.Tensor) -> LazyTensor:
        """Wrap a tensor, on disk or in memory, in its stored layout."""
        if isinstance(source, TensorInfo):
            return cls(source, source.shape, source.dtype)
        from adapterkit.files.safetensors import TORCH_NAMES

        names = {name: key for key, name in TORCH_NAMES.items()}
        return cls(source, tuple(source.shape), names[str(source.dtype).removeprefix("torch.")])

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)

    def brief(self) -> str:
        return f"{self.shape} {self.dtype}"

    def read(self) -> torch.Tensor:
        """Read the tensor, in its stored dtype."""
        stored = self.source.read() if isinstance(self.source, TensorInfo) else self.source
        return self.view(stored) if self.view else stored

    def read_rows(self, first: int, last: int) -> torch.Tensor:
        """Read rows `first:last`; only those, if there is no `view`."""
        if self.view is not None or not isinstance(self.source, TensorInfo):
            return self.read()[first:last]
        info, row = self.source, tensor_bytes(self.dtype, self.shape[1:])
        start, shape = info.start + first * row, (last - first, *self.shape[1:])
        return replace(info, start=start, stop=start + (last - first) * row, shape=shape).read()

    def equals(self, other: LazyTensor) -> bool:
        """Return whether another tensor has the same shape, dtype and bytes; reads a few megabytes at a time."""
        if (self.shape, self.dtype) != (other.shape, other.dtype):
            return False
        step = max(1, (16 << 20) // max(1, tensor_bytes(self.dtype, self.shape[1:])))
        spans = [(first, min(self.shape[0], first + step)) for first in range(0, self.shape[0], step)]
        return all(bool((self.read_rows(*span) == other.read_rows(*span)).all()) for span in spans)


def read_all(tensors: Sequence[LazyTensor]) -> list[torch.Tensor]:
    """Read many tensors, each in its stored dtype; neighbours in a file in a single read."""
    read = iter(read_tensors([tensor.source for tensor in tensors if isinstance(tensor.source, TensorInfo)]))
    stored = [next(read) if isinstance(tensor.source, TensorInfo) else tensor.source for tensor in tensors]
    return [tensor.view(raw) if tensor.view else raw for tensor, raw in zip(tensors, stored, strict=True)]


@dataclass(frozen=True, slots=True, repr=False)
class LoraWeights(Displayed, Generic[T]):
    """The low-rank update of a module or parameter: `Δ = scaling · B · A`; with a `magnitude`, of the direction (DoRA).

    Shapes: `A (rank, in)`, `B (out, rank)`, `magnitude (out,)`, `bias (out,)`. For a convolution `A (rank, in, k…)` and
    `B (out, rank, 1…)`. For an embedding, `in` is the vocabulary and Δ is added transposed. For a parameter, which may
    be a stack of experts, `A (experts·rank, in)` and `B (out, rank·experts)`, with the expert as the fastest index of
    B's columns.
    """

    A: T
    B: T
    scaling: float
    alpha: float | None = None
    magnitude: T | None = None
    bias: T | None = None
    kind: Kind = "linear"
    experts: int = 1
    fan_in_fan_out: bool = False  # as in the file; only used for square weights

    @property
    def rank(self) -> int:
        return self.A.shape[0] // self.experts

    @property
    def in_features(self) -> int:
        return prod(self.A.shape[1:])

    @property
    def out_features(self) -> int:
        return self.B.shape[0]

    def tensors(self) -> Iterator[T]:
        """Yield every tensor, factors first."""
        yield self.A
        yield self.B
        if self.magnitude is not None:
            yield self.magnitude
        if self.bias is not None:
            yield self.bias

    def brief(self) -> str:
        return "; ".join(self.lines())

    def lines(self) -> list[str]:
        alpha = "" if self.alpha is None else f", alpha {given(self.alpha)}"
        tensors = {"A": self.A, "B": self.B, "magnitude": self.magnitude, "bias": self.bias}
        return [
            f"rank {self.rank}, scaling {given(self.scaling)}{alpha}",
            *(f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items() if tensor is not None),
        ]

    def problem(self) -> str | None:
        """Describe what is wrong with the shapes, or return None."""
        a, b = self.A.shape, self.B.shape
        if len(a) < 2 or len(b) < 2 or 0 in a or 0 in b:
            return f"A is {a} and B is {b}: expected (rank, in) and (out, rank)"
        if self.kind != "conv" and (len(a) != 2 or len(b) != 2):
            return f"A is {a} and B is {b}: expected (rank, in) and (out, rank)"
        if self.kind == "conv" and (len(a) != len(b) or any(size != 1 for size in b[2:])):
            return f"A is {a} and B is {b}: expected (rank, in, k…) and (out, rank, 1…)"
        if a[0] != b[1]:
            return f"A is {a} and B is {b}: their ranks differ, {a[0]} and {b[1]}"
        for name, vector in (("magnitude", self.magnitude), ("bias", self.bias)):
            if vector is not None and vector.shape != (self.out_features,):
                return f"the {name} is {vector.shape}, but B has {self.out_features} rows"
        return None


def load_weights(weights: LoraWeights[LazyTensor]) -> LoraWeights[torch.Tensor]:
    """Read the tensors of one module into memory."""
    return LoraWeights(
        weights.A.read(), weights.B.read(), weights.scaling, weights.alpha,
        None if weights.magnitude is None else weights.magnitude.read(),
        None if weights.bias is None else weights.bias.read(),
        weights.kind, weights.experts, weights.fan_in_fan_out,
    )  # fmt: skip


Input = Literal["initial", "base", "quantized base"]


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem of an adapter; what computes with Δ refuses adapters with a fatal one."""

    where: str
    what: str
    fatal: bool = True
    remedy: str = ""  # what to do next
    intact: bool = False  # its own library loads the adapter right
    settled_by: tuple[Input, ...] = ()  # with one of these, Δ is right

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"

    def facts(self) -> dict[str, Any]:
        """Return what users see of it."""
        return {"where": self.where, "what": self.what, "fatal": self.fatal, "remedy": self.remedy or None}


@dataclass(frozen=True, repr=False)
class Adapter(Displayed, Mapping[str, "LoraWeights[torch.Tensor]"]):
    """A LoRA adapter: a mapping of names of modules and parameters to weights, and the tensors that it replaces.

    >>> adapter = adapterkit.load("adapter")  # headers only
    >>> adapter["model.layers.0.self_attn.q_proj"].A  # reads weights: (rank, in)
    >>> {name: weights.rank for name, weights in adapter.modules.items()}  # headers only

    Adapters are equal if their headers and files are; weights are not compared.
    """

    format: str
    modules: dict[str, LoraWeights[LazyTensor]]
    replaced: dict[str, LazyTensor] = field(default_factory=dict)  # tensors that replace the base's
    tokens: dict[str, tuple[tuple[int, ...], LazyTensor]] = field(default_factory=dict)  # embedding -> rows, deltas
    new_tensors: frozenset[str] = frozenset()  # of `replaced`: those of saved modules, which the base may lack
    ensure_weight_tying: bool = False  # trained with input and output embeddings tied
    base_model: str | None = None
    base_fingerprint: dict[str, tuple[str, str]] = field(default_factory=dict)  # see `fingerprint.py`
    rslora: bool = False  # scaling is alpha / √rank
    initialization: str = ""  # that moved a part of the base into the factors, such as pissa
    peft_version: str | None = None  # decides, with the model's type, whether Δ of stacked experts is transposed
    orientation: str | None = None  # one of ORIENTATIONS, to decide it instead
    task: str | None = None  # as PEFT names it: CAUSAL_LM, SEQ_CLS …
    dropout: float | None = None  # during training
    target_suffixes: tuple[str, ...] = ()  # name suffixes that select exactly these modules in their model, if known
    config: dict[str, Any] = field(default_factory=dict)  # the file's content, for round trips only
    files: tuple[Path, ...] = ()
    stamps: dict[Path, Stamp] = field(default_factory=dict)  # taken before the files were read
    problems: tuple[Problem, ...] = ()
    unrecognized: tuple[TensorInfo, ...] = ()

    def __getitem__(self, module: str) -> LoraWeights[torch.Tensor]:
        """Read the weights of `module` into memory."""
        return load_weights(self.modules[module])

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def __contains__(self, module: object) -> bool:
        return module in self.modules

    @property
    def kind(self) -> str:
        """LoRA, rsLoRA, DoRA, or rsLoRA + DoRA."""
        dora = any(weights.magnitude is not None for weights in self.modules.values())
        return " + ".join(["rsLoRA"] * self.rslora + ["DoRA"] * dora) or "LoRA"

    @property
    def rank(self) -> int | None:
        """The rank of all modules; None if they differ (see `summary().ranks`)."""
        return _only(weights.rank for weights in self.modules.values())

    @property
    def alpha(self) -> float | None:
        """The alpha of all modules; None if they differ, or the files don't define it."""
        return _only(weights.alpha for weights in self.modules.values())

    @property
    def targets(self) -> tuple[str, ...]:
        """The last segments of the module names, such as q_proj."""
        return distinct(map(target_of, self.modules))

    @property
    def num_parameters(self) -> int:
        """The number of trained parameters, without replaced tensors."""
        weights = (tensor for one in self.modules.values() for tensor in one.tensors())
        trained = (*weights, *(delta for _, delta in self.tokens.values()))
        return sum(prod(tensor.source.shape) for tensor in trained)

    def tensors(self) -> Iterator[LazyTensor]:
        """Yield every tensor of the adapter, unread."""
        for weights in self.modules.values():
            yield from weights.tensors()
        yield from self.replaced.values()
        for _, delta in self.tokens.values():
            yield delta

    def given(self, input: Input) -> Adapter:
        """Return the adapter without the fatal problems that `input` settles, where Δ is computed with it."""
        settled = (replace(one, fatal=one.fatal and input not in one.settled_by) for one in self.problems)
        return replace(self, problems=tuple(settled))

    def summary(self) -> Summary:
        """Return the facts in the headers, as printed by `adapterkit inspect`."""
        weights, layers = self.modules.values(), map(layer_of, self.modules)
        stored = [*(tensor.source for tensor in self.tensors()), *self.unrecognized]
        return Summary(
            format=self.format,
            kind=self.kind,
            base_model=self.base_model,
            modules=len(self.modules),
            ranks=distinct(one.rank for one in weights),
            alphas=distinct(one.alpha for one in weights if one.alpha is not None),
            scalings=distinct(one.scaling for one in weights),
            targets=self.targets,
            layers=distinct(layer for layer in layers if layer is not None),
            parameters=self.num_parameters,
            bytes=sum(tensor.nbytes for tensor in stored),
            dtypes=distinct(tensor.dtype for tensor in self.tensors()),
            replaced={name: tensor.shape for name, tensor in self.replaced.items()},
            tokens={name: delta.shape[0] for name, (_, delta) in self.tokens.items()},
            problems=tuple(problem.facts() for problem in self.problems),
            unread=tuple(info.name for info in self.unrecognized),
        )

    def brief(self) -> str:
        return self.summary().brief()

    def lines(self) -> list[str]:
        return self.summary().lines()


def _only(values: Iterable[V]) -> V | None:
    """Return the value if all of `values` are equal, else None."""
    different = set(values)
    return different.pop() if len(different) == 1 else None
