"""Findings are labelled as a reader would label them, and word lists say what is wrong with them."""

import math
import time
from pathlib import Path

import numpy as np
import pytest

from client.text.errors import FindingsFileError
from client.text.labels import Findings, agreement, default_findings, label, load_findings
from clipward.synthetic.findings import FINDINGS, draw_history
from clipward.synthetic.hospitals import hospital, public_collection
from clipward.synthetic.wording import write_report

YES, NO, OPEN = 1.0, 0.0, math.nan


def said(text: str, name: str) -> float:
    return label(text)[name]


def same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("Small left pleural effusion.", "effusion", YES),
        ("No effusion or pneumothorax.", "effusion", NO),
        ("No effusion or pneumothorax.", "pneumothorax", NO),
        ("No focal consolidation, pleural effusion, or pneumothorax.", "pneumothorax", NO),
        ("There is no change in the effusion.", "effusion", YES),
        ("No significant interval change in the left effusion.", "effusion", YES),
        ("The effusion has resolved.", "effusion", NO),
        ("Resolved effusion.", "effusion", NO),
        ("Interval resolution of the right effusion.", "effusion", NO),
        ("Near complete resolution of the effusion.", "effusion", YES),
        ("The effusion has nearly resolved.", "effusion", YES),
        ("Resolving effusion.", "effusion", YES),
        ("The effusion is no longer seen.", "effusion", NO),
        ("Effusion or pneumothorax is not seen.", "effusion", NO),
        ("Effusion is seen, and pneumothorax is not seen.", "effusion", YES),
        ("No pneumothorax, but a small effusion.", "effusion", YES),
        ("No pneumothorax; effusion on the left.", "effusion", YES),
        ("No pneumothorax is seen and the effusion has grown.", "effusion", YES),
        ("No pneumothorax, small effusion.", "effusion", YES),
        ("Aside from a small effusion, no abnormality.", "effusion", YES),
        ("No abnormality aside from a small effusion.", "effusion", YES),
        ("Pleural effusion: none.", "effusion", NO),
        ("Pericardial effusion.", "effusion", NO),
        ("Blunting of the left costophrenic angle.", "effusion", YES),
        ("Possible small effusion.", "effusion", OPEN),
        ("An effusion cannot be excluded.", "effusion", OPEN),
        ("Cannot exclude a small effusion.", "effusion", OPEN),
        ("Atelectasis versus consolidation.", "consolidation", OPEN),
        ("Atelectasis versus consolidation.", "atelectasis", OPEN),
        ("Opacity which may represent pneumonia.", "opacity", YES),
        ("Opacity which may represent pneumonia.", "pneumonia", OPEN),
        ("Findings are suggestive of pneumonia.", "pneumonia", OPEN),
        ("Findings are consistent with pneumonia.", "pneumonia", YES),
        ("Infiltrate?", "consolidation", OPEN),
        ("A suspicious nodule.", "nodule", YES),
        ("No suspicious nodule.", "nodule", NO),
        ("The heart is not enlarged.", "cardiomegaly", NO),
        ("The heart is mildly enlarged.", "cardiomegaly", YES),
        ("The heart is borderline enlarged.", "cardiomegaly", OPEN),
        ("The heart is not enlarged and an effusion is seen.", "effusion", YES),
        ("Heart size is normal.", "cardiomegaly", NO),
        ("Lucency without markings along the left chest wall.", "pneumothorax", YES),
        ("History of pneumonia.", "pneumonia", NO),
        ("INDICATION: Pneumonia?\nFINDINGS: Clear.", "pneumonia", NO),
        ("FINDINGS: Possible effusion.\nIMPRESSION: Effusion.", "effusion", YES),
        ("FINDINGS: No effusion.\nIMPRESSION: Possible effusion.", "effusion", OPEN),
        ("The right catheter has been removed.", "device", NO),
        ("Endotracheal tube in place. No pneumothorax.", "device", YES),
        ("Subcutaneous emphysema.", "emphysema", NO),
        ("Hydropneumothorax.", "effusion", YES),
        ("Hydropneumothorax.", "pneumothorax", YES),
        ("Mass effect on the trachea.", "nodule", NO),
        ("Kein Erguss, kein Pneumothorax.", "effusion", NO),
        ("Geringer Pleuraerguss rechts.", "effusion", YES),
        ("Pleuraergüsse beidseits.", "effusion", YES),
        ("Ein Erguss ist nicht nachweisbar.", "effusion", NO),
        ("Kein Nachweis eines Pneumothorax.", "pneumothorax", NO),
        ("Verdacht auf Infiltrat im linken Unterlappen.", "consolidation", OPEN),
        ("Ein Infiltrat ist nicht auszuschließen.", "consolidation", OPEN),
        ("Keine wesentliche Änderung des Ergusses.", "effusion", YES),
        ("Kein Pneumothorax, jedoch Erguss links.", "effusion", YES),
        ("Das Herz ist verbreitert.", "cardiomegaly", YES),
        ("Z.n. Rippenfraktur.", "fracture", NO),
        ("Herzschrittmacher links.", "device", YES),
        ("Sin derrame pleural ni neumotórax.", "pneumothorax", NO),
        ("Derrame pleural izquierdo.", "effusion", YES),
        ("Pas d'épanchement pleural.", "effusion", NO),
        ("Épanchement pleural gauche.", "effusion", YES),
        ("Non versamento pleurico.", "effusion", NO),
        ("Versamento pleurico sinistro.", "effusion", YES),
        ("Sem derrame pleural.", "effusion", NO),
        ("Derrame pleural à esquerda.", "effusion", YES),
    ],
)
def test_findings_are_read_as_a_reader_reads_them(text: str, name: str, expected: float) -> None:
    assert same(said(text, name), expected)


def test_every_finding_has_a_label_and_the_unnamed_one_is_yours_to_choose() -> None:
    assert set(FINDINGS) <= set(label("Clear."))
    assert label("Clear.")["nodule"] == 0
    assert math.isnan(label("Clear.", unmentioned=math.nan)["nodule"])


@pytest.mark.parametrize("report", ["", "INDICATION: Effusion.", "___"])
def test_a_report_without_text_has_no_labels(report: str) -> None:
    assert all(math.isnan(value) for value in label(report).values())


def test_synthetic_reports_agree_with_their_ground_truth() -> None:
    rng = np.random.default_rng(11)
    reports, truths = [], []
    for place in (public_collection(), *(hospital(index) for index in range(1, 6))):
        for _ in range(40):
            for study in draw_history(rng, place.mix):
                reports.append(write_report(study, place.style, rng))
                present = {observation.finding for observation in study.observations}
                truths.append({finding: float(finding in present) for finding in FINDINGS})
    measured = agreement(reports, truths)
    assert set(measured) == set(FINDINGS)
    assert min(each.f1 for each in measured.values()) >= 0.95


def test_agreement_names_the_reports_that_differ() -> None:
    truths = [{"effusion": 1.0}, {"effusion": 0.0}, {"effusion": 1.0}, {"effusion": math.nan}, {"other": 1.0}]
    found = agreement(["Effusion.", "Effusion.", "No effusion.", "Effusion.", "Effusion."], truths)
    assert list(found) == ["effusion"]
    assert (found["effusion"].hits, found["effusion"].false_alarms, found["effusion"].misses) == (
        1,
        (1,),
        (2,),
    )
    assert found["effusion"].f1 == 0.5


def test_agreement_on_nothing_is_unknown() -> None:
    assert math.isnan(agreement(["Clear."], [{"effusion": 0.0}])["effusion"].f1)


def test_a_site_may_bring_its_own_findings(tmp_path: Path) -> None:
    file = tmp_path / "findings.yaml"
    file.write_text(
        "findings:\n  stone:\n    terms: {en: [stone*, 'calcul* ... kidney'], de: ['*stein*']}\n"
        "    except: {en: [stone clip]}\n"
    )
    own = load_findings(file)
    assert label("Calculus in the left kidney.", own) == {"stone": 1.0}
    assert label("No stones. A stone clip.", own) == {"stone": 0.0}
    assert label("Nierenstein rechts.", own) == {"stone": 1.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "hold the key findings"),
        ("findings: {}", "hold the key findings"),
        ("- a", "hold the key findings"),
        ("findings:\n  x: {}", r"findings\.x to hold the key terms"),
        ("findings:\n  x: [a]", r"findings\.x to hold the key terms"),
        ("findings:\n  x: {terms: [a]}", r"findings\.x\.terms to be lists of terms by language"),
        ("findings:\n  x: {terms: {en: []}}", r"findings\.x\.terms to be lists"),
        ("findings:\n  x: {terms: {en: [{a: b}]}}", r"findings\.x\.terms to hold text"),
        ("findings:\n  x: {terms: {en: ['... a']}}", r"findings\.x\.terms holds '\.\.\. a'.*only between"),
        ("findings:\n  x: {terms: {en: ['*']}}", r"findings\.x\.terms holds '\*'.*words with letters"),
        (
            "findings:\n  x: {terms: {en: [a]}, excpet: {en: [b]}}",
            "unknown key 'excpet'; use terms and except",
        ),
        ("findings:\n  x: {terms: {en: [*a]}}", r"no YAML \(line 2\): quote"),
    ],
)
def test_a_wrong_file_names_the_key_and_the_remedy(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "findings.yaml"
    file.write_text(content)
    with pytest.raises(FindingsFileError, match=message):
        load_findings(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FindingsFileError, match=r"expected a UTF-8 file of findings at .*absent\.yaml"):
        load_findings(tmp_path / "absent.yaml")


def test_a_term_of_two_findings_labels_both() -> None:
    both = Findings({"a": ["hydro*"], "b": ["hydro*"]})
    assert label("Hydrothorax.", both) == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize(
    "report",
    [
        "no " * 6_000,
        "effusion " * 6_000,
        "effusion or " * 4_000 + "not seen",
        "fluid in in in in " * 2_000,
        "a" * 20_000,
    ],
)
def test_no_report_takes_long(report: str) -> None:
    default_findings()
    started = time.process_time()
    label(report)
    assert time.process_time() - started < 10
