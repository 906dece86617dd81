"""One base × one recipe: train by PEFT, merge and unmerge by the command line, and compare with PEFT and the base."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from adapterkit.cli.main import group

from .models import TASKS, Model
from .recipes import NEW_TOKENS, RECIPES, Recipe, layers_of

OK, NONE = "ok", "none"
DIFFERENT = "wrong: logits differ by"
RELATIVE = 1e-5  # of the logits' norm


def trials(model: Model, names: Iterable[str], folder: Path) -> dict[str, str]:
    """Return a verdict by recipe: OK, NONE where it does not apply, or who failed (peft, refused, wrong …) and how."""
    made = model.make()
    model.logits(made)  # fails before anything else does, if the config is wrong
    bases = {}
    for headless in {RECIPES[name].headless for name in names if model.task in RECIPES[name].tasks}:
        saved = folder / ("headless" if headless else "base")
        (model.language_model() if headless else made).save_pretrained(saved)
        bases[headless] = saved, model.cls.from_pretrained(saved, **({"num_labels": 3} if headless else {})).eval()
    return {
        name: trial(model, recipe, *bases[recipe.headless], folder)
        for name, recipe in RECIPES.items()
        if name in names and model.task in recipe.tasks
    }


def trial(model: Model, recipe: Recipe, base: Path, loaded: PreTrainedModel, folder: Path) -> str:
    """Return the verdict for one recipe; the adapter and the merged model are left in `folder`."""
    adapter, merged, restored = (folder / name for name in ("adapter", "merged", "restored"))
    for made in (adapter, merged, restored):
        shutil.rmtree(made, ignore_errors=True)
    more = tuple(range(96, 96 + NEW_TOKENS)) if recipe.grown else ()
    try:
        if (expected := train(model, recipe, copy.deepcopy(loaded), adapter, more)) is None:
            return NONE
        with torch.no_grad():
            logits = model.logits(expected.get_base_model(), more)
            before = model.logits(loaded)
    except Exception as error:
        return f"peft: {said(error)}"
    if not recipe.grown and relative(logits, before) < 100 * RELATIVE:
        return "peft: the adapter has no effect"
    if failed := run("merge", base, adapter, "-o", merged):
        return failed
    try:
        found, loading = load(merged, base)
        with torch.no_grad():
            failed = compare(model.logits(found, more), logits)
            if failed and failed.startswith(DIFFERENT):  # by the rounding of a sensitive model's own sums, perhaps
                models = (found.double(), expected.get_base_model().double())
                for made in models:
                    made.set_experts_implementation("eager")  # the others have no float64
                failed = compare(*(model.logits(made, more) for made in models))
            if failed:
                return failed
    except Exception as error:
        return f"wrong: the output does not load or run: {said(error)}"
    if loading:
        return f"wrong: {loading}"
    if model.multimodal and (failed := compare_unseen(found, expected)):
        return failed
    if failed := run("unmerge", merged, "-o", restored, "--adapter", adapter):
        return f"unmerge {failed}"
    return OK if hashes(restored) == hashes(base) else "wrong: unmerge restores other bytes"


def train(
    model: Model, recipe: Recipe, loaded: PreTrainedModel, adapter: Path, more: tuple[int, ...]
) -> PeftModel | None:
    """Save an adapter with random weights, and return the model that PEFT loads with it.

    Or the one that was trained, if PEFT doesn't load that: it renames modules that have the names of the model already.
    """
    torch.manual_seed(1)
    if recipe.grown:
        loaded.resize_token_embeddings(layers_of(loaded).vocabulary + NEW_TOKENS, mean_resizing=False)
    if (config := recipe.config(layers_of(loaded))) is None:
        return None
    generates = model.task == "classification" or hasattr(loaded, "prepare_inputs_for_generation")
    task = TASKS[model.task][1] if generates else None  # which PEFT needs that method for
    trained = get_peft_model(copy.deepcopy(loaded), LoraConfig(task_type=task, **config))
    trained.create_or_update_model_card = lambda *_: None  # which takes as long as the rest of saving
    randomize(trained, model, more)
    trained.save_pretrained(adapter)
    again = PeftModel.from_pretrained(loaded, adapter).eval()
    with torch.no_grad():
        one, other = (model.logits(made.eval().get_base_model(), more) for made in (again, trained))
    return again if relative(one, other) < RELATIVE else trained


def randomize(trained: PeftModel, model: Model, more: tuple[int, ...]) -> None:
    """Add noise to what is trained, but not to what gets no gradient, since no training changes it.

    A text gives none to what sees images or hears, which has noise all the same.
    """
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter += torch.randn_like(parameter) * 0.05
    if model.multimodal:
        return
    if model.type == "reformer":  # which computes gradients in this mode only, and from its first layer on
        trained.train()
        trained.enable_input_require_grads()
    with torch.enable_grad():
        model.logits(trained.get_base_model(), more).square().sum().backward()
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            if parameter.grad is None or not parameter.grad.any():
                parameter.copy_(value)


def run(*words: object) -> str | None:
    """Run a command in this process, and return how it failed."""
    result = CliRunner().invoke(group, [str(word) for word in words])
    if result.exit_code == 0:
        return None
    how = "refused" if hasattr(result.exception, "exit_code") else "crashed"
    return f"{how}: {said(result.exception)}"


def load(merged: Path, base: Path) -> tuple[PreTrainedModel, dict[str, list[str]]]:
    """Return the model of the class that the config names, and the tensors that are missing, unexpected or misshapen.

    A classifier leaves the base's head out when it loads, as it does from the base.
    """
    (architecture,) = json.loads((merged / "config.json").read_text())["architectures"]
    cls = getattr(transformers, architecture)
    found, loading = cls.from_pretrained(merged, output_loading_info=True)
    if loading["unexpected_keys"]:
        _, of_base = cls.from_pretrained(base, output_loading_info=True, ignore_mismatched_sizes=True)
        loading["unexpected_keys"] = set(loading["unexpected_keys"]) - set(of_base["unexpected_keys"])
    return found.eval(), {what: sorted(names)[:3] for what, names in loading.items() if names and what != "error_msgs"}


def compare(found: torch.Tensor, expected: torch.Tensor) -> str | None:
    """Return how logits differ from PEFT's."""
    if found.shape != expected.shape:
        return f"wrong: logits {tuple(found.shape)}, PEFT's {tuple(expected.shape)}"
    if not (error := relative(found, expected)) < RELATIVE:
        return f"{DIFFERENT} {error:.1e}"
    return None


def compare_unseen(found: PreTrainedModel, expected: PeftModel) -> str | None:
    """Compare the weights that a text does not reach, those for images and sounds, with PEFT's merge.

    PEFT merges tied embeddings wrongly, and the logits show them.
    """
    ends = {*layers_of(found).ends}
    theirs = expected.merge_and_unload()
    shared = theirs.get_input_embeddings().weight.data_ptr()
    for name, tensor in theirs.state_dict().items():
        if ends & {*name.split(".")} or tensor.data_ptr() == shared:
            continue
        if not torch.allclose(found.get_parameter_or_buffer(name), tensor, rtol=RELATIVE, atol=1e-6):
            return f"wrong: {name} differs from PEFT's"
    return None


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}


def said(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:400]
