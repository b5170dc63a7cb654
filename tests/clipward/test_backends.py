import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from clipward.backends import BackendError, run_in_process, run_on_ray
from strategies.offline import OFFLINE

ROOT = Path(__file__).resolve().parents[2]


def apps(seen: dict[str, Any]) -> tuple[ServerApp, ClientApp]:
    """A coordinator that asks every node for its settings."""
    server_app, client_app = ServerApp(), ClientApp()

    @server_app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        seen["run"] = dict(context.run_config)
        if "fail" in seen:
            raise seen["fail"]
        messages = [Message(RecordDict(), node, "query.hello") for node in grid.get_node_ids()]
        seen["sites"] = [dict(reply.content["facts"]) for reply in grid.send_and_receive(messages)]

    @client_app.query("hello")  # type: ignore[untyped-decorator]
    def hello(message: Message, context: Context) -> Message:
        facts = ConfigRecord({**context.node_config, **context.run_config})
        return Message(RecordDict({"facts": facts}), reply_to=message)

    return server_app, client_app


def test_coordinator_and_sites_get_their_settings() -> None:
    seen: dict[str, Any] = {}
    run_in_process(*apps(seen), node_configs=[{"site": "a"}, {"site": "b"}], run_config={"rounds": 2})
    assert seen == {
        "run": {"rounds": 2},
        "sites": [{"site": "a", "rounds": 2}, {"site": "b", "rounds": 2}],
    }


def test_what_the_coordinator_raises_reaches_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        run_in_process(*apps({"fail": ZeroDivisionError()}), node_configs=[], run_config={})


def test_nothing_calls_home() -> None:
    run_in_process(*apps({}), node_configs=[], run_config={})
    assert {name: os.environ[name] for name in OFFLINE} == OFFLINE


def test_a_missing_ray_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r'ray is not installed: pip install "flwr\[simulation\]"'):
        run_on_ray(*apps({}), node_configs=[{}], run_config={})


SAME_ON_BOTH = """
import json, sys
from pathlib import Path

from flwr.serverapp import ServerApp

from clipward.backends import run_in_process, run_on_ray
from server.checkpoints import load_latest
from server.metrics import RunLog, read_events
from server.rounds import run_rounds
from strategies.messages import digest_of
from tests.fake_site import FakeSites, crash, federation, start


def run(folder, engine):
    app = ServerApp()

    @app.main()
    def main(grid, context):
        if context.run_config["explode"]:
            raise ZeroDivisionError("in the coordinator")
        log = RunLog(folder / "run" / "metrics.jsonl")
        patient = federation(strategy={"deadline-seconds": 3000.0})  # who answers late would miss a round
        run_rounds(
            grid, patient, run_dir=folder / "run", start=start(size=1000),
            evaluate=lambda arrays: None, log=log, resume=False,
        )

    (folder / "sites").mkdir(parents=True)
    sites = FakeSites(folder / "sites", {"delta": crash})
    configs = FakeSites.configs("alpha", "beta", "gamma", "delta")
    engine(app, sites.app, node_configs=configs, run_config={"explode": False})
    events = read_events(folder / "run" / "metrics.jsonl")
    codes = sorted({event["code"] for event in events if event["kind"] == "site_refused"})
    try:
        engine(app, sites.app, node_configs=configs, run_config={"explode": True})
        raised = None
    except ZeroDivisionError as error:
        raised = str(error)
    return {"weights": digest_of(load_latest(folder / "run").arrays), "codes": codes, "raised": raised}


root = Path(sys.argv[1])
result = {engine.__name__: run(root / engine.__name__, engine) for engine in (run_in_process, run_on_ray)}
(root / "result.json").write_text(json.dumps(result))
"""


@pytest.mark.e2e
@pytest.mark.slow
def test_in_this_process_and_on_ray_the_weights_are_the_same_bits(tmp_path: Path) -> None:
    """The same refusals too, the coordinator's exception surfaces, and neither writes to the user's home."""
    home, temporary = tmp_path / "home", Path(tempfile.mkdtemp())  # Ray's sockets need a short path
    home.mkdir()
    environment = {**os.environ, "HOME": str(home), "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SAME_ON_BOTH), str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["run_on_ray"] == result["run_in_process"]
    assert result["run_on_ray"]["codes"] == ["failed"]
    assert result["run_on_ray"]["raised"] == "in the coordinator"
    assert list(home.iterdir()) == []
    assert list(temporary.iterdir()) == []
    temporary.rmdir()
