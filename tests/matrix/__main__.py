"""Run the matrix, or a part of it.

Without TYPE: all of it, into results.json and docs/architectures.md. A run that was interrupted goes on where it
stopped, as long as neither adapterkit nor the matrix changes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from importlib.metadata import version
from pathlib import Path

from . import page
from .page import Line
from .run import prepare, run_all

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = {name: version(name) for name in ("transformers", "peft", "torch")}


def main() -> None:
    """Print the verdicts of the chosen types, or record those of all."""
    parser = argparse.ArgumentParser("python -m tests.matrix", description=__doc__)
    parser.add_argument("chosen", nargs="*", metavar="TYPE", help="a model type, TASK/TYPE or TASK")
    parser.add_argument("--recipe", action="append", help="only this recipe")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave base, adapter and output here")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
    args = parser.parse_args()
    prepare()
    from .models import registry

    types = [of for of in registry() if not args.chosen or {*of, "/".join(of)} & {*args.chosen}]
    if args.chosen:
        for lines in run_all(types, args.jobs, args.recipe, args.keep):
            show(lines)
    else:
        record(types, args.jobs)


def record(types: list[tuple[str, str]], jobs: int) -> None:
    """Run what the file of this state of the sources lacks, and write the results and the page."""
    partial = ROOT / ".cache" / f"matrix-{state()[:16]}.jsonl"
    partial.parent.mkdir(exist_ok=True)
    partial.touch()
    done = {(line["task"], line["type"]) for line in read(partial)}
    with partial.open("a", encoding="utf-8") as file:
        for lines in run_all([of for of in types if of not in done], jobs):
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            show(lines)
    order = {of: index for index, of in enumerate(types)}
    lines = sorted(read(partial), key=lambda line: order[line["task"], line["type"]])
    page.record(lines, VERSIONS)


def read(file: Path) -> list[Line]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def state() -> str:
    """Return a hash of what the results depend on."""
    digest = hashlib.sha256(repr(VERSIONS).encode())
    for folder in (ROOT / "adapterkit", Path(__file__).parent):
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def show(lines: list[Line]) -> None:
    for line in lines:
        tie = {True: "tied", False: "untied", None: ""}[line["tied"]]
        for recipe, verdict in line["verdicts"].items():
            print(f"{line['task']}/{line['type']:22} {tie:6} {recipe:10} {verdict}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
