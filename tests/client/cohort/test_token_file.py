"""Token ids lie in their file as they were cut, and a damaged file says so."""

from pathlib import Path

import numpy as np
import pytest

from client.cohort.token_file import _ROWS, MappedTokens, write_tokens
from client.text.tokens import pieces_of, rules_of, shipped_pipeline

TEXTS = ["Clear lungs.", "", *(f"Effusion of {number} ml." for number in range(2 * _ROWS))]


def written(path: Path, texts: list[str]) -> MappedTokens:
    with path.open("wb") as file:
        write_tokens(file, texts, facts={"identity": "a"})
    return MappedTokens.open(path)


def test_every_text_has_its_pieces_by_number(tmp_path: Path) -> None:
    tokens = written(tmp_path / "t", TEXTS)
    assert len(tokens) == len(TEXTS)
    for number, pieces in enumerate(pieces_of(TEXTS)):
        np.testing.assert_array_equal(tokens[number], pieces)
    assert tokens[0].dtype == np.int32
    assert not tokens[0].flags.writeable
    assert tokens.facts["identity"] == "a"
    assert tokens.rules == rules_of(shipped_pipeline())


@pytest.mark.parametrize("texts", [[], [""]])
def test_nothing_is_written_too(texts: list[str], tmp_path: Path) -> None:
    assert len(written(tmp_path / "t", texts)) == len(texts)


@pytest.mark.parametrize("keep", [0, 40, -200])
def test_damage_is_said(keep: int, tmp_path: Path) -> None:
    written(tmp_path / "t", TEXTS)
    (tmp_path / "t").write_bytes((tmp_path / "t").read_bytes()[:keep])
    with pytest.raises((ValueError, OSError)):
        MappedTokens.open(tmp_path / "t")
