"""The rounds of a run: ask, average, checkpoint, evaluate. Killed at any moment, a run can be resumed."""

import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from server import checkpoints
from server.anchors import ANCHORS_FILE, AnchorBook
from server.checkpoints import Checkpoint
from server.errors import CheckpointError, QuorumError
from server.exchange import Exchange, exchange
from server.federation import Federation
from server.metrics import RunLog
from server.roster import Roster, Site
from strategies.in_process import InProcessGrid
from strategies.messages import Arrays, PublicBundle, RefusalCode, ReleaseFacts, TrainRequest

Evaluate = Callable[[Arrays], Mapping[str, Any] | None]
_LIBRARIES = ("flwr", "numpy", "torch", "opacus", "dp-accounting")


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a run starts from.

    Attributes:
        bundle: What every site must hold.
        arrays: The trainable weights of round 0.
        public_start: They were trained on public data.
    """

    bundle: PublicBundle
    arrays: Arrays
    public_start: bool


def run_rounds(
    grid: Grid,
    federation: Federation,
    *,
    run_dir: Path,
    start: Start,
    evaluate: Evaluate,
    log: RunLog,
    resume: bool,
) -> Arrays:
    """Train all rounds; the final weights, which are also the last checkpoint.

    Guarantees:
        Killed at any moment and resumed, it ends after the same rounds with the same weights as without the
        kill: a round without a checkpoint is asked for again by the same request, and a site answers that
        with the release it stored, at no cost.

    Args:
        grid: Flower's way to the sites: in this process, on Ray, or deployed.
        federation: The consortium's settings.
        run_dir: Folder of the run; made when missing.
        start: Weights of round 0 and the public bundle.
        evaluate: Measures weights on the coordinator's data; returns None when there is nothing to measure.
        log: Takes the events.
        resume: Go on from the last checkpoint, if there is one.

    Raises:
        QuorumError: fewer sites than ``strategy.min-sites`` were ready or released; resuming asks again.
        CheckpointError: the folder holds another run, or it holds this one and ``resume`` is false.
    """
    run = _Run(grid, federation, run_dir=run_dir, start=start, evaluate=evaluate, log=log)
    return run.go(_resume_point(run_dir, federation, start, resume=resume))


class _Run:
    def __init__(
        self,
        grid: Grid,
        federation: Federation,
        *,
        run_dir: Path,
        start: Start,
        evaluate: Evaluate,
        log: RunLog,
    ) -> None:
        self._grid, self._federation, self._run_dir = grid, federation, run_dir
        self._start, self._evaluate, self._log = start, evaluate, log
        self._in_turn = isinstance(grid, InProcessGrid)
        self._roster = Roster(grid, run=federation.name, bundle=start.bundle)
        self._identity = _identity(federation, start)
        self._anchors = AnchorBook(run_dir / ANCHORS_FILE)

    def go(self, done: Checkpoint | None) -> Arrays:
        begin = time.monotonic()
        rounds = self._federation.training.rounds
        if done is None:
            sites = self._gather(1)
            self._log.record("run_started", **_facts(self._federation, self._start, sites))
            done = Checkpoint(0, self._start.arrays, {"summary": None})
            self._save(done)
        else:
            self._log.record("run_resumed", round=done.server_round)
        self._tell(done)  # on resuming too: the crash may have swallowed it, and readers keep the last
        for server_round in range(done.server_round + 1, rounds + 1):
            done = self._round(server_round, done.arrays)
        self._log.record("run_finished", rounds=rounds, seconds=time.monotonic() - begin)
        return done.arrays

    def _round(self, server_round: int, base: Arrays) -> Checkpoint:
        """One round from the gathering of sites to its last event."""
        strategy = self._federation.strategy
        sites = self._gather(server_round)
        self._log.record("round_started", round=server_round, sites=[site.name for site in sites])
        begin = time.monotonic()
        outcome = exchange(
            self._grid,
            self._request(server_round, base),
            sites,
            weighting=strategy.weighting,
            anchors=self._anchors,
            log=self._log,
        )
        exchanged = time.monotonic() - begin - outcome.aggregate_seconds
        self._dismiss(outcome)
        _require_quorum(server_round, outcome, strategy.min_sites)
        begin = time.monotonic()
        arrays = outcome.average.result()
        averaged = time.monotonic() - begin + outcome.aggregate_seconds
        # Sites round their seconds up, so what they say can be more than there was.
        train = min(exchanged, _train_seconds(outcome.replied.values(), in_turn=self._in_turn))
        seconds = {"train": train, "communicate": exchanged - train, "aggregate": averaged}
        summary = {"replied": len(outcome.replied), "refused": len(outcome.refused), "seconds": seconds}
        done = Checkpoint(server_round, arrays, {"summary": summary})
        seconds["checkpoint"] = self._save(done)
        self._tell(done)
        return done

    def _gather(self, server_round: int) -> list[Site]:
        strategy = self._federation.strategy
        return self._roster.gather(
            server_round=server_round,
            at_least=strategy.min_sites,
            patience_seconds=0.0 if self._in_turn else strategy.deadline_seconds,
        )

    def _request(self, server_round: int, base: Arrays) -> TrainRequest:
        return TrainRequest(
            run=self._federation.name,
            server_round=server_round,
            bundle=self._identity["bundle"],
            plan=self._federation.plan(),
            arrays=base,
            deadline_unix_seconds=time.time() + self._federation.strategy.deadline_seconds,
        )

    def _dismiss(self, outcome: Exchange) -> None:
        for site, code in outcome.refused.items():
            if code is RefusalCode.BUDGET:
                self._roster.retire(site)
            else:
                self._roster.forget(site)

    def _save(self, done: Checkpoint) -> float:
        """Write the checkpoint; the seconds it took."""
        begin = time.monotonic()
        checkpoints.save(self._run_dir, done.server_round, done.arrays, {**self._identity, **done.manifest})
        return time.monotonic() - begin

    def _tell(self, done: Checkpoint) -> None:
        """Evaluate a checkpoint where that is due, and record its round as finished."""
        due = done.server_round % self._federation.evaluation.every == 0
        if due or done.server_round == self._federation.training.rounds:
            begin = time.monotonic()
            evaluation = self._evaluate(done.arrays)
            if evaluation is not None:
                self._log.record(
                    "evaluated",
                    round=done.server_round,
                    public_start=done.server_round == 0 and self._start.public_start,
                    evaluation=evaluation,
                    seconds=time.monotonic() - begin,
                )
        if done.manifest["summary"] is not None:
            self._log.record("round_finished", round=done.server_round, **done.manifest["summary"])


def _resume_point(run_dir: Path, federation: Federation, start: Start, *, resume: bool) -> Checkpoint | None:
    """Where to go on; None: at the start. Also writes the settings, once they are known to fit the folder."""
    done = checkpoints.load_latest(run_dir) if resume else None
    if done is not None:
        _require_same_run(run_dir, done.manifest, _identity(federation, start))
    elif not resume and (found := checkpoints.newest_round(run_dir)) is not None:
        raise CheckpointError(
            f"{run_dir} holds a run that got to round {found}: --resume continues it, "
            "another run folder starts a new one"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    settings = federation.model_dump(mode="json", by_alias=True)
    (run_dir / "federation.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    return done


def _require_same_run(run_dir: Path, manifest: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    was, now = ({"bundle": one.get("bundle"), **one.get("settings", {})} for one in (manifest, identity))
    odd = [
        f"{key} was {was.get(key)!r}, is {now.get(key)!r}"
        for key in {**was, **now}
        if was.get(key) != now.get(key)
    ]
    if odd:
        raise CheckpointError(
            f"{run_dir} holds another run: {'; '.join(odd)}. Use the settings it was started with to resume "
            "it, or another run folder for a new run"
        )


def _identity(federation: Federation, start: Start) -> dict[str, Any]:
    """What must not change in the life of a run: all that decides its weights."""
    plan = {f"plan.{name}": value for name, value in federation.plan().model_dump(mode="json").items()}
    strategy = {
        "strategy.name": federation.strategy.name,
        "strategy.weighting": federation.strategy.weighting,
    }
    return {"bundle": start.bundle.digest, "settings": {"name": federation.name, **strategy, **plan}}


def _facts(federation: Federation, start: Start, sites: Iterable[Site]) -> dict[str, Any]:
    privacy = federation.privacy
    return {
        "run": federation.name,
        "objective": federation.objective.name,
        "part": federation.share.part,
        "parameters": {
            "total": sum(value.size for value in start.bundle.weights.values()),
            "trainable": sum(value.size for value in start.arrays.values()),
        },
        "config": federation.public_settings(),
        "rounds": federation.training.rounds,
        "sites": [site.name for site in sites],
        "privacy": {
            "mode": privacy.mode,
            "unit": "patient",
            "epsilon": privacy.epsilon,
            "formal_guarantee": privacy.mode == "dp",
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
    }


def _require_quorum(server_round: int, outcome: Exchange, min_sites: int) -> None:
    if len(outcome.replied) >= min_sites:
        return
    codes = ", ".join(f"{site.name} {code}" for site, code in outcome.refused.items())
    remedy = "Each site's own log says why; repair that, then --resume asks for this round again"
    if RefusalCode.BUDGET in outcome.refused.values():
        remedy += "; a spent budget stays spent, and only its site can raise policy.epsilon-max"
    raise QuorumError(
        f"round {server_round}: {len(outcome.replied)} sites replied, {min_sites} are needed "
        f"(strategy.min-sites); the others: {codes or 'none'}. {remedy}"
    )


def _train_seconds(facts: Iterable[ReleaseFacts], *, in_turn: bool) -> float:
    """Seconds the sites trained, as they report: one after the other in this process, else side by side."""
    seconds = [0.0, *(one.seconds for one in facts if not one.replayed)]
    return sum(seconds) if in_turn else max(seconds)
