"""A program of its own that writes the rows of the Parquet file on stdin as JSON lines, in bounded memory.

A few bytes of Parquet can claim any number of rows of any size, past all metadata, and pyarrow allocates what they
claim. Here the operating system says no. Nothing is imported from the package, so that it starts wherever pyarrow does.
"""

from __future__ import annotations

import json
import resource
import sys
from importlib import import_module
from typing import Any

ROWS = 64  # in memory at once
CHUNK = 1 << 20  # bytes of the file that are read at a time


def main(names: list[str], memory: int) -> None:
    """Write `{"row": …}`, or `{"bad": why}` for what JSON cannot hold, for each row, with the columns `names` of it.

    `memory` bytes are what may be taken beyond what pyarrow takes for itself.
    """
    pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    with open("/proc/self/statm", encoding="ascii") as stream:
        taken = int(stream.read().split()[0]) * resource.getpagesize()
    bound(resource.RLIMIT_AS, taken + memory)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
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


def bound(limit: int, most: int) -> None:
    """Lower a limit of this process, which a user or a cluster may have set lower already."""
    hard = resource.getrlimit(limit)[1]
    resource.setrlimit(limit, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def say(value: dict[str, Any]) -> None:
    """Write a line of JSON."""
    sys.stdout.write(json.dumps(value) + "\n")


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]), int(sys.argv[2]))
    except MemoryError:
        say({"error": "takes too much memory to read"})
    except (OSError, ValueError) as error:
        say({"error": f"is not valid Parquet: {error}"})
