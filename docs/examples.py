"""Run the examples of the README and of docs/, and compare what they print: `python docs/examples.py [PAGE]…`.

The commands after `$` in the `console` blocks of a page run in one shell, in a folder of their own that has `.cache`,
`fixtures` and `demo`; then its `pycon` blocks run as one doctest. A line `…` stands for any lines. Numbers with a
decimal point or a unit may differ, since they depend on the machine; everything else has to be the same. --write puts
what is printed now into the pages instead. A page marked HUB talks to the Hub of the tests, on this machine.
"""

from __future__ import annotations

import argparse
import doctest
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PYCON = re.compile(r"^```pycon\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"^\$ (?:.*\\\n)*.*\n", re.MULTILINE)
VARIES = re.compile(r"\b\d[\d,]*\.\d+(e[+-]?\d+)?|\b\d[\d,]*(?= ?(?:[kMG]?B|s|ms|min|tokens/s)\b)|\b[0-9a-f]{10,64}\b")
ANY = "…\n"
HUB = "<!-- Hub of the tests -->"


def main() -> None:
    """Check the pages, or write them, and end with 1 if one is not as it prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, help="default: README.md and all of docs/")
    parser.add_argument("--write", action="store_true", help="put what the commands print into the pages")
    args = parser.parse_args()
    wrong = [page for page in args.pages or pages() if not check(page, args.write)]
    if wrong:
        raise SystemExit(f"{len(wrong)} pages print something else: look, then docs/examples.py --write")


def pages() -> list[Path]:
    """The README and all pages."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def check(page: Path, write: bool) -> bool:
    """Run a page, and compare it with what it printed or write that into it."""
    text = page.read_text(encoding="utf-8")
    commands = [command for block in BLOCK.findall(text) for command, _ in examples(block)]
    if not commands and not PYCON.search(text):
        return True
    print(f"{page.name}: {len(commands)} commands", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder, hub(Path(folder)) if HUB in text else nullcontext({}) as env:
        printed = iter(run(commands, Path(folder), env))
        now = BLOCK.sub(lambda block: f"```console\n{replayed(block[1], printed)}```", text)
        tested = passes("\n".join(PYCON.findall(text)), page, Path(folder), env)
    if write:
        page.write_text(now, encoding="utf-8")
        return tested
    for before, after in zip(text.splitlines(), now.splitlines(), strict=False):
        if before != after:
            print(f"{page.name}: has\n  {before}\nbut it is now\n  {after}", file=sys.stderr)
            return False
    return tested and text == now


def examples(block: str) -> Iterator[tuple[str, str]]:
    """The commands of a block, each with the output below it."""
    starts = [*COMMAND.finditer(block)]
    for found, after in zip(starts, [*starts[1:], None], strict=True):
        yield found[0], block[found.end() : after.start() if after else len(block)]


def replayed(block: str, printed: Iterator[str]) -> str:
    """The block with what its commands printed; output that is as expected stays as it stands."""
    parts = []
    for command, expected in examples(block):
        output = next(printed)
        parts.append(command + (expected if same(expected, output) else abridged(expected, output)))
    return "".join(parts)


def same(expected: str, output: str) -> bool:
    """Whether the output is as expected: any lines for `…`, any number where numbers vary, any alignment."""
    pattern = re.escape(plain(expected)).replace(re.escape(ANY), "(?:.*\n)*")
    return re.fullmatch(pattern, plain(output)) is not None


def plain(text: str) -> str:
    """Text without what varies from machine to machine."""
    return "".join(f"{' '.join(VARIES.sub('#', line).split())}\n" for line in text.splitlines())


def abridged(expected: str, output: str) -> str:
    """The output with as many lines before and after a `…` as were expected."""
    if expected.count(ANY) != 1:
        return output
    before, after = (part.count("\n") for part in expected.split(ANY))
    lines = output.splitlines(keepends=True)
    return "".join([*lines[:before], ANY, *(lines[-after:] if after else [])])


def run(commands: list[str], folder: Path, env: dict[str, str]) -> list[str]:
    """What each command prints, on both streams, in one shell."""
    for name in (".cache", "fixtures", "demo"):
        (folder / name).symlink_to(ROOT / name)
    bin_folder = folder / ".bin"
    bin_folder.mkdir()
    for name, words in {"adapterkit": "-m adapterkit", "python": ""}.items():
        (bin_folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (bin_folder / name).chmod(0o755)
    mark = "=== the end of a command ==="
    script = "".join(f"{command[2:]}code=$?; echo '{mark}'; (exit $code)\n" for command in commands)
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment(folder) | env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    outputs = done.stdout.replace(env.get("HF_ENDPOINT", "\0"), "https://huggingface.co").split(f"{mark}\n")
    return [text if text.endswith("\n") or not text else f"{text}\n" for text in outputs[: len(commands)]]


def passes(session: str, page: Path, folder: Path, env: dict[str, str]) -> bool:
    """Whether the Python of a page prints what it says, in a process of its own."""
    if not session:
        return True
    script = folder / "session.txt"
    script.write_text(session, encoding="utf-8")
    flags = ["-o", "ELLIPSIS", "-o", "NORMALIZE_WHITESPACE"]
    command = [sys.executable, "-m", doctest.__name__, *flags, str(script)]
    done = subprocess.run(
        command, cwd=folder, env=environment(folder) | env, text=True, capture_output=True, check=False
    )
    if done.returncode:
        print(f"{page.name}: {done.stdout}{done.stderr}", file=sys.stderr)
    return done.returncode == 0


def environment(folder: Path) -> dict[str, str]:
    """No Hub, no cache and no token of this machine; as wide as a page."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "ADAPTERKIT_"))}
    path = os.pathsep.join([str(folder / ".bin"), os.environ["PATH"]])
    return environment | {
        "PATH": path, "PYTHONPATH": str(ROOT), "HF_HOME": str(folder / ".hf"), "XDG_CACHE_HOME": str(folder / ".xdg"),
        "HF_HUB_OFFLINE": "1", "COLUMNS": "100", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


@contextmanager
def hub(folder: Path) -> Iterator[dict[str, str]]:
    """The Hub of the tests with the fixtures on it, and the environment that leads there."""
    sys.path.insert(0, str(ROOT / "tests"))
    import hubserver

    fixtures, base = ROOT / "fixtures", "HuggingFaceTB/SmolLM2-135M-Instruct"
    repos = {
        "someone/smollm2-wikisql": (fixtures / "smollm2-wikisql", base, 1204),
        "someone/tiny-dora": (fixtures / "tiny-dora", "someone/tiny-llama", 87),
        "someone/tiny-llama": (fixtures / "bases" / "tiny-llama", "", 12),
        base: (ROOT / ".cache" / "SmolLM2-135M-Instruct", "", 250_000),
    }
    with hubserver.serving() as server:
        for name, (source, card_base, downloads) in repos.items():
            files = {file.name: file.read_bytes() for file in sorted(source.iterdir())}
            if card_base:
                files["README.md"] = f"---\nbase_model: {card_base}\nlibrary_name: peft\n---\n".encode()
            server.add(name, files, downloads=downloads)
        yield {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_writer", "HF_HUB_DISABLE_XET": "1"}


if __name__ == "__main__":
    main()
