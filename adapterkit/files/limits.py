"""The limits of a process that runs a program on strangers' data, which that process sets itself.

As a program, `limits.py PROGRAM MEMORY ARGUMENT…` calls `main(limits, *arguments)` of the file PROGRAM. Neither imports
anything of the package, so that they start at once, wherever the package was imported from.
"""

from __future__ import annotations

import importlib.util
import json
import math
import resource
import sys
from collections.abc import Callable
from typing import Any


class Limits:
    """What a program may take; `memory` is in bytes beyond those that it has when it says so, 0 for no limit."""

    def __init__(self, memory: int) -> None:
        self.memory = memory

    def limit_memory(self) -> None:
        """Let this process take `memory` bytes more than it has, and leave no core dump where it ends of it."""
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if self.memory:
            with open("/proc/self/statm", encoding="ascii") as stream:
                taken = int(stream.read().split()[0]) * resource.getpagesize()
            _lower(resource.RLIMIT_AS, taken + self.memory)

    def limit_time(self, seconds: int) -> None:
        """Let this process take `seconds` more of processor time; then SIGXCPU ends it."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        _lower(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + seconds))

    def serve(self, answer: Callable[[dict[str, Any]], dict[str, Any]], seconds: int) -> None:
        """Answer each line of JSON on stdin by one on stdout, for which there are `seconds` of processor time."""
        self.limit_memory()
        for line in sys.stdin:
            self.limit_time(seconds)
            sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
            sys.stdout.flush()


def _lower(limit: int, most: int) -> None:
    """Lower a limit of this process, which a user or a cluster may have set lower already."""
    hard = resource.getrlimit(limit)[1]
    resource.setrlimit(limit, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def main(program: str, memory: str, *arguments: str) -> None:
    """Run a program with its limits."""
    spec = importlib.util.spec_from_file_location("program", program)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(Limits(int(memory)), *arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
