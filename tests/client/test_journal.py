"""The hospital's own log and its count of refusals; `test_app` holds them to what may not leave."""

import json
import stat
from pathlib import Path

import pytest

from client.errors import Refused
from client.journal import LOG_FILE, REFUSALS_FILE, write_note, write_refusal
from strategies.messages import RefusalCode

QUOTE = "Doe^John in /data/1.2.840"


def failure() -> Exception:
    try:
        raise ValueError(QUOTE)
    except ValueError as error:
        return error


def test_the_log_has_the_whole_cause_and_the_count_has_none_of_it(tmp_path: Path) -> None:
    write_refusal(tmp_path, "0badcafe", RefusalCode.FAILED, failure())
    write_refusal(tmp_path, "1badcafe", RefusalCode.POLICY, Refused(RefusalCode.POLICY, QUOTE, rule="parts"))
    log = (tmp_path / LOG_FILE).read_text()
    assert log.count(QUOTE) == 2
    assert "incident 0badcafe code failed\nTraceback" in log
    assert "incident 1badcafe code policy rule policy.parts\n" in log
    lines = [json.loads(line) for line in (tmp_path / REFUSALS_FILE).read_text().splitlines()]
    assert [(line["code"], line["rule"]) for line in lines] == [("failed", None), ("policy", "parts")]
    assert QUOTE not in (tmp_path / REFUSALS_FILE).read_text()


def test_only_the_owner_may_read_either(tmp_path: Path) -> None:
    write_refusal(tmp_path, "0badcafe", RefusalCode.FAILED, failure())
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


def test_a_note_is_in_the_log_and_counts_as_no_refusal(tmp_path: Path) -> None:
    write_note(tmp_path, "few patients \udcff")
    assert "note: few patients \\udcff" in (tmp_path / LOG_FILE).read_text()
    assert not (tmp_path / REFUSALS_FILE).exists()


def test_a_folder_that_cannot_be_written_is_told_without_its_path(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_note(tmp_path / QUOTE, "few patients")
    assert "a note could not be written to site.log: No such file or directory" in caplog.text
    assert "Doe" not in caplog.text
