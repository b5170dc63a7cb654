"""What a program and all that it starts take of the machine's memory, seen from outside.

Counted is anonymous memory: the program's own data. Resident memory counts the pages of libraries and mapped
files too, and how many of those lie in memory is the machine's business: a hundred megabytes more on one than
on another, for the same program. ``ru_maxrss`` even begins with the most that its parent had.
"""

import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.processes import tree

SAMPLED_EVERY_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A program that has ended.

    Attributes:
        returncode: As of ``subprocess.Popen``.
        stdout: What it said.
        stderr: What it complained of.
        peak_bytes: The most anonymous memory that it and all below it had in one sample.
    """

    returncode: int
    stdout: str
    stderr: str
    peak_bytes: int


def run_watched(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, seconds: float = 300
) -> Watched:
    """Run a program to its end, or kill it after so many seconds."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        with subprocess.Popen(command, stdout=out, stderr=err, env=env) as process:
            peak, ends = 0, time.monotonic() + seconds
            while process.poll() is None:
                peak = max(peak, sum(map(anonymous_bytes, tree(process.pid))))
                if time.monotonic() > ends:
                    process.kill()
                time.sleep(SAMPLED_EVERY_SECONDS)
        out.seek(0)
        err.seek(0)
        return Watched(returncode=process.returncode, stdout=out.read(), stderr=err.read(), peak_bytes=peak)


def anonymous_bytes(process: int | str = "self") -> int:
    """Anonymous memory of one process now, 0 when it is gone."""
    return _status(process).get("RssAnon", 0)


def peak_of_this_process() -> int:
    """The most memory this process ever had, without the pages that are mapped from files now."""
    status = _status("self")
    return status["VmHWM"] - status["RssFile"]


def _status(process: int | str) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.partition(":") for line in lines if line.endswith(" kB"))
    return {name: 1024 * int(value.split()[0]) for name, _, value in fields}
