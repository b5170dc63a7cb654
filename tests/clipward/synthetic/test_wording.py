"""Reports say what is there, deny what is not, and stay inside the announced vocabulary."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipward.synthetic import all_wording
from clipward.synthetic.findings import FINDINGS, CaseMix, Observation, Study, draw_history
from clipward.synthetic.hospitals import hospital, public_collection
from clipward.synthetic.wording import HOSPITAL_STYLES, PHRASES, PUBLIC_STYLE, Style, words_of, write_report

STYLES = (PUBLIC_STYLE, *HOSPITAL_STYLES)
EVEN = CaseMix(normal=0.4, weights=(1.0,) * len(FINDINGS))
VOCABULARY = frozenset(word for sentence in all_wording() for word in words_of(sentence))


def sections(report: str) -> dict[str, str]:
    parts = re.split(r"(?im)^(findings|impression):$", report)
    return {parts[i].lower(): " ".join(parts[i + 1].split()) for i in range(1, len(parts), 2)}


def reports(style: Style, patients: int) -> list[tuple[Study, str]]:
    written = []
    for patient in range(patients):
        rng = np.random.default_rng([2, patient])
        written += [(study, write_report(study, style, rng)) for study in draw_history(rng, EVEN)]
    return written


@given(seed=st.integers(0, 2**32 - 1), style=st.sampled_from(STYLES))
def test_every_word_of_every_report_is_in_all_wording(seed: int, style: Style) -> None:
    rng = np.random.default_rng(seed)
    for study in draw_history(rng, replace(EVEN, normal=0.0)):
        assert set(words_of(write_report(study, style, rng))) <= VOCABULARY


def test_all_wording_is_the_same_each_time_and_each_sentence_adds_a_word() -> None:
    sentences = all_wording()
    assert sentences == all_wording()
    seen: set[str] = set()
    for sentence in sentences:
        assert set(words_of(sentence)) - seen
        seen |= set(words_of(sentence))


@given(seed=st.integers(0, 2**32 - 1), style=st.sampled_from(STYLES))
def test_the_impression_names_each_finding_with_side_and_grade(seed: int, style: Style) -> None:
    rng = np.random.default_rng(seed)
    for study in draw_history(rng, replace(EVEN, normal=0.0)):
        impression = sections(write_report(study, style, rng))["impression"].lower()
        for observation in study.observations:
            side = "both" if observation.side == "bilateral" else observation.side
            assert side in impression or observation.side in impression
            grade = observation.size or observation.severity
            assert style.words.get(grade, grade) in impression


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("finding", FINDINGS)
def test_what_is_present_is_never_denied(style: Style, finding: str) -> None:
    study = Study(
        observations=(Observation(finding=finding, side="left", zone="mid", size="small", severity="mild"),)
    )
    if finding == "device":
        study = Study(observations=(Observation(finding=finding, side="left", kind="catheter"),))
    name = style.absent.get(finding, finding)
    denied = re.compile(
        rf"\b(no|absence of|not|excluded)\b[^.]*\b{name}\b|\b{name}\b[^.]*\b(not seen|excluded)", re.I
    )
    for seed in range(40):
        findings = sections(write_report(study, style, np.random.default_rng(seed)))["findings"]
        assert not denied.search(findings)


@pytest.mark.parametrize("style", STYLES)
def test_an_article_never_stands_before_a_vowel_or_a_plural(style: Style) -> None:
    for _, report in reports(style, 150):
        assert not re.search(r"\ba [aeiou]", report)
        assert not re.search(r"\ba (\w+ )*effusions", report)
        assert not re.search(r"[{}]|  \w+:", report)


@pytest.mark.parametrize("style", HOSPITAL_STYLES)
def test_abnormal_impressions_tell_studies_apart_and_stay_short(style: Style) -> None:
    written = reports(style, 300)
    impressions = [sections(report)["impression"] for study, report in written if study.observations]
    assert len(set(impressions)) > 0.6 * len(impressions)
    assert np.quantile([len(text.split()) for text in impressions], 0.9) <= 25
    assert np.quantile([len(sections(report)["findings"].split()) for _, report in written], 0.95) <= 60


def test_the_public_set_knows_one_wording_per_finding_and_hospitals_share_others() -> None:
    assert set(PUBLIC_STYLE.phrases) == {0}
    for style in HOSPITAL_STYLES:
        own = set(style.phrases) - {0}
        assert len(own) >= 2
        assert any(own & set(other.phrases) for other in HOSPITAL_STYLES if other is not style)
        assert max(own) < min(map(len, PHRASES.values()))


def test_hospitals_say_many_words_that_the_public_set_never_says() -> None:
    public = {word for _, report in reports(public_collection().style, 200) for word in words_of(report)}
    for index in range(1, 6):
        own = {word for _, report in reports(hospital(index).style, 200) for word in words_of(report)}
        assert len(own - public) > 0.4 * len(own)
        assert len(own & public) > 0.2 * len(own)
