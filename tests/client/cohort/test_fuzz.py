"""Damaged files by the thousand: none stops a build, hangs it, leaks memory or costs more than itself.

The damage is drawn from a table of mutations by number, so every day has the same cases. A case that fails is
shown as it is called: ``examine(Case(kind=..., seed=..., number=...))`` does the same again, and
``damaged(kind, seed.read_bytes(), number=number)`` gives the bytes.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path

import pytest
from pydicom.uid import JPEGLossless, JPEGLosslessSV1

from client.cohort import Code, CohortSettings, State, build_cohort
from client.cohort.outcomes import Rejected
from client.cohort.workers import Workers
from client.reports.settings import ReportSettings
from tests.client.cohort.conftest import dataset_of
from tests.client.cohort.fuzzing import Case, Verdict, examine, examine_again
from tests.client.cohort.mutations import MUTATIONS, damaged
from tests.client.cohort.seeds import write_seeds

pytestmark = pytest.mark.slow

CASES = {"dicom": 2600, "sr": 700, "hl7": 800, "fhir": 800, "csv": 500, "images": 200, "parquet": 150}
BUILT = {"dicom": 150, "sr": 40, "hl7": 40, "fhir": 40}
SECONDS_PER_FILE = 20.0  # what an undamaged file needs a hundredth of, on a machine with nothing else to do
AGAIN = 420  # cases, as many of each kind
MOST_GROWTH = 16 * 2**20  # bytes over two more times: 20 kB a file would be seen
MOST_MEMORY = 2**30  # bytes at any time: an image of as many pixels as one may have, a few times over
# GDCM is the one decoder of lossless JPEG, and ends its process on one damaged stream in some hundred.
ENDS_ITS_PROCESS = (JPEGLossless.encode(), JPEGLosslessSV1.encode())


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Sequence[Path]]:
    return write_seeds(tmp_path_factory.mktemp("seeds"))


@pytest.fixture(scope="module")
def verdicts(seeds: Mapping[str, Sequence[Path]]) -> Sequence[tuple[Case, Verdict | Rejected]]:
    """What became of every case; kinds take turns, so that a process sees them all."""
    by_kind = (cases(seeds, kind, range(count)) for kind, count in CASES.items())
    every = [case for case in chain.from_iterable(zip_longest(*by_kind)) if case is not None]
    with Workers(2, items=len(every), seconds_per_file=SECONDS_PER_FILE) as pool:
        return list(zip(every, pool.map(examine, every), strict=True))


def cases(seeds: Mapping[str, Sequence[Path]], kind: str, numbers: Iterable[int]) -> list[Case]:
    """Cases by number: every file gets every mutation before the next one has its turn."""
    files, turn = seeds[kind], len(MUTATIONS[kind])
    return [Case(kind=kind, seed=files[number // turn % len(files)], number=number) for number in numbers]


def test_nothing_happens_that_is_no_documented_outcome(
    verdicts: Sequence[tuple[Case, Verdict | Rejected]],
) -> None:
    found = [verdict for _, verdict in verdicts if isinstance(verdict, Verdict)]
    complaints = [f"{each.case}, {each.mutations}: {each.complaint}" for each in found if each.complaint]
    assert not complaints, "\n".join([f"{len(complaints)} of {len(verdicts)} cases", *complaints[:5]])


def test_nothing_ends_a_process_but_the_one_decoder_that_is_known_to(
    verdicts: Sequence[tuple[Case, Verdict | Rejected]],
) -> None:
    ended = [(case, found.code) for case, found in verdicts if isinstance(found, Rejected)]
    assert not [case for case, code in ended if code == Code.E_TIMEOUT]
    known = 0
    for case, _ in ended:
        data, _ = damaged(case.kind, case.seed.read_bytes(), number=case.number)
        assert any(uid in data for uid in ENDS_ITS_PROCESS), case
        known += 1
    assert known <= 0.002 * len(verdicts)


def test_memory_and_open_files_do_not_grow(verdicts: Sequence[tuple[Case, Verdict | Rejected]]) -> None:
    """The same files again and again: after the first time, all pools and caches have their size."""
    calm = [case for case, found in verdicts if isinstance(found, Verdict)][:AGAIN]
    with Workers(2, items=1, seconds_per_file=AGAIN * SECONDS_PER_FILE) as pool:
        (found,) = pool.map(examine_again, [calm])
    assert not isinstance(found, Rejected)
    first, *_, last = found
    assert last.held_bytes - first.held_bytes <= MOST_GROWTH
    assert last.descriptors <= first.descriptors


def test_no_file_takes_much_memory(verdicts: Sequence[tuple[Case, Verdict | Rejected]]) -> None:
    for case, found in verdicts:
        assert isinstance(found, Rejected) or found.peak_bytes <= MOST_MEMORY, case


def test_the_damage_reaches_every_state_and_spares_some(
    verdicts: Sequence[tuple[Case, Verdict | Rejected]],
) -> None:
    """A fuzzer whose files are all refused at the first byte would find nothing."""
    codes = defaultdict[str, Counter[str]](Counter)
    tried = defaultdict[str, set[str]](set)
    for case, found in verdicts:
        if isinstance(found, Verdict):
            codes[case.kind].update(found.codes)
            tried[case.kind].update(found.mutations)
    assert sum(CASES.values()) == len(verdicts) >= 5000
    assert {kind: set(MUTATIONS[kind]) for kind in CASES} == tried
    assert codes["dicom"]["Rendered"] > 0.1 * CASES["dicom"]
    for kind, used in (("sr", "Report"), ("hl7", "Report"), ("fhir", "Report"), ("csv", "Report")):
        assert codes[kind][used] > 0.1 * CASES[kind], kind
    assert {"E_UNREADABLE", "E_TRUNCATED", "E_DECODE", "E_TOO_LARGE", "E_TAG_MISSING"} <= set(codes["dicom"])


def test_a_whole_build_of_damaged_files_counts_every_one(
    seeds: Mapping[str, Sequence[Path]], tmp_path: Path
) -> None:
    """Names, pairing and packing see the damage too."""
    for kind, count in BUILT.items():
        for case in cases(seeds, kind, range(10**6, 10**6 + count)):
            data, _ = damaged(kind, case.seed.read_bytes(), number=case.number)
            path = tmp_path / ("dicom" if kind == "sr" else kind) / f"{kind}-{case.number}{case.seed.suffix}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
    dataset_of(AccessionNumber="good").save_as(tmp_path / "dicom" / "good.dcm", enforce_file_format=True)
    (tmp_path / "reports.csv").write_text("accession,report\ngood,FINDINGS: Clear.\n")
    reports = ReportSettings(
        tables=[tmp_path / "reports.csv"], hl7=[tmp_path / "hl7"], fhir=[tmp_path / "fhir"]
    )
    settings = CohortSettings(dicom=tmp_path / "dicom", reports=reports, image_size=16, salt="s")
    steps: list[tuple[int, int]] = []
    cohort = build_cohort(
        settings, tmp_path / "cohort", workers=2, on_progress=lambda *step: steps.append(step)
    )
    images = len(list((tmp_path / "dicom").iterdir()))
    assert sum(cohort.counts.values()) == images + sum(1 for each in reports.sources() for _ in each.read())
    assert steps[-1] == (2 * images, 2 * images)
    assert len(cohort) == cohort.counts[State.USED] > 0
