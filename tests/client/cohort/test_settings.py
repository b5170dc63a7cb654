"""Settings that contradict themselves are refused with the remedy."""

from pathlib import Path
from typing import Any

import pytest

from client.cohort import CohortSettings, CohortSettingsError


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({}, "exactly one of cohort.dicom and cohort.table"),
        ({"dicom": Path("d"), "reports": Path("r"), "table": Path("t")}, "exactly one"),
        ({"table": Path("t"), "reports": Path("r")}, "cohort.reports only with cohort.dicom"),
        ({"dicom": Path("d"), "reports": Path("r"), "where": {"a": "b"}}, "only with cohort.table"),
        ({"table": Path("t"), "image_size": 15}, r"image_size=15 in \[16, 1024\]"),
        ({"table": Path("t"), "test_fraction": 1.0}, r"test_fraction=1.0 in \[0, 1\)"),
        ({"table": Path("t"), "test_fraction": float("nan")}, "test_fraction=nan"),
        ({"table": Path("t"), "salt": ""}, "cohort.salt"),
        ({"table": Path("t"), "salt": b""}, "cohort.salt"),
    ],
)
def test_contradictions_are_refused(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(CohortSettingsError, match=complaint):
        CohortSettings(**{"salt": "s"} | arguments)


def test_repr_shows_neither_paths_nor_salt() -> None:
    settings = CohortSettings(table=Path("/ward-7/table.csv"), where={"ward": "7"}, salt="secret")
    assert repr(settings) == "CohortSettings(source='table', image_size=224)"


def test_salt_may_be_text_or_bytes() -> None:
    text, raw = (CohortSettings(table=Path("t"), salt=salt) for salt in ("s", b"s"))
    assert text.key == raw.key == b"s"
