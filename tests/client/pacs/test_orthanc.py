"""Through a real PACS and back: the cohort is the one of the folder, by either way."""

import os
import shutil
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tomli_w

from client.cohort import Code, Cohort, CohortSettings, State, build_cohort
from client.pacs import DicomWebTable, DimseTable, Fetched, PacsRefused, Spool, fetch, open_source
from client.reports.settings import ReportSettings
from client.site import SITE_FILE, Site
from clipward.synthetic import synthesize
from tests.client.pacs.conftest import Pacs, free_port, running, wait_until

DATA = Path(__file__).parents[4] / "shared" / "data" / "dicom-hospital-ccby"
PATIENTS = 6
pytestmark = pytest.mark.slow

# What one row is, and which rows are one patient's: all that training sees, in no order.
Rows = Counter[tuple[tuple[str, bytes, bool, tuple[float, ...]], ...]]


def rows(cohort: Cohort) -> Rows:
    labels = [cohort.labels[name] for name in sorted(cohort.labels)]
    patients: dict[int, list[tuple[str, bytes, bool, tuple[float, ...]]]] = defaultdict(list)
    for row, patient in enumerate(cohort.patients.tolist()):
        values = tuple(float(column[row]) for column in labels)
        patients[patient].append(
            (cohort.texts[row], cohort.images[row].tobytes(), bool(cohort.is_test[row]), values)
        )
    return Counter(tuple(sorted(patient)) for patient in patients.values())


@dataclass(frozen=True, kw_only=True)
class Hospital:
    """A PACS, the files it took, and how a cohort is built of them or of what comes back."""

    pacs: Pacs
    files: Sequence[Path]
    settings: CohortSettings
    cohort: Cohort

    def build(self, dicom: Path, out: Path) -> Cohort:
        return build_cohort(replace(self.settings, dicom=dicom), out, workers=1)

    def fetched(self, table: DicomWebTable | DimseTable, folder: Path) -> tuple[Fetched, Cohort]:
        spool = Spool(folder / "incoming")
        result = fetch(open_source(table, spool), table, spool)
        return result, self.build(spool.folder, folder / "cohort")


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospital]:
    if not DATA.is_dir():
        pytest.skip("needs ../shared/data")
    folder = tmp_path_factory.mktemp("hospital")
    with running(folder / "pacs") as pacs:
        files = pacs.upload(path for path in sorted(DATA.rglob("*")) if path.is_file())
        (folder / "dicom").mkdir()
        for number, path in enumerate(files):
            shutil.copyfile(path, folder / "dicom" / f"{number:03}")
        settings = CohortSettings(
            dicom=folder / "dicom",
            reports=ReportSettings(tables=[DATA / "reports.csv"], hl7=[DATA / "hl7"], fhir=[DATA / "fhir"]),
            image_size=64,
            salt="s",
        )
        cohort = build_cohort(settings, folder / "cohort", workers=1)
        yield Hospital(pacs=pacs, files=files, settings=settings, cohort=cohort)


def test_the_pacs_took_what_was_made_for_it(hospital: Hospital) -> None:
    assert len(hospital.files) == 59
    assert hospital.cohort.counts[State.USED] == len(hospital.cohort) == 40


def test_dicomweb_brings_back_the_cohort_of_the_folder(hospital: Hospital, tmp_path: Path) -> None:
    result, cohort = hospital.fetched(hospital.pacs.dicomweb(connections=8), tmp_path)
    assert (result.instances, result.new, dict(result.codes)) == (59, 59, {})
    stored = {path.read_bytes() for path in hospital.files}
    assert {path.read_bytes() for path in (tmp_path / "incoming").rglob("*.dcm")} == stored
    assert rows(cohort) == rows(hospital.cohort)
    assert cohort.counts == hospital.cohort.counts
    assert cohort.codes == hospital.cohort.codes
    assert cohort.unpaired_reports == hospital.cohort.unpaired_reports


def test_c_move_brings_back_the_cohort_of_the_folder(hospital: Hospital, tmp_path: Path) -> None:
    result, cohort = hospital.fetched(hospital.pacs.dimse(connections=8), tmp_path)
    assert (result.instances, result.new, dict(result.codes)) == (59, 59, {})
    assert rows(cohort) == rows(hospital.cohort)
    assert cohort.counts == hospital.cohort.counts
    # Sent over an association, a data set without the prefix of a file gets one.
    expected = {code: count for code, count in hospital.cohort.codes.items() if code != Code.W_NO_PREFIX}
    assert cohort.codes == expected


@pytest.mark.parametrize("way", ["dicomweb", "dimse"])
def test_no_identifier_is_logged_or_becomes_a_path(
    hospital: Hospital, tmp_path: Path, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    pacs = hospital.pacs
    table = (pacs.dicomweb if way == "dicomweb" else pacs.dimse)(connections=8, modalities=["SR"])
    spool = Spool(tmp_path / "incoming")
    fetch(open_source(table, spool), table, spool)
    assert len(list(spool.folder.rglob("*.dcm"))) == 10
    assert not caplog.records
    assert {path.stem.strip("0123456789abcdef") for path in spool.folder.rglob("*")} == {""}


def test_a_killed_c_move_goes_on_where_it_was(hospital: Hospital, tmp_path: Path) -> None:
    table, spool = hospital.pacs.dimse(connections=4), Spool(tmp_path / "incoming")
    code = (
        "import sys\nfrom pathlib import Path\nfrom client.pacs import *\n"
        "table, spool = DimseTable.model_validate_json(sys.argv[1]), Spool(Path(sys.argv[2]))\n"
        "fetch(open_source(table, spool), table, spool)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, table.model_dump_json(), str(spool.folder)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    wait_until(lambda: len(list(spool.folder.rglob("*.dcm"))) >= 10, what="ten files are there")
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in spool.folder.rglob("*.dcm")}
    result = fetch(open_source(table, spool), table, spool)
    assert (result.instances, result.new, dict(result.codes)) == (59, 59 - len(before), {})
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_wrong_ae_titles_are_told_apart(hospital: Hospital, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "incoming")
    for changes, message in (
        ({"called_ae": "WRONG"}, r"is not 'WRONG'; see cohort\.dimse\.called-ae"),
        ({"calling_ae": "STRANGER", "own_port": free_port()}, r"breaks off a query of 'STRANGER'"),
    ):
        table = hospital.pacs.dimse(**changes)
        with pytest.raises(PacsRefused, match=message):
            fetch(open_source(table, spool), table, spool)


@pytest.mark.parametrize("way", ["dicomweb", "dimse"])
def test_a_site_fetches_its_own_synthetic_hospital(pacs: Pacs, tmp_path: Path, way: str) -> None:
    (folder,) = synthesize(tmp_path / "made", sites=1, patients=PATIENTS, seed=3, workers=1)
    files = sorted((folder / "dicom").rglob("*.dcm"))
    assert pacs.upload(files) == files
    site = Site.open(folder)
    reference = site.cohort()
    assert site.fetch() is None
    settings = site.settings.model_dump(by_alias=True, exclude_none=True, mode="json", exclude_unset=True)
    del settings["cohort"]["dicom"]
    table = pacs.dicomweb(connections=8) if way == "dicomweb" else pacs.dimse(connections=8)
    settings["cohort"][way] = table.model_dump(by_alias=True, exclude_none=True, mode="json")
    (folder / SITE_FILE).write_text(tomli_w.dumps(settings))
    fetching = Site.open(folder)
    result = fetching.fetch()
    assert result is not None
    assert result.instances == len(files)
    cohort = fetching.cohort()
    assert rows(cohort) == rows(reference)
    assert (cohort.counts, cohort.codes) == (reference.counts, reference.codes)
