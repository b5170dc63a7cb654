"""An archive of a hundred thousand files: memory stays small, and a killed scan goes on."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from pydicom.uid import RLELossless, generate_uid

from client.cohort import State, open_cohort
from tests.client.cohort.conftest import dataset_of
from tests.memory import Watched, run_watched

PROJECT = str(Path(__file__).parents[3])
REAL, GENERATED, KILLED_AT = 300, 100_000, 200
MOST_MB, MOST_GROWTH_MB = 500, 60

# A folder of files, each of which is an image by its name, and behind them many that are generated. Every
# file that is opened is noted; the process kills itself at one of them.
BUILD = """
import os, signal, sys
from pathlib import Path
import numpy as np
from client.cohort import CohortSettings, build, build_cohort, dicom_folder, packing, scan_index
from client.cohort.outcomes import Rendered
from client.cohort.sources import Candidate, Entry
from tests.memory import anonymous_bytes

root, killed_at, generated = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if killed_at:
    scan_index.SECONDS_BETWEEN_COMMITS, packing._BYTES_BETWEEN_SYNCS = 0.0, 0
notes = os.open(root / "notes", os.O_CREAT | os.O_WRONLY | os.O_APPEND)

def note(what):
    os.write(notes, f"{what}\\n".encode())
    if what == killed_at:
        os.kill(os.getpid(), signal.SIGKILL)

def image(path, number, text=None):
    keys = {"accession_number": f"A{number}", "study_instance_uid": f"1.2.{number}"}
    uid = f"1.2.826.0.1.3680043.10.543.{number:039}"
    study = keys["study_instance_uid"]
    return Candidate(path=path, patient=f"P{number // 3}", study=study, keys=keys, uid=uid, text=text)

def read_header(path):
    note(f"read-{path.name}")
    return image(path, int(path.name) // 2, "Edema.")  # every second one is a duplicate

def render(path, size, ct_windows=()):
    if path.parent.name == "in":
        note(f"rendered-{path.name}")
    pixels = np.full((size, size), int(path.name) % 256, dtype=np.uint8)
    pixels[0] = 0
    return Rendered(pixels)

class Archive(dicom_folder.DicomFolder):
    def scan(self, ordered_map):
        yield from super().scan(ordered_map)
        for number in range(10**6, 10**6 + generated):
            text = f"Effusion of {number} ml." if number % 20 == 0 else None
            yield Entry(f"later/{number}", image(root / "later" / f"{number % 300}", number, text))

Archive.render = staticmethod(render)
dicom_folder.read_header, build.DicomFolder = read_header, Archive
print(anonymous_bytes())
settings = CohortSettings(dicom=root / "in", image_size=16, salt="s")
build_cohort(settings, root / "cohort", workers=1)
"""


def run(root: Path, *, killed_at: str = "", generated: int = 0) -> Watched:
    return run_watched(
        [sys.executable, "-c", BUILD, str(root), killed_at, str(generated)],
        env=os.environ | {"PYTHONPATH": PROJECT},
    )


# What a user types, on two cores: every core more has one more reading process.
COMMAND = """
import os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
from clipward.cli import main
sys.argv = ["clipward", "cohort", "build", sys.argv[1]]
main()
"""
FILES, LARGE = 300, 30


@pytest.mark.slow
def test_the_command_with_its_processes_stays_small(tmp_path: Path) -> None:
    """Among small files large ones, of a compression that is decoded whole."""
    noise = np.random.default_rng(0).integers(0, 2**12, size=(64, 64)).astype(np.uint16)
    blocks = np.kron(noise, np.ones((48, 48), dtype=np.uint16))[:2544]
    large = dataset_of(blocks, syntax=RLELossless)
    (tmp_path / "in").mkdir()
    for number in range(FILES):
        dataset = large if number < LARGE else dataset_of()
        dataset.AccessionNumber = dataset.PatientID = f"A{number}"
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        dataset.StudyInstanceUID = generate_uid()
        dataset.save_as(tmp_path / "in" / f"{number}.dcm", enforce_file_format=True)
    reports = [f"A{number},Effusion of {number} ml." for number in range(FILES)]
    (tmp_path / "reports.csv").write_text("\n".join(["accession_number,report", *reports]))
    (tmp_path / "site.toml").write_text(
        'version = 1\nname = "a"\n[cohort]\ndicom = "in"\nreports = "reports.csv"\npatients-declared = 300\n'
    )
    done = run_watched(
        [sys.executable, "-c", COMMAND, str(tmp_path)], env=os.environ | {"PYTHONPATH": PROJECT}
    )
    assert done.returncode == 0, done.stderr
    assert len(open_cohort(tmp_path / "cohort")) == FILES
    assert done.peak_bytes < MOST_MB * 2**20


@pytest.mark.slow
def test_a_killed_build_goes_on_and_memory_stays_small(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(REAL):
        (tmp_path / "in" / str(number)).touch()
    names = sorted(str(number) for number in range(REAL))
    images = [name for place, name in enumerate(names) if int(name) ^ 1 not in map(int, names[:place])]
    for killed_at in (f"read-{KILLED_AT}", f"rendered-{images[100]}"):
        assert run(tmp_path, killed_at=killed_at).returncode == -signal.SIGKILL
    done = run(tmp_path, generated=GENERATED)
    assert done.returncode == 0, done.stderr
    noted = (tmp_path / "notes").read_text().split()
    at = names.index(str(KILLED_AT))  # what it was killed at is done again, and nothing else
    assert noted == [
        *(f"read-{name}" for name in [*names[: at + 1], *names[at:]]),
        *(f"rendered-{name}" for name in [*images[:101], *images[100:]]),
    ]
    cohort = open_cohort(tmp_path / "cohort")
    assert sum(cohort.counts.values()) == REAL + GENERATED
    assert cohort.counts[State.DUPLICATE] == REAL // 2
    assert cohort.counts[State.USED] == REAL // 2 + GENERATED // 20
    assert cohort.images[: REAL // 2, 1, 1].tolist() == [int(name) % 256 for name in images]
    assert done.peak_bytes < MOST_MB * 2**20
    assert done.peak_bytes - int(done.stdout) < MOST_GROWTH_MB * 2**20
