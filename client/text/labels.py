"""Labels from words: which findings a report states, denies or leaves open."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from client.text.context import Status, statements
from client.text.errors import FindingsFileError
from client.text.resources import every_word, fold, parse_yaml, word_list
from client.text.sections import training_text
from client.text.sentences import split_sentences
from client.text.terms import Found, Terms, check_term, words_of

VALUES: Mapping[Status, float] = {Status.ABSENT: 0.0, Status.UNCERTAIN: math.nan, Status.PRESENT: 1.0}


class Findings:
    """The findings to look for, ready for use."""

    def __init__(self, terms: Mapping[str, Sequence[str]], exceptions: Sequence[str] = ()) -> None:
        """Compile the terms of each finding, and those that mean none of them.

        Raises:
            ValueError: A term is empty, or begins or ends with a gap.
        """
        self.names = tuple(terms)
        named = [(term, frozenset({name})) for name, each in terms.items() for term in each]
        self._terms: Terms[frozenset[str]] = Terms(
            _merged([*named, *((term, frozenset()) for term in exceptions)])
        )

    def mentions(self, words: list[str]) -> list[Found[frozenset[str]]]:
        """Where a sentence names findings."""
        return [found for found in self._terms.find(words) if found.value]


def _merged(terms: Iterable[tuple[str, frozenset[str]]]) -> Iterable[tuple[str, frozenset[str]]]:
    """Terms that stand for several findings, as "hydropneumothorax" does, once."""
    merged: dict[str, frozenset[str]] = {}
    for term, names in terms:
        merged[fold(term)] = merged.get(fold(term), frozenset()) | names
    return merged.items()


def load_findings(path: Path) -> Findings:
    """Read a site's own findings, written as ``findings.yaml`` of this package is.

    Raises:
        FindingsFileError: The file is absent or holds something else; the message names the key and what to
            write there.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FindingsFileError(f"expected a UTF-8 file of findings at {path}: {error}") from error
    try:
        content = parse_yaml(text)
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", -1) + 1
        raise FindingsFileError(
            f"{path} is no YAML (line {line}): quote terms that hold : # * or ?"
        ) from error
    return _findings(content, str(path))


@cache
def default_findings() -> Findings:
    """The findings of this package: 14 of the chest, in six languages."""
    return _findings(word_list("findings.yaml"), "findings.yaml")


def label(report: str, findings: Findings | None = None, *, unmentioned: float = 0.0) -> dict[str, float]:
    """Label a report.

    1.0 where a finding is stated, whatever its age or change; 0.0 where it is denied or has gone; NaN where
    the report leaves it open ("possible", "cannot exclude", "?"), which cohorts read as "unknown" and leave
    out of every figure, as CheXpert's U-Ignore does (Irvin et al. 2019, arXiv:1901.07031, section 3). What a
    report states once counts, whatever else it says; what it doubts goes before what it denies. Indication,
    history and comparison are not read, nor what follows "history of", "rule out" and the like.

    Args:
        report: A whole report or its training text; the labels are the same.
        findings: What to look for; those of this package by default.
        unmentioned: Label of a finding that the report does not name: radiologists name what they see.

    Returns:
        A label for every finding, in the order of the file. All are NaN where there is no text to learn from.
    """
    findings = findings or default_findings()
    text = training_text(report)
    if not text:
        return dict.fromkeys(findings.names, math.nan)
    said: dict[str, Status] = {}
    for sentence in split_sentences(text):
        words = words_of(sentence)
        for names, status in statements(words, findings.mentions(words)):
            for name in names:
                said[name] = max(status, said.get(name, status))
    return {name: VALUES[said[name]] if name in said else unmentioned for name in findings.names}


def _findings(content: Any, source: str) -> Findings:
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("findings"), dict)
        or not content["findings"]
    ):
        raise FindingsFileError(
            f"expected {source} to hold the key findings, with a finding's name and terms below"
        )
    terms: dict[str, list[str]] = {}
    exceptions: list[str] = []
    for name, entry in content["findings"].items():
        key = f"findings.{name}"
        if not isinstance(entry, dict) or "terms" not in entry:
            raise FindingsFileError(f"{source}: expected {key} to hold the key terms")
        if unknown := sorted(set(entry) - {"terms", "except"}):
            raise FindingsFileError(
                f"{source}: {key} has the unknown key {unknown[0]!r}; use terms and except"
            )
        terms[name] = _term_list(entry["terms"], f"{source}: {key}.terms")
        exceptions += _term_list(entry["except"], f"{source}: {key}.except") if "except" in entry else []
    return Findings(terms, exceptions)


def _term_list(lists: Any, key: str) -> list[str]:
    if not isinstance(lists, dict) or not all(isinstance(each, list) and each for each in lists.values()):
        raise FindingsFileError(f"expected {key} to be lists of terms by language, such as {{en: [nodule*]}}")
    found = []
    for term in every_word(lists):
        if not isinstance(term, str):
            raise FindingsFileError(f"expected {key} to hold text, got {term!r}: put it in quotes")
        try:
            check_term(term)
        except ValueError as error:
            raise FindingsFileError(f"{key} holds {term!r}: {error}") from error
        found.append(term)
    return found


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How labels from words compare with labels from elsewhere, for one finding.

    Attributes:
        hits: Both say present.
        false_alarms: Numbers of the reports that only the words call present.
        misses: Numbers of the reports that only the other label calls present.
    """

    hits: int
    false_alarms: tuple[int, ...]
    misses: tuple[int, ...]

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; NaN where neither knows a case."""
        wrong = len(self.false_alarms) + len(self.misses)
        return 2 * self.hits / (2 * self.hits + wrong) if self.hits + wrong else math.nan


def agreement(
    reports: Sequence[str], truths: Sequence[Mapping[str, float]], findings: Findings | None = None
) -> dict[str, Agreement]:
    """Compare ``label`` with known labels: where they differ is where to look into the word list.

    An open label (NaN) counts as not present when the words gave it, and is left out when it is the known
    one.

    Args:
        reports: The reports.
        truths: Known labels of each report by finding; findings that only one side knows are left out.
        findings: As of ``label``.
    """
    findings = findings or default_findings()
    hits: Counter[str] = Counter()
    false_alarms: dict[str, list[int]] = {name: [] for name in findings.names}
    misses: dict[str, list[int]] = {name: [] for name in findings.names}
    compared: set[str] = set()
    for number, (report, truth) in enumerate(zip(reports, truths, strict=True)):
        labels = label(report, findings)
        for name in labels.keys() & truth.keys():
            if math.isnan(truth[name]):
                continue
            compared.add(name)
            said, known = labels[name] == 1, truth[name] >= 0.5
            hits[name] += said and known
            if said and not known:
                false_alarms[name].append(number)
            if known and not said:
                misses[name].append(number)
    return {
        name: Agreement(hits=hits[name], false_alarms=tuple(false_alarms[name]), misses=tuple(misses[name]))
        for name in findings.names
        if name in compared
    }
