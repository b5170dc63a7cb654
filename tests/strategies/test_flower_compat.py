"""One contract test per private name of Flower's that we use: an upgrade of Flower starts here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from flwr.app import Error, Message, Metadata, RecordDict
from flwr.supercore import telemetry
from flwr.supercore.task_identity import TaskIdentity

from strategies import flower_compat
from strategies.flower_compat import ErrorCode, Run, act_as_coordinator, make_message, stamp, stay_offline
from strategies.offline import OFFLINE


def metadata(message_id: str = "7") -> Metadata:
    return Metadata(
        run_id=1,
        message_id=message_id,
        src_node_id=0,
        dst_node_id=2,
        reply_to_message_id="",
        group_id="",
        created_at=1.0,
        ttl=10.0,
        message_type="train",
    )


def test_a_message_can_be_made_from_metadata_and_content() -> None:
    message = make_message(metadata(), content=RecordDict())
    assert isinstance(message, Message)
    assert (message.metadata.message_id, message.has_content()) == ("7", True)


def test_an_error_message_can_be_made_from_metadata() -> None:
    message = make_message(metadata(), error=Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "why"))
    assert (message.has_error(), message.error.code, message.error.reason) == (True, 2, "why")


def test_a_stamp_is_what_a_reply_answers_to() -> None:
    message = make_message(metadata(""), content=RecordDict())
    stamp(message, "12")
    assert message.metadata.message_id == "12"
    assert Message(RecordDict(), reply_to=message).metadata.reply_to_message_id == "12"


def test_a_message_carries_the_identity_of_its_process() -> None:
    act_as_coordinator(run_id=5)
    message = Message(RecordDict(), 3, "train")
    assert (message.metadata.run_id, message.metadata.src_node_id, TaskIdentity.task_id) == (5, 0, 1)


def test_an_empty_run_has_only_its_id() -> None:
    run = Run.create_empty(4)
    assert (run.run_id, run.fab_id, run.override_config) == (4, "", {})


def test_staying_offline_sets_flower_s_own_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "FLWR_TELEMETRY_ENABLED", "1")
    for name in OFFLINE:
        monkeypatch.setenv(name, "unset")
    stay_offline()
    assert telemetry.FLWR_TELEMETRY_ENABLED == "0"
    assert {name: os.environ[name] for name in OFFLINE} == OFFLINE


def test_an_event_of_flower_s_neither_calls_home_nor_writes_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(telemetry.state, "source", None)
    monkeypatch.setattr(telemetry, "FLWR_TELEMETRY_ENABLED", "1")
    monkeypatch.setattr(telemetry.urllib.request, "urlopen", lambda *_, **__: pytest.fail("called home"))
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower"))
    stay_offline()
    assert telemetry.create_event(telemetry.EventType.PING, None) == "disabled"
    assert not (tmp_path / "flower").exists()


def test_private_modules_of_flower_are_named_in_one_file_only() -> None:
    root = Path(flower_compat.__file__).parents[1]
    public = ("flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.simulation")
    for package in ("clipward", "server", "client", "strategies", "privacy", "encoders", "tasks"):
        for path in (root / package).rglob("*.py"):
            for line in path.read_text("utf-8").splitlines():
                words = line.split()
                if path.name == "flower_compat.py" or words[:1] not in (["from"], ["import"]):
                    continue
                assert not words[1].startswith("flwr") or words[1] in public, f"{path}: {line}"


def test_messages_and_their_combination_need_no_torch() -> None:
    code = (
        "import sys, strategies.in_process, strategies.strategy, server.rounds, server.app\n"
        "sys.exit('torch' in sys.modules)"
    )
    root = Path(flower_compat.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
