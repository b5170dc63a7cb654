"""Building a cohort: scan the source, pair images with texts, pack what belongs together."""

import hmac
import json
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

from client.cohort.dicom_folder import DicomFolder
from client.cohort.errors import CohortSettingsError
from client.cohort.image_table import ImageTable
from client.cohort.outcomes import Rejected
from client.cohort.pairing import Pairing
from client.cohort.settings import CohortSettings
from client.cohort.sources import Candidate, Source, stamp
from client.cohort.store import Cohort, CohortWriter, Row, locked, open_cohort, stored_fingerprint
from client.cohort.tables import read_table
from client.cohort.workers import Workers
from client.reports.index import ReportIndex
from client.reports.report import Report

PIPELINE = 2  # raised with every change of the pixels or texts that come out

logger = logging.getLogger(f"clipward.{__name__}")


def build_cohort(
    settings: CohortSettings,
    out: Path,
    *,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Cohort:
    """Build the cohort of a site in ``out``, or open it when it is there and still what it would be.

    Guarantees:
        Every input ends in exactly one state, and the counts add up to the inputs seen. An input that
        cannot be read costs that input only. A patient is either held out or not, in all their rows.
        ``out`` holds a whole cohort or none, with files that only their owner may read. Equal inputs and
        settings give equal bytes, whatever the number of workers.

    Args:
        settings: The source, and how it is packed.
        out: Folder of the cohort; a cohort of other settings or older files in it is replaced.
        workers: Processes to read with; by default one per core when there are many files, else none
            beside this one. A file that kills its decoder is survived only in a process beside this one.
        on_progress: Called with steps done and steps in all, two for each input.

    Raises:
        CohortError: A file or column is missing, or no pair is left; the message names the remedy.
    """
    source = _open_source(settings)
    if settings.dicom is not None and out.resolve().is_relative_to(settings.dicom.resolve()):
        raise CohortSettingsError(f"expected the cohort's folder {out} outside of {settings.dicom}")
    fingerprint = _fingerprint(settings, source)
    with locked(out):
        if stored_fingerprint(out) == fingerprint:
            return open_cohort(out)
    # Processes start before the lock is taken: one that runs the caller's script again, as spawned processes
    # do, would wait for it for ever.
    with Workers(workers, items=len(source)) as pool, locked(out), ReportIndex() as reports:
        if stored_fingerprint(out) == fingerprint:
            return open_cohort(out)
        with CohortWriter(out, image_size=settings.image_size, key=settings.key) as writer:
            _pack(settings, source, reports, pool, writer, _Progress(2 * len(source), on_progress))
            writer.finish(pipeline=PIPELINE, fingerprint=fingerprint, unpaired_reports=reports.unpaired)
        logger.info("packed a cohort with pipeline %d", PIPELINE)
        return open_cohort(out)


def _open_source(settings: CohortSettings) -> Source:
    if settings.dicom is not None:
        return DicomFolder(settings.dicom, without=frozenset(_reports_below(settings, settings.dicom)))
    if settings.table is not None:
        return ImageTable(settings.table, settings.where)
    raise CohortSettingsError("expected exactly one of cohort.dicom and cohort.table")


def _reports_below(settings: CohortSettings, root: Path) -> Iterator[Path]:
    """Yield the files below ``root`` that are read as tables or messages: they end in one state only."""
    below = Path(os.path.abspath(root))
    for source in settings.report_settings.sources():
        for path in map(Path, map(os.path.abspath, source.files())):
            if path.is_relative_to(below):
                yield root / path.relative_to(below)


def _pack(
    settings: CohortSettings,
    source: Source,
    reports: ReportIndex,
    pool: Workers,
    writer: CohortWriter,
    progress: "_Progress",
) -> None:
    """Send every input of the source either into the cohort or among those left out."""
    pairing = Pairing(reports=reports, labels=read_table(settings.labels) if settings.labels else None)
    for report_source in settings.report_settings.sources():
        for report in report_source.read():
            _take_report(report.name, report.outcome, reports, writer)
    found: list[tuple[str, Candidate]] = []
    for entry in source.scan(pool.map):
        if isinstance(entry.outcome, Candidate):
            found.append((entry.name, entry.outcome))
            progress.add(1)
        else:
            _take_report(entry.name, entry.outcome, reports, writer)
            progress.add(2)
    candidates: list[tuple[str, Candidate]] = []
    for name, candidate in found:  # only now: the report of an image may lie behind it in the folder
        outcome = pairing.complete(candidate)
        if isinstance(outcome, Candidate):
            candidates.append((name, outcome))
        else:
            writer.leave_out(name, outcome)
            progress.add(1)
    render = partial(source.render, size=settings.image_size)
    images = pool.map(render, [candidate.path for _, candidate in candidates])
    for (name, candidate), image in zip(candidates, images, strict=True):
        if isinstance(image, Rejected):
            writer.leave_out(name, image)
        else:
            remarks = (*candidate.remarks, *image.remarks)
            writer.add(name, _row(settings, candidate), image.pixels, remarks)
        progress.add(1)


def _take_report(name: str, outcome: Report | Rejected, reports: ReportIndex, writer: CohortWriter) -> None:
    rejected = outcome if isinstance(outcome, Rejected) else reports.add(outcome)
    if rejected is not None:
        writer.leave_out(name, rejected)
    elif isinstance(outcome, Report):
        writer.take_report(name, outcome.remarks)


def _row(settings: CohortSettings, candidate: Candidate) -> Row:
    """Put pseudonyms in the place of what names the patient, and decide on the split."""
    patient = candidate.patient
    is_test = candidate.is_test
    if is_test is None:
        # A threshold on a keyed hash: a patient keeps their side when the cohort grows.
        draw = int.from_bytes(_keyed(settings, "split", patient)[:8]) / 2**64
        is_test = draw < settings.test_fraction
    return Row(
        text=candidate.text or "",
        patient=_keyed(settings, "patient", patient).hex(),
        study=_keyed(settings, "study", patient, candidate.study).hex(),
        is_test=is_test,
        labels=candidate.labels,
    )


def _keyed(settings: CohortSettings, *parts: str) -> bytes:
    return hmac.digest(settings.key, json.dumps(parts).encode(), "sha256")


def _fingerprint(settings: CohortSettings, source: Source) -> str:
    """Return what changes when the cohort would come out differently, without reading an image."""
    digest = hmac.new(settings.key, digestmod="sha256")
    reports = settings.report_settings
    facts = [PIPELINE, settings.image_size, settings.test_fraction, sorted(settings.where.items())]
    facts.extend(reports.facts())
    labels = (stamp(path, path.name) for path in (settings.labels,) if path is not None)
    told = (line for kind in reports.sources() for line in kind.stamps())
    for line in chain([json.dumps(facts)], source.stamps(), told, labels):
        digest.update(line.encode(errors="surrogateescape") + b"\n")
    return digest.hexdigest()


class _Progress:
    def __init__(self, total: int, report: Callable[[int, int], None] | None) -> None:
        self._done, self._total, self._report = 0, total, report

    def add(self, steps: int) -> None:
        self._done += steps
        if self._report is not None:
            self._report(self._done, self._total)
