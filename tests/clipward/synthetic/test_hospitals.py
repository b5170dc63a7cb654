"""Hospitals differ from the public collection and from each other."""

from __future__ import annotations

from dataclasses import astuple, replace

from hypothesis import given
from hypothesis import strategies as st

from clipward.synthetic.findings import FINDINGS
from clipward.synthetic.hospitals import hospital, public_collection


def test_no_two_of_twelve_hospitals_share_unit_and_style() -> None:
    places = [public_collection(), *(hospital(index) for index in range(1, 13))]
    units = [astuple(replace(place.scanner, manufacturer="", model="")) for place in places]
    assert len(set(units)) == len(units)
    pairs = {(place.scanner.manufacturer, place.style.headings, place.style.normal) for place in places}
    assert len(pairs) == len(places)


def test_four_hospitals_cover_both_polarities_several_depths_and_transfer_syntaxes() -> None:
    units = [hospital(index).scanner for index in range(1, 5)]
    assert {unit.inverted for unit in units} == {True, False}
    assert {unit.window for unit in units} == {True, False}
    assert {unit.bits_stored for unit in units} == {8, 10, 12, 14}
    assert len({unit.transfer_syntax for unit in units}) == 4
    assert any(unit.rows != unit.columns for unit in units)


@given(index=st.integers(1, 500))
def test_any_number_gives_a_usable_hospital_and_the_same_each_time(index: int) -> None:
    place = hospital(index)
    assert place == hospital(index)
    assert place.name == f"site-{index}"
    assert 190 <= place.scanner.rows <= 330
    assert 190 <= place.scanner.columns <= 330
    assert len(place.mix.weights) == len(FINDINGS)
