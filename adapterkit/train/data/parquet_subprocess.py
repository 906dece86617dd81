"""A sandboxed program that writes the rows of the Parquet file on stdin as JSON lines, in limited memory.

A few bytes of Parquet can claim any number of rows of any size, whatever the metadata says, and pyarrow allocates it.
Here the operating system sets the limit. The program imports nothing from the package, only pyarrow.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapterkit.files.sandbox_subprocess import Limits

ROWS = 64  # in memory at a time
CHUNK = 1 << 20  # bytes read at a time


def main(limits: Limits, names: str) -> None:
    """Write the columns `names` of each row: `{"row": …}`, or `{"bad": why}` where JSON cannot represent it."""
    try:
        write_rows(limits, json.loads(names))
    except MemoryError:
        say({"error": "takes too much memory to read"})
    except (OSError, ValueError) as error:
        say({"error": f"is not valid Parquet: {error}"})


def write_rows(limits: Limits, names: list[str]) -> None:
    """Write the rows; the memory limit does not include the memory that pyarrow takes at import."""
    pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    limits.limit_memory()
    file = parquet.ParquetFile(pyarrow.PythonFile(sys.stdin.buffer, "r"), buffer_size=CHUNK)
    existing = file.schema_arrow.names
    columns = [name for name in existing if name in names]
    if not columns:
        say({"row": dict.fromkeys(existing)})  # for the error that lists the fields
        return
    for batch in file.iter_batches(ROWS, columns=columns, use_threads=False):
        for at in range(len(batch)):
            try:
                [row] = batch.slice(at, 1).to_pylist()
                say({"row": row})
            except (TypeError, ValueError) as error:  # bytes, dates, or invalid UTF-8
                say({"bad": str(error)})


def say(value: dict[str, Any]) -> None:
    """Write a line of JSON."""
    sys.stdout.write(json.dumps(value) + "\n")
