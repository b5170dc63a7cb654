"""Whoever holds a program to a bound must see it broken, and must not be scared by a library."""

import os
import sys
from pathlib import Path

from tests.memory import run_watched

MEGABYTES = 600
HOLD = f'held = b"x" * ({MEGABYTES} * 2**20); time.sleep(2)'


def test_memory_of_a_program_and_of_what_it_starts_is_counted() -> None:
    below = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {f'import time; {HOLD}'!r}])"
    for program in (f"import time; {HOLD}", below):
        found = run_watched([sys.executable, "-c", program])
        assert found.returncode == 0, found.stderr
        assert MEGABYTES < found.peak_bytes / 2**20 < MEGABYTES + 100


def test_pages_of_a_mapped_file_are_not(tmp_path: Path) -> None:
    file = tmp_path / "mapped"
    with file.open("wb") as empty:
        empty.truncate(MEGABYTES * 2**20)
    program = f"import mmap; file = open({str(file)!r}, 'rb')"
    mapped = "mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)"
    touch = "print(sum(mapped[place] for place in range(0, len(mapped), 4096)))"
    status = "print(open('/proc/self/status').read())"
    found = run_watched([sys.executable, "-c", "; ".join([program, mapped, touch, status])])
    assert found.returncode == 0, found.stderr
    resident = next(line for line in found.stdout.splitlines() if line.startswith("VmHWM"))
    assert int(resident.split()[1]) > MEGABYTES * 1024  # which is what would have been counted
    assert found.peak_bytes < 100 * 2**20


def test_a_program_says_what_it_said_and_how_it_ended() -> None:
    found = run_watched([sys.executable, "-c", "import sys; print('out'); sys.exit('err')"])
    assert (found.returncode, found.stdout, found.stderr) == (1, "out\n", "err\n")


def test_a_program_that_never_ends_is_killed() -> None:
    assert run_watched([sys.executable, "-c", "import time; time.sleep(600)"], seconds=0.5).returncode == -9


def test_the_peak_of_a_process_outlives_what_was_held() -> None:
    """In a process of its own: what others held and gave back in this one would hide it."""
    program = (
        "from tests.memory import anonymous_bytes, peak_of_this_process; before = anonymous_bytes(); "
        'held = b"x" * 2**28; del held; print(peak_of_this_process() - before)'
    )
    found = run_watched(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) >= 2**28 - 2**26
