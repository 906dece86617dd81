"""Write the result of a run: an adapter in PEFT's format, or a model, with a card and a record."""

from __future__ import annotations

import platform
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adapterkit import __version__
from adapterkit.adapter.formats import save
from adapterkit.adapter.formats.table import DEFAULT, get_format
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.fingerprint import fingerprint
from adapterkit.files import os_calls
from adapterkit.files.staging import MERGE_RECORD, TRAINING_RECORD
from adapterkit.files.workspace import remove_tree
from adapterkit.files.writing import write_json, write_text
from adapterkit.hub.names import public_name
from adapterkit.text import counted, markdown, visible
from adapterkit.train.injection import adapter_of, lora_layers
from adapterkit.train.layers import is_linear
from adapterkit.train.loss import perplexity
from adapterkit.train.runs import checkpoints

if TYPE_CHECKING:
    from adapterkit.adapter.weights import Adapter
    from adapterkit.train.data.tokenize import Encoded
    from adapterkit.train.loop import Loop
    from adapterkit.train.recipe import Recipe
    from adapterkit.train.runs.checkpoints import Progress
    from adapterkit.train.runs.fingerprint import Origin


def write_result(
    folder: Path, recipe: Recipe, base: Checkpoint, loop: Loop, tokenizer: Any, data: Encoded,
    held_back: Encoded | None, progress: Progress, origin: Origin, command: str,
) -> None:  # fmt: skip
    """Turn the folder of a run into its result: write weights, record and card, remove checkpoints."""
    public = base_id(base)
    name = public or recipe.base  # PEFT stores the path as given; `push` never uploads it
    made = folder / "made"
    if recipe.method == "full":
        loop.model.model.save_pretrained(made)
        tokenizer.save_pretrained(made)
    else:
        save(trained_adapter(loop.model.model, recipe, base, name), made)
    for file in made.iterdir():
        os_calls.flush_path(file)
        file.rename(folder / file.name)
    made.rmdir()
    facts = _facts(recipe, loop, data, held_back, progress, origin)
    write_json(
        folder / TRAINING_RECORD, {"adapterkit": __version__, "command": command, **facts, "recipe": asdict(recipe)}
    )
    write_text(folder / "README.md", card(recipe, public, facts, command))
    remove_tree(folder / checkpoints.FOLDER)


def base_id(base: Checkpoint) -> str | None:
    """The Hub id of the base: as given, from the Hub cache, or from the config if its folder has the same name.

    A fine-tuned model's config may name the model that it was made from, which is not the base.
    """
    if given := public_name(base.name):
        return given
    path, found = base.path.resolve(), base.config.get("_name_or_path")
    named = public_name(found) if isinstance(found, str) else None
    if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):
        return public_name(path.parents[1].name.removeprefix("models--").replace("--", "/", 1))
    return named if named and named.rpartition("/")[2] == path.name and not (path / MERGE_RECORD).exists() else None


def trained_adapter(model: nn.Module, recipe: Recipe, base: Checkpoint, name: str | None) -> Adapter:
    """The factors in `model` as an adapter; its targets are leaf names unless another layer has one of them."""
    layers = lora_layers(model)
    leaves = {name.rpartition(".")[2] for name in layers}
    others = (name for name, layer in model.named_modules() if is_linear(layer) or isinstance(layer, nn.Embedding))
    short = not any(name.rpartition(".")[2] in leaves for name in others)
    return replace(
        adapter_of(model, name), base_fingerprint=fingerprint(base), rslora=recipe.method == "rslora", task="CAUSAL_LM",
        dropout=recipe.dropout, target_suffixes=tuple(sorted(leaves)) if short else (),
    )  # fmt: skip


def _facts(
    recipe: Recipe, loop: Loop, data: Encoded, held_back: Encoded | None, progress: Progress, origin: Origin
) -> dict[str, Any]:
    trained = sum(parameter.numel() for parameter in loop.trained.values())
    return {
        "data": {
            "name": Path(recipe.data).name, "records": len(data.examples), "tokens": data.tokens,
            "counted": data.counted,
            "sha256": origin.data, "truncated": len(data.truncated), "left_out": len(data.bad),
            "held_back": len(held_back.examples) if held_back else 0,
        },
        "base": {"files": origin.base}, "trained_parameters": trained,
        "steps": progress.step, "kept_step": loop.step, "tokens": progress.tokens,
        "seconds": round(progress.seconds, 1), "loss": progress.loss,
        "eval_loss_before": progress.first_eval_loss, "eval_loss": progress.best_loss,
        "never_moved": loop.without_gradient(), "hardware": _hardware(loop.device),
        "processes": loop.world, "threads": torch.get_num_threads(),
        "versions": _versions(),
    }  # fmt: skip


def card(recipe: Recipe, base: str | None, facts: dict[str, Any], command: str) -> str:
    """The model card: YAML metadata for the Hub, then the details of the training run."""
    full, data = recipe.method == "full", facts["data"]
    lines = ["---", *([f"base_model: {base}"] if base else [])]
    library = "transformers" if full else get_format(DEFAULT).LIBRARY
    lines += [f"library_name: {library}", "pipeline_tag: text-generation", "tags:"]
    lines += ["- adapterkit", *([] if full else ["- lora"]), "---", ""]
    lines += [f"# {markdown(base or 'A model')} fine-tuned on {markdown(data['name'])}", ""]
    kind = "All weights" if full else {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA"}[recipe.method]
    detail = "" if full or recipe.init_from else f", rank {recipe.rank}, on {markdown(recipe.targets)}"
    trained = counted(facts["trained_parameters"], "parameter")
    unit = "row" if recipe.packing else "record"
    lines += [f"{kind}{detail}; {trained}, trained with adapterkit {__version__}.", ""]
    rows = {
        "data": f"{data['name']}: {counted(data['records'], 'record')}, {counted(data['tokens'], 'token')} "
        f"({data['truncated']} truncated to {recipe.max_length} tokens, {data['left_out']} skipped)",
        "training": f"{counted(facts['steps'], 'step')} of {counted(recipe.rows_per_step, unit)}",
        "AdamW": f"lr {recipe.lr:g}, {recipe.schedule}, warmup {recipe.warmup:g}, "
        f"weight decay {recipe.weight_decay:g}, clip {recipe.clip:g}",
        "seed": str(recipe.seed),
        "last training loss": f"{facts['loss']:.4f}",
    }
    if facts["eval_loss"] is not None:
        before, after = facts["eval_loss_before"], facts["eval_loss"]
        rows["validation loss"] = f"{before:.4f} → {after:.4f} (best at step {facts['kept_step']}, kept)"
        rows["perplexity"] = f"{perplexity(before):.2f} → {perplexity(after):.2f}"
    rows |= {
        "time": f"{facts['seconds']:,.0f} s, {counted(facts['tokens'], 'token')}, on {facts['hardware']}",
        "versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
    }
    lines += ["| | |", "| --- | --- |", *(f"| {name} | {markdown(value)} |" for name, value in rows.items())]
    if command:
        lines += ["", "```", visible(command), "```"]
    return "\n".join(lines) + "\n"


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os_calls.processor()}, {counted(torch.get_num_threads(), 'thread')}"


def _versions() -> dict[str, str]:
    import transformers

    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
