"""Building a cohort: scan the source, pair images with texts, pack what belongs together."""

import hmac
import json
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import cache
from hashlib import sha256
from itertools import chain, tee
from pathlib import Path

from pydicom.pixels import get_decoder
from pydicom.uid import AllTransferSyntaxes

from client.cohort.dicom_folder import DicomFolder
from client.cohort.display import Window
from client.cohort.errors import CohortSettingsError
from client.cohort.facts import LAYOUT
from client.cohort.image_table import ImageTable
from client.cohort.merges import PatientMerges
from client.cohort.on_disk import CandidatesOnDisk
from client.cohort.outcomes import Code, Rejected
from client.cohort.packing import About, CohortWriter, Row, locked, restore_scan
from client.cohort.pairing import Pairing
from client.cohort.scan_index import SCAN, ScanIndex
from client.cohort.settings import CohortSettings
from client.cohort.sources import Candidate, OrderedMap, Source, stamp
from client.cohort.store import Cohort, open_cohort, stored_fingerprint
from client.cohort.tables import read_table
from client.cohort.workers import MIN_ITEMS, Workers
from client.reports.index import ReportIndex
from client.reports.report import Report
from client.text.errors import FindingsFileError
from client.text.labels import Findings, default_findings, load_findings

PIPELINE = 5  # raised with every change of the pixels or texts that come out

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
        settings give equal bytes, whatever the number of workers, and whether an earlier build was finished,
        killed or never begun. A build goes on where a killed one has stopped, and reads only files that have
        changed since the last one; memory is some hundred bytes an input.

    Args:
        settings: The source, and how it is packed.
        out: Folder of the cohort; a cohort of other settings or older files in it is replaced.
        workers: Processes to read with; by default one per core when there are many files, one beside this
            one when a few need a decoder, else this one alone, as with 1. A file that kills or hangs its
            decoder is survived only in a process beside this one.
        on_progress: Called with steps done and steps in all, two for each input.

    Raises:
        CohortError: A file or column is missing, no pair is left, or too many inputs fail; the message names
            the remedy.
    """
    source = _open_source(settings)
    if settings.dicom is not None and out.resolve().is_relative_to(settings.dicom.resolve()):
        raise CohortSettingsError(f"expected the cohort's folder {out} outside of {settings.dicom}")
    fingerprint = _fingerprint(settings, source)
    with locked(out):
        if stored_fingerprint(out) == fingerprint:
            return open_cohort(out)
    with ExitStack() as stack:
        # Processes start before the lock is taken: one that runs the caller's script again, as spawned
        # processes do, would wait for it for ever.
        pool = stack.enter_context(
            Workers(
                workers,
                items=len(source),
                apart=workers is None and len(source) < MIN_ITEMS and source.may_end_process(),
                seconds_per_file=settings.seconds_per_file,
            )
        )
        stack.enter_context(locked(out))
        if stored_fingerprint(out) == fingerprint:
            return open_cohort(out)
        restore_scan(out)
        with CohortWriter(out, image_shape=settings.image_shape, key=settings.key) as writer:
            progress = _Progress(2 * len(source), on_progress)
            with ScanIndex(out / SCAN, root=_root(settings)) as index:
                about = _pack(settings, fingerprint, source, pool.map, index, writer, progress)
                index.forget_the_rest()
            writer.finish(about, max_failure_share=settings.max_failure_share)
        logger.info("packed a cohort with pipeline %d", PIPELINE)
        return open_cohort(out)


def _open_source(settings: CohortSettings) -> Source:
    if settings.dicom is not None:
        return DicomFolder(
            settings.dicom,
            without=frozenset(_reports_below(settings, settings.dicom)),
            ct_windows=tuple(Window(centre, width) for centre, width in settings.ct_windows),
        )
    if settings.table is not None:
        return ImageTable(settings.table, settings.where, settings.modality)
    raise CohortSettingsError("expected exactly one of cohort.dicom and cohort.table")


def _root(settings: CohortSettings) -> Path:
    return settings.dicom or (settings.table or Path()).parent


def _reports_below(settings: CohortSettings, root: Path) -> Iterator[Path]:
    """Yield the files below ``root`` that are read as tables or messages: they end in one state only."""
    below = Path(os.path.abspath(root))
    for source in settings.report_settings.sources():
        for path in map(Path, map(os.path.abspath, source.files())):
            if path.is_relative_to(below):
                yield root / path.relative_to(below)


def _pack(
    settings: CohortSettings,
    fingerprint: str,
    source: Source,
    ordered_map: OrderedMap,
    index: ScanIndex,
    writer: CohortWriter,
    progress: "_Progress",
) -> About:
    """Send every input of the source either into the cohort or among those left out."""
    same_patient = PatientMerges.read(settings.merge)
    labels = read_table(settings.labels) if settings.labels else None
    findings = _findings(settings)
    with ReportIndex() as reports, CandidatesOnDisk() as candidates:
        for kind in settings.report_settings.sources():
            for report in kind.read():
                _take_report(report.name, report.outcome, same_patient, reports, writer)
        for entry in source.scan(index.headers(ordered_map, rules=_header_rules(settings))):
            if isinstance(entry.outcome, Candidate):
                patient = same_patient(entry.outcome.patient)
                candidates.append(entry.name, replace(entry.outcome, patient=patient))
                progress.add(1)
            else:
                _take_report(entry.name, entry.outcome, same_patient, reports, writer)
                progress.add(2)
        pairing = Pairing(
            reports=reports,
            labels=labels,
            same_patient=same_patient,
            findings=findings,
            images_alone=settings.modality == "images",
        )
        # Only now: the report of an image may lie behind it in the folder.
        pairs, to_render = tee(_pairs(candidates, pairing, writer, progress))
        displays = index.displays(
            ordered_map, rules=_display_rules(settings), packed=writer.packed, secret=settings.key
        )
        render = source.renderer(settings.image_size)
        images = displays(render, (candidate.path for _, candidate in to_render))
        for (name, candidate), image in zip(pairs, images, strict=True):
            if isinstance(image, Rejected):
                writer.leave_out(name, image)
            else:
                row, remarks = _row(settings, candidate, candidates.sides(candidate.patient))
                writer.add(name, row, image.pixels, (*remarks, *image.remarks), image.key)
            progress.add(1)
        return About(
            pipeline=PIPELINE,
            rules=sha256(_rules(settings).encode()).hexdigest(),
            fingerprint=fingerprint,
            unpaired_reports=reports.unpaired,
            unknown_merges=same_patient.unknown,
        )


def _take_report(
    name: str,
    outcome: Report | Rejected,
    same_patient: PatientMerges,
    reports: ReportIndex,
    writer: CohortWriter,
) -> None:
    if isinstance(outcome, Report):
        outcome = replace(outcome, patient=same_patient(outcome.patient))
    rejected = outcome if isinstance(outcome, Rejected) else reports.add(outcome)
    if rejected is not None:
        writer.leave_out(name, rejected)
    elif isinstance(outcome, Report):
        writer.take_report(name, outcome.remarks)


def _pairs(
    candidates: CandidatesOnDisk, pairing: Pairing, writer: CohortWriter, progress: "_Progress"
) -> Iterator[tuple[str, Candidate]]:
    """Yield the images to which a text belongs, and leave out the others."""
    for name, candidate in candidates:
        outcome = pairing.complete(candidate)
        if isinstance(outcome, Candidate):
            yield name, outcome
        else:
            writer.leave_out(name, outcome)
            progress.add(1)


def _row(
    settings: CohortSettings, candidate: Candidate, sides: Collection[bool]
) -> tuple[Row, Sequence[Code]]:
    """Put pseudonyms in the place of what names the patient, and decide on the split.

    Args:
        settings: The salt, and the share of patients held out.
        candidate: The image with its text.
        sides: Where the source has images of this patient, under any id.
    """
    patient, remarks = candidate.patient, candidate.remarks
    if len(sides) > 1:
        remarks = (*remarks, Code.W_SPLIT_CONFLICT)
    if sides:
        is_test = False not in sides
    else:
        # A threshold on a keyed hash: a patient keeps their side when the cohort grows.
        draw = int.from_bytes(_keyed(settings, "split", patient)[:8]) / 2**64
        is_test = draw < settings.test_fraction
    row = Row(
        text=candidate.text or "",
        text_rule=candidate.text_rule,
        masked=candidate.masked,
        patient=_keyed(settings, "patient", patient),
        study=_keyed(settings, "study", patient, candidate.study),
        is_test=is_test,
        labels=candidate.labels,
        read_labels=candidate.read_labels,
    )
    return row, remarks


def _findings(settings: CohortSettings) -> Findings | None:
    """Return what the texts are read for, None where they are not."""
    if not settings.label_reports:
        return None
    try:
        return load_findings(settings.findings) if settings.findings else default_findings()
    except FindingsFileError as error:
        raise CohortSettingsError(f"cohort.findings: {error}") from error


def _keyed(settings: CohortSettings, *parts: str) -> bytes:
    return hmac.digest(settings.key, json.dumps(parts).encode(), "sha256")


def _fingerprint(settings: CohortSettings, source: Source) -> str:
    """Return what changes when the cohort would come out differently, without reading an image."""
    digest = hmac.new(settings.key, digestmod="sha256")
    limits = json.dumps([settings.seconds_per_file, settings.max_failure_share])
    beside = (settings.labels, settings.findings, settings.merge)
    tables = (stamp(path, path.name) for path in beside if path is not None)
    told = (line for kind in settings.report_settings.sources() for line in kind.stamps())
    for line in chain([_rules(settings), limits], source.stamps(), told, tables):
        digest.update(line.encode(errors="surrogateescape") + b"\n")
    return digest.hexdigest()


def _rules(settings: CohortSettings) -> str:
    """Return all that decides on the content beside the files and the salt."""
    chosen = [settings.test_fraction, sorted(settings.where.items()), settings.label_reports]
    chosen += settings.report_settings.facts()
    chosen += [settings.modality] if settings.modality != "pairs" else []  # before there was a choice
    return json.dumps([_header_rules(settings), _display_rules(settings), chosen])


def _header_rules(settings: CohortSettings) -> str:
    return json.dumps([PIPELINE, LAYOUT, bool(settings.ct_windows)])


def _display_rules(settings: CohortSettings) -> str:
    channels = settings.image_shape[2:]  # none where images are grey, whose rules are those of before
    return json.dumps([PIPELINE, settings.image_size, settings.ct_windows, _decoders(), *channels])


@cache
def _decoders() -> Mapping[str, Sequence[str]]:
    """Return what is installed to decode each transfer syntax: another decoder may give other pixels."""
    found: dict[str, Sequence[str]] = {}
    for syntax in AllTransferSyntaxes:
        with suppress(NotImplementedError):  # pydicom has no decoder for it at all, as for video
            found[syntax] = get_decoder(syntax).available_plugins
    return found


class _Progress:
    def __init__(self, total: int, report: Callable[[int, int], None] | None) -> None:
        self._done, self._total, self._report = 0, total, report

    def add(self, steps: int) -> None:
        self._done += steps
        if self._report is not None:
            self._report(self._done, self._total)
