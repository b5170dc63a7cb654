"""Which text and labels belong to an image, and whether they are the same patient's."""

from dataclasses import replace

from client.cohort.outcomes import Code, RefusedError, Rejected, State
from client.cohort.sources import Candidate
from client.cohort.tables import KEYS, KeyedRows, Table, label_value
from client.text.sections import training_text


class Pairing:
    """The reports and labels of a site, found by the keys of an image.

    Accession number and study UID pair; patient and date never do. The report is looked up only where the
    image does not bring its own text.
    """

    def __init__(self, *, reports: Table | None, labels: Table | None) -> None:
        """Index the tables.

        Raises:
            ColumnMissingError: A table has no key column, or the reports no column of texts.
        """
        self._reports = _Rows(reports, "report") if reports is not None else None
        self._labels = _Rows(labels) if labels is not None else None

    @property
    def unpaired_reports(self) -> int:
        """How many report rows no image has asked for, those replaced by a later row included."""
        if self._reports is None:
            return 0
        return len(self._reports.keyed.table.rows) - len(self._reports.asked)

    def complete(self, candidate: Candidate) -> Candidate | Rejected:
        """Return the candidate with its training text, labels and patient, or why it is left out."""
        try:
            return self._complete(candidate)
        except RefusedError as refusal:
            return refusal.rejected

    def _complete(self, candidate: Candidate) -> Candidate:
        if self._reports is not None and candidate.text is None:
            candidate = self._reports.add_to(candidate)
        if candidate.text is None:
            raise RefusedError(State.UNPAIRED, Code.E_NO_REPORT)
        if self._labels is not None:
            candidate = self._labels.add_to(candidate)
        if not candidate.patient:
            raise RefusedError(State.QUARANTINED, Code.E_NO_PATIENT)
        text = training_text(candidate.text or "")
        if not text:
            raise RefusedError(State.UNPAIRED, Code.E_REPORT_EMPTY)
        return replace(candidate, text=text)


class _Rows:
    """One table's contribution to the candidates."""

    def __init__(self, table: Table, text: str | None = None) -> None:
        self.keyed = KeyedRows(table)
        self.asked: set[int] = set()
        self._text = table.need(text) if text else None
        self._patient = table.column("patient_id")
        taken = {self._text, self._patient, *(table.column(kind) for kind in KEYS)}
        self._labels = table.label_columns(without=taken)

    def add_to(self, candidate: Candidate) -> Candidate:
        """Return the candidate with what its row says; unchanged where there is no row."""
        found = self.keyed.find(candidate.keys)
        self.asked.update(found)
        if not found:
            return candidate
        if len(found) > 1:
            raise RefusedError(State.QUARANTINED, Code.E_REPORT_CONFLICT)
        row = self.keyed.table.rows[found[0]]
        patient = row[self._patient] if self._patient else ""
        if patient and candidate.patient and patient != candidate.patient:
            raise RefusedError(State.QUARANTINED, Code.E_PATIENT_MISMATCH)
        return replace(
            candidate,
            text=row[self._text] if self._text else candidate.text,
            patient=candidate.patient or patient,
            labels={**candidate.labels, **{name: label_value(row[name]) for name in self._labels}},
        )
