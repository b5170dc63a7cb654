"""Whatever goes wrong at a site, a code and a number leave it; the cause stays in its own log."""

import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, RecordDict
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from client import app
from client.app import site_folder, site_folders
from client.errors import Refused
from client.journal import LOG_FILE
from privacy.errors import HistoryLost, KeyUnusable, LedgerTampered
from strategies.messages import (
    HELLO,
    TRAIN,
    Hello,
    Installed,
    Refusal,
    RefusalCode,
    Release,
    SiteFacts,
    decode,
    encode,
)
from strategies.settings import SettingsError
from tests.small_hospitals import ask, bundle, change_site, request

MARKER = "Doe^John 1.2.840.99"
HI = Hello(run="small", bundle="00")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A site whose data does not exist; enough for everything but training."""
    folder = tmp_path / f"hospital of {MARKER}"
    folder.mkdir()
    (folder / "site.toml").write_text(
        'version = 1\nname = "north"\n[cohort]\ntable = "absent.csv"\npatients-declared = 25\n'
    )
    return folder


def raising(error: Exception) -> Callable[..., Any]:
    def answer(*_: object) -> Any:
        raise error

    return answer


def refusal(folder: Path, *args: Any, **kwargs: Any) -> Refusal:
    reply = ask(folder, *args, **kwargs)
    assert not reply.has_error()
    refused = decode(reply.content)
    assert isinstance(refused, Refusal)
    return refused


def test_a_site_answers_every_exchange(hospitals: Path) -> None:
    folder = hospitals / "hospitals" / "site-1"
    kinds = [type(decode(ask(folder, asked).content)) for asked in (HI, bundle(), request())]
    assert kinds == [SiteFacts, Installed, Release]
    assert not (folder / LOG_FILE).exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError(MARKER), RefusalCode.FAILED),
        (KeyError(MARKER), RefusalCode.FAILED),
        (MemoryError(MARKER), RefusalCode.FAILED),
        (RecursionError(MARKER), RefusalCode.FAILED),
        (FileNotFoundError(2, "No such file", f"/data/{MARKER}"), RefusalCode.FAILED),
        (UnicodeDecodeError("utf-8", MARKER.encode(), 0, 1, MARKER), RefusalCode.FAILED),
        (LedgerTampered(MARKER), RefusalCode.LEDGER),
        (HistoryLost(MARKER), RefusalCode.LEDGER),
        (KeyUnusable(MARKER), RefusalCode.LEDGER),
        *((Refused(code, MARKER), code) for code in RefusalCode),
    ],
)
def test_a_failure_is_a_code_outside_and_a_cause_inside(
    error: Exception,
    code: RefusalCode,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(app, "answer_hello", raising(error))
    refused = refusal(folder, HI)
    assert (refused.site, refused.code) == ("north", code)
    log = (folder / LOG_FILE).read_text()
    assert refused.incident in log
    assert str(error) in log
    assert "Traceback" in log
    assert MARKER not in caplog.text
    assert refused.incident in caplog.text


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(), min_size=12))
@example(text="\udcff" * 12)
def test_no_text_of_an_exception_leaves(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lone surrogates too, as file names that are not UTF-8 have them."""
    monkeypatch.setattr(app, "answer_hello", raising(OSError(text)))
    reply = ask(folder, HI)
    assert text not in str(dict(reply.content["facts"])) + str(reply.metadata)
    assert decode(reply.content).model_dump().keys() == {"site", "code", "incident"}  # type: ignore[union-attr]


def test_incidents_are_told_apart_and_all_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "answer_hello", raising(ValueError(MARKER)))
    incidents = [refusal(folder, HI).incident for _ in range(3)]
    log = (folder / LOG_FILE).read_text()
    assert len(set(incidents)) == 3
    assert all(f"incident {incident} code failed" in log for incident in incidents)


def test_only_the_owner_may_read_the_log(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "answer_hello", raising(ValueError(MARKER)))
    ask(folder, HI)
    assert stat.S_IMODE((folder / LOG_FILE).stat().st_mode) == 0o600


@pytest.mark.parametrize("errno", [13, 28, 30])
def test_a_log_that_cannot_be_written_does_not_let_the_cause_out(
    errno: int, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def cannot(path: Path, *_: object) -> int:
        raise OSError(errno, os.strerror(errno), str(path))

    monkeypatch.setattr(app, "answer_hello", raising(ValueError(MARKER)))
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", cannot)
        refused = refusal(folder, HI)
    assert (refused.site, refused.code) == ("north", RefusalCode.FAILED)
    assert f"could not be written to {LOG_FILE}: {os.strerror(errno)}" in caplog.text
    assert MARKER not in caplog.text


def test_a_failure_while_failing_lets_nothing_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(app, "answer_hello", raising(ValueError(MARKER)))
    monkeypatch.setattr(app, "write_refusal", raising(RuntimeError(MARKER)))
    refused = refusal(folder, HI)
    assert (refused.site, refused.code) == ("north", RefusalCode.FAILED)
    assert f"incident {refused.incident} could not be written down: RuntimeError" in caplog.text
    monkeypatch.setattr(app, "encode", raising(TypeError("not a message")))
    reply = ask(folder, HI)
    assert reply.has_error()  # Flower's own, of a constant text: the error has no cause to quote
    assert "not a message" in caplog.text
    assert MARKER not in caplog.text


def test_a_site_whose_file_is_wrong_says_so_only_to_itself(folder: Path) -> None:
    change_site(folder, polici={"epsilon-max": 1.0})
    refused = refusal(folder, HI)
    assert (refused.site, refused.code) == ("unknown", RefusalCode.FAILED)
    assert "unknown key 'polici'; did you mean 'policy'?" in (folder / LOG_FILE).read_text()


def test_a_site_whose_folder_is_gone_still_answers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    refused = refusal(tmp_path / MARKER, HI)
    assert (refused.site, refused.code) == ("unknown", RefusalCode.FAILED)
    assert "could not be written to site.log: No such file or directory" in caplog.text
    assert MARKER not in caplog.text


@pytest.mark.parametrize(
    ("content", "action"),
    [
        (RecordDict(), HELLO),
        (RecordDict({"facts": ConfigRecord({"version": 99, "kind": "Hello", "json": "{}"})}), HELLO),
        (encode(HI), TRAIN),
        (encode(Refusal(site="x", code=RefusalCode.FAILED, incident="0")), HELLO),
    ],
    ids=["empty", "of another version", "another exchange's", "another side's"],
)
def test_a_message_that_is_none_is_refused_as_such(content: RecordDict, action: str, folder: Path) -> None:
    refused = refusal(folder, content, action=action)
    assert (refused.site, refused.code) == ("north", RefusalCode.MESSAGE)


def test_training_fails_with_the_code_of_its_cause(folder: Path) -> None:
    assert refusal(folder, request(part="full", objective="infonce")).code is RefusalCode.POLICY
    assert refusal(folder, request()).code is RefusalCode.COHORT
    assert "absent.csv" in (folder / LOG_FILE).read_text()


def context(node_config: dict[str, str | int], **run_config: str) -> Context:
    return Context(
        run_id=1, node_id=1, node_config=node_config, state=RecordDict(), run_config=dict(run_config)
    )


def test_a_deployed_node_is_the_site_its_operator_named(tmp_path: Path) -> None:
    named = context({"site": str(tmp_path), "partition-id": 3}, sites="elsewhere")
    assert site_folder(named) == tmp_path


def test_a_site_is_known_by_its_absolute_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that changes its folder must not take one site's cohort for another's."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "site.toml").touch()
    monkeypatch.chdir(tmp_path)
    assert site_folder(context({"site": "site"})) == tmp_path / "site"
    assert site_folder(context({"partition-id": 0}, sites=".")) == tmp_path / "site"


def test_simulated_nodes_take_the_sites_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("c", "a", "b", "no site"):
        (tmp_path / name).mkdir()
        if name != "no site":
            (tmp_path / name / "site.toml").touch()
    assert [folder.name for folder in site_folders(tmp_path)] == ["a", "b", "c"]
    nodes = [site_folder(context({"partition-id": number}, sites=str(tmp_path))) for number in range(3)]
    assert [folder.name for folder in nodes] == ["a", "b", "c"]
    with pytest.raises(SettingsError, match=r"node 4 of the simulation has no site.* with 3 of them"):
        site_folder(context({"partition-id": 3}, sites=str(tmp_path)))


def test_a_node_that_is_no_site_says_why_where_its_operator_looks(caplog: pytest.LogCaptureFixture) -> None:
    refused = app._refusal(None, app.UNKNOWN, SettingsError("node 4 has no site"))
    assert (refused.site, refused.code) == ("unknown", RefusalCode.FAILED)
    assert f"incident {refused.incident}: this node is no site: node 4 has no site" in caplog.text


def test_every_refusal_is_logged_as_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    refused = refusal(folder, request())
    assert [(record.levelno, record.name) for record in caplog.records] == [
        (logging.WARNING, "clipward.client.app")
    ]
    assert (
        f"north refused with code cohort; its site.log says why: incident {refused.incident}" in caplog.text
    )
