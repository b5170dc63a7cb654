"""Which text and labels belong to an image, whether they are the same patient's, and what is masked in it."""

from collections.abc import Callable
from dataclasses import replace

from client.cohort.outcomes import Code, RefusedError, Rejected, State
from client.cohort.sources import Candidate
from client.cohort.tables import KEYS, KeyedRows, Table, label_value
from client.reports.index import ReportIndex
from client.reports.report import Report
from client.text.labels import Findings, label
from client.text.scrub import KnownIdentifiers, scrub
from client.text.sections import parse, training_text


class Pairing:
    """The reports and labels of a site, found by the keys of an image.

    Accession number and study UID pair; patient and date never do. The report is looked up only where the
    image does not bring its own text.
    """

    def __init__(
        self,
        *,
        reports: ReportIndex,
        labels: Table | None,
        same_patient: Callable[[str], str] = str,
        findings: Findings | None = None,
        images_alone: bool = False,
    ) -> None:
        """Take the reports, which have to be complete before the first image asks, and index the labels.

        Args:
            reports: The reports.
            labels: Their labels and those of the images.
            same_patient: Maps the ids of one patient to one of them; images and reports come so.
            findings: What to label in the training texts; None: they are not read for labels.
            images_alone: Images are taken as they come, with labels and without a text.

        Raises:
            ColumnMissingError: The table of labels has no key column.
        """
        self._reports = reports
        self._labels = _Labels(labels, same_patient) if labels is not None else None
        self._findings = findings
        self._images_alone = images_alone

    def complete(self, candidate: Candidate) -> Candidate | Rejected:
        """Return the candidate with its training text, labels and patient, or why it is left out.

        Guarantees:
            The training text repeats nothing of the candidate's header, nor what names a person, a place, a
            day or a number in any text, as far as ``scrub`` finds it.
        """
        try:
            return self._complete(candidate)
        except RefusedError as refusal:
            return refusal.rejected

    def _complete(self, candidate: Candidate) -> Candidate:
        if self._images_alone:
            candidate = replace(candidate, text="")
        elif candidate.text is None:
            candidate = self._with_report(candidate)
        if self._labels is not None:
            candidate = self._labels.add_to(candidate)
        if not candidate.patient:
            raise RefusedError(State.QUARANTINED, Code.E_NO_PATIENT)
        return candidate if self._images_alone else self._with_training_text(candidate)

    def _with_report(self, candidate: Candidate) -> Candidate:
        report = self._reports.find(candidate.keys, patient=candidate.patient)
        if report is None:
            raise RefusedError(State.UNPAIRED, Code.E_NO_REPORT)
        return replace(
            candidate,
            text=report.text,
            header={**_numbers(report), **candidate.header},
            patient=candidate.patient or report.patient,
            labels={**candidate.labels, **report.labels},
            remarks=(*candidate.remarks, *report.remarks),
        )

    def _with_training_text(self, candidate: Candidate) -> Candidate:
        parsed = parse(candidate.text or "")
        scrubbed = scrub(parsed.text, KnownIdentifiers.from_header(candidate.header))
        text = training_text(scrubbed.text) if scrubbed.hits_by_kind else parsed.text
        if not text:
            raise RefusedError(State.UNPAIRED, Code.E_REPORT_EMPTY)
        return replace(
            candidate,
            text=text,
            text_rule=parsed.rule.value,
            masked=scrubbed.hits_by_kind,
            read_labels=label(text, self._findings) if self._findings is not None else {},
        )


def _numbers(report: Report) -> dict[str, str]:
    """What a report says of its study, for images whose header does not."""
    said = {
        "PatientID": report.patient,
        "AccessionNumber": report.accession,
        "StudyInstanceUID": report.study_uid,
        "StudyID": report.study_id,
    }
    return {keyword: value for keyword, value in said.items() if value}


class _Labels:
    """What a table of labels adds to the candidates."""

    def __init__(self, table: Table, same_patient: Callable[[str], str]) -> None:
        self._same_patient = same_patient
        self._keyed = KeyedRows(table)
        self._patient = table.column("patient_id")
        self._names = table.label_columns(without={self._patient, *(table.column(kind) for kind in KEYS)})

    def add_to(self, candidate: Candidate) -> Candidate:
        """Return the candidate with the labels of its row; unchanged where there is no row."""
        found = self._keyed.find(candidate.keys)
        if not found:
            return candidate
        if len(found) > 1:
            raise RefusedError(State.QUARANTINED, Code.E_REPORT_CONFLICT)
        row = self._keyed.table.rows[found[0]]
        patient = self._same_patient(row[self._patient]) if self._patient else ""
        if patient and candidate.patient and patient != candidate.patient:
            raise RefusedError(State.QUARANTINED, Code.E_PATIENT_MISMATCH)
        labels = {**candidate.labels, **{name: label_value(row[name]) for name in self._names}}
        return replace(candidate, patient=candidate.patient or patient, labels=labels)
