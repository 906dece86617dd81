"""A program for `files/limits.py` that writes the rows of the Parquet file on stdin as JSON lines, in bounded memory.

A few bytes of Parquet can claim any number of rows of any size, past all metadata, and pyarrow allocates what they
claim. Here the operating system says no. Nothing is imported from the package, so that it starts wherever pyarrow does.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapterkit.files.limits import Limits

ROWS = 64  # in memory at once
CHUNK = 1 << 20  # bytes of the file that are read at a time


def main(limits: Limits, names: str) -> None:
    """Write `{"row": …}`, or `{"bad": why}` for what JSON cannot hold, for each row, with the columns `names` of it."""
    try:
        write_rows(limits, json.loads(names))
    except MemoryError:
        say({"error": "takes too much memory to read"})
    except (OSError, ValueError) as error:
        say({"error": f"is not valid Parquet: {error}"})


def write_rows(limits: Limits, names: list[str]) -> None:
    """Write them in bounded memory, beyond what pyarrow takes for itself."""
    pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    limits.limit_memory()
    file = parquet.ParquetFile(pyarrow.PythonFile(sys.stdin.buffer, "r"), buffer_size=CHUNK)
    there = file.schema_arrow.names
    columns = [name for name in there if name in names]
    if not columns:
        say({"row": dict.fromkeys(there)})  # which shows what they are called
        return
    for batch in file.iter_batches(ROWS, columns=columns, use_threads=False):
        for at in range(len(batch)):
            try:
                [row] = batch.slice(at, 1).to_pylist()
                say({"row": row})
            except (TypeError, ValueError) as error:  # bytes or dates; text that is not UTF-8
                say({"bad": str(error)})


def say(value: dict[str, Any]) -> None:
    """Write a line of JSON."""
    sys.stdout.write(json.dumps(value) + "\n")
