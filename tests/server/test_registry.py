import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from server.errors import RunError
from server.registry import RELEASED, WAITING, Entry, Registry

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "registry.sqlite"


def asked(registry: Registry, *sites: str, server_round: int = 1, run: str = "r") -> dict[str, int]:
    return {
        site: registry.asked(run=run, server_round=server_round, site=site, request="ab", bytes_down=44)
        for site in sites
    }


def test_an_ask_and_its_answer_are_one_entry(path: Path) -> None:
    with Registry(path) as registry:
        rows = asked(registry, "alpha", "beta")
        registry.answered(rows["beta"], outcome=RELEASED, bytes_up=7)
        alpha, beta = registry.entries()
    assert (alpha.site, alpha.outcome, alpha.answered_at, alpha.bytes_up) == ("alpha", None, None, None)
    assert beta == Entry(
        ask=rows["beta"],
        run="r",
        server_round=1,
        attempt=1,
        site="beta",
        request="ab",
        sent_at=beta.sent_at,
        answered_at=beta.answered_at,
        outcome="released",
        bytes_down=44,
        bytes_up=7,
    )
    assert beta.answered_at is not None
    assert beta.answered_at >= beta.sent_at > 0


def test_attempts_are_counted_by_run_round_and_site_and_across_lives(path: Path) -> None:
    with Registry(path) as registry:
        asked(registry, "alpha", "beta")
        asked(registry, "alpha")
        asked(registry, "alpha", server_round=2)
        asked(registry, "alpha", run="other")
    with Registry(path) as registry:
        asked(registry, "alpha")
        found = [(one.run, one.server_round, one.site, one.attempt) for one in registry.entries()]
    assert found == [
        ("r", 1, "alpha", 1), ("r", 1, "beta", 1), ("r", 1, "alpha", 2), ("r", 2, "alpha", 1),
        ("other", 1, "alpha", 1), ("r", 1, "alpha", 3),
    ]  # fmt: skip


def test_the_last_word_counts_and_the_earlier_ones_stay(path: Path) -> None:
    with Registry(path) as registry:
        row = asked(registry, "alpha")["alpha"]
        registry.answered(row, outcome=WAITING)
        registry.answered(row, outcome="late", bytes_up=5)
        [entry] = registry.entries()
    assert (entry.outcome, entry.bytes_up) == ("late", 5)
    with sqlite3.connect(path) as database:
        found = database.execute("SELECT outcome FROM answers ORDER BY id").fetchall()
    database.close()
    assert found == [("waiting",), ("late",)]


@pytest.mark.parametrize(
    "statement",
    ["UPDATE asks SET site = 'x'", "DELETE FROM asks", "UPDATE answers SET ask = 1", "DELETE FROM answers"],
)
def test_the_file_itself_refuses_to_forget(path: Path, statement: str) -> None:
    with Registry(path) as registry:
        registry.answered(asked(registry, "alpha")["alpha"], outcome=RELEASED)
    database = sqlite3.connect(path)
    with pytest.raises(sqlite3.IntegrityError, match="append only"):
        database.execute(statement)
    database.close()


def test_a_new_registry_is_empty(path: Path) -> None:
    with Registry(path) as registry:
        assert registry.entries() == []


def test_another_version_is_refused_by_name(path: Path) -> None:
    Registry(path).close()
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 9")
    database.close()
    with pytest.raises(RunError, match=r"registry\.sqlite has version 9, this program reads 1: move it away"):
        Registry(path)


def test_what_is_no_database_is_refused_by_name(path: Path) -> None:
    path.write_bytes(b"no database " * 100)
    with pytest.raises(RunError, match=r"registry\.sqlite is no registry"):
        Registry(path)


def test_what_was_written_before_a_kill_is_there_after_it(path: Path) -> None:
    program = """
        import os, signal, sys
        from pathlib import Path
        from server.registry import Registry
        registry = Registry(Path(sys.argv[1]))
        rows = [
            registry.asked(run="r", server_round=1, site=site, request="ab", bytes_down=1)
            for site in ("alpha", "beta")
        ]
        registry.answered(rows[0], outcome="released")
        os.kill(os.getpid(), signal.SIGKILL)
    """
    died = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert died.returncode == -signal.SIGKILL
    with Registry(path) as registry:
        assert [(one.site, one.outcome) for one in registry.entries()] == [
            ("alpha", "released"),
            ("beta", None),
        ]
