"""The child process of `sandbox.py`: sets limits on itself, then runs a program on untrusted data.

`sandbox_subprocess.py PROGRAM MEMORY ARGUMENT…` calls `main(limits, *arguments)` of the file PROGRAM. Neither file
imports the package, so that the process starts fast, and wherever the package is installed.
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
    """The limits of this process; `memory` is in bytes above its use when the limit is set, 0 for no limit."""

    def __init__(self, memory: int) -> None:
        self.memory = memory

    def limit_memory(self) -> None:
        """Limit this process to `memory` bytes more than it uses now, and disable core dumps."""
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if self.memory:
            with open("/proc/self/statm", encoding="ascii") as stream:
                used = int(stream.read().split()[0]) * resource.getpagesize()
            _lower(resource.RLIMIT_AS, used + self.memory)

    def limit_time(self, seconds: int) -> None:
        """Limit this process to `seconds` more of CPU time, after which SIGXCPU kills it."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        _lower(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + seconds))

    def serve(self, answer: Callable[[dict[str, Any]], dict[str, Any]], seconds: int) -> None:
        """Answer each JSON line on stdin with one on stdout, within `seconds` of CPU time each."""
        self.limit_memory()
        for line in sys.stdin:
            self.limit_time(seconds)
            sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
            sys.stdout.flush()


def _lower(limit: int, value: int) -> None:
    """Lower a resource limit to `value`, unless a user or a cluster has already set a lower hard limit."""
    hard = resource.getrlimit(limit)[1]
    resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def main(program: str, memory: str, *arguments: str) -> None:
    """Import the file `program` and run its `main`."""
    spec = importlib.util.spec_from_file_location("program", program)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(Limits(int(memory)), *arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
