"""Plots of an adapter's ‖ΔW‖ and singular values, of adapter similarity, and of a run's losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from adapterkit import __version__
from adapterkit.errors import FormatError, UsageError
from adapterkit.files.opening import open_regular
from adapterkit.files.staging import Destination, staged
from adapterkit.inspection.module_rows import ModuleRow, grid
from adapterkit.packages import needed
from adapterkit.text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from adapterkit.combining.compare import Pair

SOFTWARE = {".png": "Software", ".svg": "Creator"}  # the metadata that names what drew a picture
OURS = (b"Software\0adapterkit ", b"<dc:title>adapterkit ")  # the same as bytes
HEAD = 4096  # bytes, which they are among
SIZE = (11.0, 6.2)  # inches
LEAST = 1e-6  # σ/σ₁ below which float32 factors are noise
MOST = 60  # characters of a name
TICKS = 40  # more layers than this are labelled in steps


def check_plot(path: Path) -> None:
    """Raise UsageError if a plot cannot be drawn to `path`, before anything is measured.

    Raises OutputExistsError where anything but an earlier plot is there.
    """
    if path.suffix.lower() not in SOFTWARE:
        raise UsageError(f"{path}: a plot is a {' or '.join(SOFTWARE)} file, by its name")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: there is no directory {path.parent} to draw it in")
    needed("matplotlib", "drawing")
    _destination(path).check()


def _destination(path: Path) -> Destination:
    """The destination of a plot: a new file, or an earlier plot of adapterkit."""
    return Destination(path, directory=False, overwrite=True, is_ours=_is_plot)


def _is_plot(path: Path) -> bool:
    try:
        with open_regular(path) as stream:
            head = stream.read(HEAD)
    except FormatError:
        return False
    return any(mark in head for mark in OURS)


def draw(rows: Sequence[ModuleRow], path: Path, title: str) -> None:
    """Draw measured `rows` to `path`, a PNG or an SVG by its suffix; an older plot there is replaced at once or not.

    Raises UsageError for other suffixes, a missing directory, or where matplotlib is not installed, and
    OutputExistsError where another file is there.
    """
    check_plot(path)
    from matplotlib.figure import Figure  # without pyplot: no global state, and no display is looked for

    figure = Figure(figsize=SIZE, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    _draw_norms(figure, left, rows)
    _draw_spectra(right, rows)
    figure.get_layout_engine().set(wspace=0.06, h_pad=0.1)  # type: ignore[union-attr, call-arg]
    figure.suptitle(_words(title), fontsize=14, fontweight="bold")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    suffix = path.suffix.lower()
    with staged(_destination(path)) as new:
        figure.savefig(new, format=suffix[1:], dpi=150, metadata={SOFTWARE[suffix]: f"adapterkit {__version__}"})


def draw_likeness(pairs: Sequence[Pair], path: Path) -> None:
    """Draw the cosine of every two adapters' Δs by layer and target to `path`, a heat map for each pair."""
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(5.5, 4.2 * len(pairs)), SIZE[1]), layout="constrained")
    for axes, pair in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        rows = [row for row in pair.modules if row.layer is not None]
        squares: dict[tuple[str | None, int | None], list[float]] = {}
        for row in rows:
            squares.setdefault((row.target, row.layer), []).append(row.cosine)
        targets = tuple(dict.fromkeys(str(row.target) for row in rows))
        layers = tuple(sorted({row.layer for row in rows if row.layer is not None}))
        cells = [[fmean(squares.get((target, layer), [math.nan])) for target in targets] for layer in layers]
        label = f"cosine of ΔW: {pair.total.cosine:.3f} in all"
        _heat_map(figure, axes, cells, targets, layers, label, {"cmap": "RdBu", "vmin": -1, "vmax": 1})
        axes.set_title(f"{_words(pair.first)}\nand {_words(pair.second)}", fontsize=10)
    _save(figure, path)


def draw_losses(metrics: Sequence[Mapping[str, float]], path: Path, title: str) -> None:
    """Draw a run's training losses to `path`, each and smoothed, its validation losses, and the learning rate below."""
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 5.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    steps = [line["step"] for line in metrics if "loss" in line]
    losses = [line["loss"] for line in metrics if "loss" in line]
    window = max(1, len(losses) // 25)
    smooth = [fmean(losses[max(0, at - window + 1) : at + 1]) for at in range(len(losses))]
    above.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8)
    above.plot(
        steps, smooth, color="tab:blue", linewidth=2, label=f"training, mean of {window}" if window > 1 else "training"
    )
    held_out = [(line["step"], line["eval_loss"]) for line in metrics if "eval_loss" in line]
    if held_out:
        above.plot(*zip(*held_out, strict=True), color="tab:orange", linewidth=2, marker="o", label="held out")
    above.set_ylabel("loss")
    above.legend(frameon=False)
    below.plot(steps, [line["lr"] for line in metrics if "loss" in line], color="0.4")
    below.set_ylabel("learning rate")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.grid(color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_words(title), fontsize=13, fontweight="bold")
    _save(figure, path)


def _words(text: str) -> str:
    """Untrusted text for a plot: shortened, without math markup."""
    text = visible(text)
    return (text if len(text) <= MOST else f"{text[: MOST - 1]}…").replace("$", r"\$")


def _draw_norms(figure: Figure, axes: Axes, rows: Sequence[ModuleRow]) -> None:
    relative = any(row.relative is not None for row in rows)
    table = grid(rows, relative=relative)
    cells = [[math.nan if cell is None else cell for cell in column] for column in zip(*table.cells, strict=True)]
    label = "‖ΔW‖$_F$ / ‖W‖$_F$" if relative else "‖ΔW‖$_F$"
    _heat_map(figure, axes, cells, table.targets, table.layers, label, {"cmap": "viridis"})
    axes.set_title("size of the update" + (", relative to the base" if relative else ""), fontsize=11)


def _heat_map(
    figure: Figure, axes: Axes, cells: Sequence[Sequence[float]], targets: Sequence[str], layers: Sequence[int],
    label: str, colors: dict[str, Any],
) -> None:  # fmt: skip
    """Layers from top to bottom, targets from left to right; grey without a module."""
    if not layers:
        axes.text(0.5, 0.5, "no module has a layer number", ha="center", va="center", color="0.4")
        axes.set_axis_off()
        return
    axes.set_facecolor("0.88")
    image = axes.imshow(cells, aspect="auto", interpolation="nearest", **colors)
    axes.set_xticks(range(len(targets)), list(map(_words, targets)), rotation=40, ha="right", rotation_mode="anchor")
    step = -(-len(layers) // TICKS)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize=8)
    axes.tick_params(length=0)
    axes.set_ylabel("layer")
    # Thin gaps between the cells, so that neighbours of one colour can be counted.
    axes.set_xticks([at - 0.5 for at in range(1, len(targets))], minor=True)
    axes.set_yticks([at - 0.5 for at in range(1, len(layers))], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, pad=0.03, aspect=35)
    bar.outline.set_visible(False)
    bar.set_label(label)


def _draw_spectra(axes: Axes, rows: Sequence[ModuleRow]) -> None:
    """σᵢ/σ₁ of each module, thin, and the median of each target, bold."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    known = [row for row in rows if row.spectral and np.isfinite(row.spectral)]
    targets = dict.fromkeys(row.target for row in known)
    for target, color in zip(targets, cycle(colormaps["tab10"].colors)):  # type: ignore[attr-defined]
        spectra = [np.array(row.sigma) / row.sigma[0] for row in known if row.target == target]
        for spectrum in spectra:
            axes.plot(range(1, len(spectrum) + 1), spectrum, color=color, linewidth=0.6, alpha=0.25)
        longest = max(map(len, spectra))
        padded = np.array([np.pad(s, (0, longest - len(s)), constant_values=np.nan) for s in spectra])
        median = np.nanmedian(padded, axis=0)
        axes.plot(
            range(1, longest + 1), median, color=color, linewidth=2.2, marker="o", markersize=3, label=_words(target)
        )
    axes.set_yscale("log")
    smallest = min((row.sigma[-1] / row.sigma[0] for row in known), default=0.1)
    axes.set_ylim(max(LEAST, 0.7 * smallest), 1.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("i")
    axes.set_ylabel("σᵢ / σ₁")
    axes.grid(which="major", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    if targets:
        axes.legend(frameon=False, fontsize=9, ncols=1 + len(targets) // 12)
    axes.set_title("singular values: modules thin, medians by target bold", fontsize=11)
