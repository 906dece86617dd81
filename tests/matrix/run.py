"""Run types of models, in several processes; apart from `__main__`, whose functions other processes cannot import."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from .page import Line


def prepare() -> None:
    """Set up a process: one thread, no network, and no notes of transformers and PEFT."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    import torch
    from transformers.utils.logging import disable_progress_bar

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bar()
    torch.set_num_threads(1)


def run_all(
    types: list[tuple[str, str]], jobs: int, recipes: Iterable[str] | None = None, keep: Path | None = None
) -> Iterator[list[Line]]:
    """Yield the lines of each type, as they are done."""
    if jobs == 1:
        yield from (run_type(*of, recipes, keep) for of in types)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), prepare) as pool:
        for future in as_completed([pool.submit(run_type, *of, recipes, keep) for of in types]):
            yield future.result()


def run_type(task: str, name: str, recipes: Iterable[str] | None = None, keep: Path | None = None) -> list[Line]:
    """Return the verdicts for one type: of all recipes, and again with untied embeddings of those that change them."""
    from .models import variants
    from .recipes import RECIPES
    from .trial import said, trials

    lines: list[Line] = []
    for tied, model in variants(task, name).items():
        wanted = [of for of in recipes or RECIPES if not lines or RECIPES[of].ends]
        if not wanted:
            continue
        with kept(keep) as folder:
            try:
                verdicts = trials(model, wanted, folder)
            except Exception as error:
                verdicts = dict.fromkeys(wanted, f"model: {said(error)}")
        lines.append({"task": task, "type": name, "tied": tied, "verdicts": verdicts})
    return lines


@contextlib.contextmanager
def kept(folder: Path | None) -> Iterator[Path]:
    """Give an empty folder, which stays where one is asked for."""
    if folder is None:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder
