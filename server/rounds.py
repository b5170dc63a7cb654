"""The rounds of a run: ask, combine, checkpoint, evaluate. Killed at any moment, a run can be resumed."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from privacy.banks import PrototypeBank
from server import checkpoints
from server.anchors import ANCHORS_FILE, AnchorBook
from server.centre import CENTRE_FILE, CentreSum
from server.centre import keep as keep_centre
from server.centre import load as load_centre
from server.checkpoints import Best, Checkpoint
from server.errors import QuorumError, RunError
from server.exchange import Exchange, Outcome, Question, Rules
from server.federation import Federation
from server.identity import Start, facts, identity, resume_point
from server.improvement import Improvement
from server.late import LATE_FOLDER, LateReleases
from server.losses import LIKE, MeanLosses
from server.metrics import RunLog
from server.prototypes import PROTOTYPES_FOLDER, PrototypeSum, keep, keep_none
from server.registry import REGISTRY_FILE, Registry
from server.roster import Roster, Site
from server.secure_exchange import SUMS_FOLDER, SecureExchange
from server.selection import select
from strategies.in_process import InProcessGrid
from strategies.messages import Arrays, RefusalCode, ReleaseFacts, TrainRequest
from strategies.rules.rule import CannotCombine
from strategies.share import IMAGE_SHIFT, released
from strategies.strategy import Strategy, strategy_of
from strategies.variates import VariatesLost

__all__ = ["Evaluate", "Start", "run_rounds"]

STRATEGY_FOLDER = "strategy"
SUM_BYTES = 2**30  # of a sum that stays in memory, where all sites are in this process and one has a turn
Evaluate = Callable[[Arrays], Mapping[str, Any] | None]


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
    """Train all rounds, or as many as still help; the final weights, which are also the last checkpoint.

    Guarantees:
        Killed at any moment and resumed, it ends after the same rounds with the same weights as without the
        kill: a round without a checkpoint is asked for again by the same request, and a site answers that
        with the release it stored, at no cost. Nothing random is kept for that: what is drawn here is a
        function of run, seed and round. The exception are releases that come late: those that had come are
        kept, those still on their way at the kill are dropped.

    Args:
        grid: Flower's way to the sites: in this process, on Ray, or deployed.
        federation: The consortium's settings.
        run_dir: Folder of the run; made when missing.
        start: Weights of round 0 and the public bundle.
        evaluate: Measures weights on the coordinator's data; returns None when there is nothing to measure.
        log: Takes the events.
        resume: Go on from the last checkpoint, if there is one.

    Raises:
        QuorumError: fewer sites than ``strategy.min-sites`` were ready, or released however often the round
            was repeated; resuming asks again.
        CheckpointError: the folder holds another run, or it holds this one and ``resume`` is false.
        RunError: the updates cannot be combined, or what the strategy remembers of a site is lost.
    """
    done = resume_point(run_dir, federation, start, resume=resume)
    with Registry(run_dir / REGISTRY_FILE) as registry:
        run = _Run(
            grid,
            federation,
            run_dir=run_dir,
            start=start,
            evaluate=evaluate,
            log=log,
            registry=registry,
            values={} if done is None else done.manifest["evaluations"],
        )
        try:
            return run.go(done)
        except (CannotCombine, VariatesLost) as error:
            raise RunError(str(error)) from error


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
        registry: Registry,
        values: Mapping[str, float],
    ) -> None:
        self._federation, self._run_dir, self._grid = federation, run_dir, grid
        self._start, self._evaluate, self._log = start, evaluate, log
        self._in_turn = isinstance(grid, InProcessGrid)
        self._roster = Roster(grid, run=federation.name, bundle=start.bundle, log=log)
        self._identity = identity(federation, start)
        self._strategy, self._heard = _strategy(federation, run_dir, in_turn=self._in_turn), 0
        anchors = AnchorBook(run_dir / ANCHORS_FILE)
        self._late = LateReleases(run_dir / LATE_FOLDER, anchors=anchors, registry=registry, log=log)
        self._exchange = Exchange(
            grid, self._rules(), anchors=anchors, registry=registry, late=self._late, log=log
        )
        self._secure = self._secure_exchange()
        evaluation = federation.evaluation
        self._improvement = Improvement.parse(
            evaluation.metric, stop_after=evaluation.stop_after, values=values
        )

    def go(self, done: Checkpoint | None) -> Arrays:
        begin = time.monotonic()
        if done is None:
            sites = self._roster_of(1)
            names = [site.name for site in sites]
            self._log.record("run_started", **facts(self._federation, self._start, names))
            done = self._checkpoint(0, self._start.arrays, summary=None, late=[])
            self._save(done)
        else:
            self._strategy.restore(done.strategy)
            self._late.remove(done.manifest["late"])
            self._log.record("run_resumed", round=done.server_round)
            self._late.drop_lost(self._federation.name, server_round=done.server_round)
        self._tell(done)  # on resuming too: the crash may have swallowed it, and readers keep the last
        for server_round in range(done.server_round + 1, self._federation.training.rounds + 1):
            if self._improvement.is_over:
                self._tell_stopped(done.server_round)
                break
            base = done.arrays if server_round > 1 else self._centred(done.arrays)
            done = self._round(server_round, base)
        self._late.give_up(done.server_round)
        self._log.record("run_finished", rounds=done.server_round, seconds=time.monotonic() - begin)
        return done.arrays

    def _round(self, server_round: int, base: Arrays) -> Checkpoint:
        """One round from the gathering of sites to its last event."""
        outcome = self._agreed(server_round, lambda: self._asked(server_round, base))
        exchanged = outcome.seconds - outcome.aggregate_seconds
        begin = time.monotonic()
        arrays = {**base, **self._strategy.finish()} if outcome.replied else base
        combined = time.monotonic() - begin + outcome.aggregate_seconds
        # Sites round their seconds up, so what they say can be more than there was.
        train = min(exchanged, _train_seconds(outcome.replied.values(), in_turn=self._in_turn))
        seconds = {"train": train, "communicate": exchanged - train, "aggregate": combined}
        summary = {"replied": len(outcome.replied), "refused": len(outcome.refused), "seconds": seconds}
        done = self._checkpoint(server_round, arrays, summary=summary, late=outcome.late)
        seconds["checkpoint"] = self._save(done)
        self._late.remove(outcome.late)
        self._tell(done)
        return done

    def _centred(self, base: Arrays) -> Arrays:
        """The weights of the start, with the centre of the sites' images for the public one: made once a run.

        Every later round's weights have it in them, so a site that comes late is given it too.
        """
        plan = self._federation.plan()
        if plan.centre is None:
            return base
        path, public = self._run_dir / CENTRE_FILE, base[IMAGE_SHIFT]
        if not path.is_file():
            total = CentreSum(plan.centre, public=public, private=plan.privacy == "dp")
            self._agreed(1, lambda: self._asked_for_centre(base, total))
            keep_centre(total.centre(), path)
            self._log.record("centre_found", round=1, **total.facts())
        return {**base, IMAGE_SHIFT: load_centre(path, width=len(public))}

    def _asked_for_centre(self, base: Arrays, total: CentreSum) -> Outcome:
        """Ask all sites that are ready, whoever is then drawn: what they train on depends on it."""
        sites, request = self._roster_of(1), replace(self._request(1, base), phase="centre")
        outcome = self._exchange.round(Question(request=request, folding=total, like=total.like), sites)
        self._dismiss(1, outcome)
        return replace(outcome, reason="Asked was the centre of the images, before any training")

    def _agreed(self, server_round: int, ask: Callable[[], Outcome]) -> Outcome:
        """Ask for the round until enough sites have released, or it has been repeated often enough."""
        strategy = self._federation.strategy
        attempt = 0
        while True:
            attempt += 1
            outcome = ask()
            if len(outcome.replied) >= strategy.min_sites:
                return outcome
            if attempt > strategy.round_retries and outcome.reason and self._skips_failed:
                self._log.record("round_skipped", round=server_round, reason=outcome.reason)
                return outcome
            if attempt > strategy.round_retries:
                raise QuorumError(_too_few(server_round, outcome, strategy.min_sites, attempts=attempt))
            self._log.record(
                "round_repeated",
                round=server_round,
                attempt=attempt + 1,
                reason=outcome.reason
                or f"{len(outcome.replied)} sites replied, {strategy.min_sites} are needed",
            )

    @property
    def _skips_failed(self) -> bool:
        secure = self._federation.secure_aggregation
        return secure is not None and secure.skip_failed

    def _asked(self, server_round: int, base: Arrays) -> Outcome:
        """Ask the sites of the draw once."""
        self._late.forget(server_round)
        self._late.collect(self._grid, server_round=server_round)
        sites = self._drawn(server_round)
        self._log.record("round_started", round=server_round, sites=[site.name for site in sites])
        prototypes = self._prototypes(server_round, base, sites)
        if isinstance(prototypes, Outcome):
            self._dismiss(server_round, prototypes)
            return prototypes
        self._hear_losses(server_round, base, sites, prototypes)
        request = replace(self._request(server_round, base), prototypes=prototypes)
        question = Question(request=request, folding=self._strategy, like=released(request))
        outcome = (self._secure or self._exchange).round(question, sites)
        self._dismiss(server_round, outcome)
        return outcome

    def _hear_losses(
        self, server_round: int, base: Arrays, sites: Sequence[Site], prototypes: PrototypeBank | None
    ) -> None:
        """Where losses weigh the sites, ask for them: once a round, however often it is repeated."""
        if not self._strategy.fair or self._heard == server_round:
            return
        losses = MeanLosses()
        request = replace(self._request(server_round, base), phase="losses", prototypes=prototypes)
        self._exchange.round(Question(request=request, folding=losses, like=LIKE), sites)
        self._strategy.hear(losses.by_site)
        self._heard = server_round
        self._log.record("losses_heard", round=server_round, losses=losses.by_site)

    def _prototypes(
        self, server_round: int, base: Arrays, sites: Sequence[Site]
    ) -> PrototypeBank | Outcome | None:
        """This round's prototypes, made of the sites' or, where that was done before, read.

        Those of an earlier round that were never made are not asked for later: sites may have paid for them.

        Returns:
            Them; null: the round trains without; or what came of a secure sum that was not made. Sites have
            paid for what is in it, so the round waits for it, or is passed over.
        """
        prototypes = self._start.prototypes
        if prototypes is None:
            return None
        made_in = server_round - (server_round - 1) % prototypes.plan.every
        path = self._prototype_file(made_in)
        if path.is_file():
            return PrototypeBank.load(path)
        if made_in < server_round or _without(path).is_file():
            return None
        total, alone = PrototypeSum(prototypes), not prototypes.shares_weights
        if not alone or server_round > 1:
            request = replace(self._request(server_round, base), phase="prototypes")
            question = Question(request=request, folding=total, like=total.like)
            outcome = (self._secure or self._exchange).round(question, sites)
            if not outcome.replied and not alone:  # each site's refusal is in the log
                if outcome.reason:
                    return outcome
                keep_none(_without(path))
                return None
        bank = total.bank(base)
        if bank is None:
            keep_none(_without(path))
        else:
            keep(bank, path)
        self._log.record("prototypes_made", round=server_round, **total.facts())
        return bank

    def _drawn(self, server_round: int) -> list[Site]:
        """Who is asked: a draw from the ready sites; one that is late sits out if others suffice."""
        strategy, engaged = self._federation.strategy, self._late.engaged
        ready = self._roster_of(server_round)
        bound = self._bound(server_round)
        if bound is not None:
            return [site for site in ready if site.name in bound]
        free = [site for site in ready if site.name not in engaged]
        free = free if len(free) >= strategy.min_sites else ready
        count = strategy.asked_of(len(free))
        sites, others = select(
            free,
            run=self._federation.name,
            seed=self._federation.training.seed,
            server_round=server_round,
            count=count,
        )
        late = [site.name for site in ready if site not in free]
        if others or late:
            self._log.record(
                "sites_selected",
                round=server_round,
                selected=[site.name for site in sites],
                not_selected=[site.name for site in others],
                late=late,
                reason=f"{count} of {len(free)} were drawn (strategy.fraction, target-sites); for a late one "
                "stands its release of an earlier round",
            )
        return sites

    def _bound(self, server_round: int) -> frozenset[str] | None:
        """Who alone can be asked for the secure sum that is due; null: anybody."""
        if self._secure is None:
            return None
        path = self._prototype_file(server_round)
        made = path.is_file() or _without(path).is_file()
        due = self._federation.plan().releases_prototypes(server_round) and not made
        return self._secure.bound(server_round, "prototypes" if due else "train")

    def _prototype_file(self, server_round: int) -> Path:
        return self._run_dir / PROTOTYPES_FOLDER / f"round-{server_round:04d}.safetensors"

    def _roster_of(self, server_round: int) -> list[Site]:
        strategy = self._federation.strategy
        return self._roster.gather(
            server_round=server_round,
            at_least=strategy.min_sites,
            patience_seconds=0.0 if self._in_turn else strategy.deadline_seconds,
        )

    def _rules(self) -> Rules:
        strategy = self._federation.strategy
        return Rules(
            weighting=strategy.weighting,
            retries=strategy.retries,
            in_turn=self._in_turn,
            late=strategy.late,
            staleness_exponent=strategy.staleness_exponent,
        )

    def _secure_exchange(self) -> SecureExchange | None:
        settings, strategy = self._federation.secure_aggregation, self._federation.strategy
        if settings is None:
            return None
        return SecureExchange(
            self._grid,
            self._exchange,
            settings,
            weighting=strategy.weighting,
            min_sites=strategy.min_sites,
            folder=self._run_dir / SUMS_FOLDER,
            log=self._log,
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

    def _dismiss(self, server_round: int, outcome: Outcome) -> None:
        engaged = self._late.engaged
        for site, code in outcome.refused.items():
            if code is RefusalCode.BUDGET:
                self._roster.retire(site, server_round=server_round, reason="its budget is spent")
            elif site.name not in engaged:
                self._roster.forget(site)

    def _checkpoint(
        self, server_round: int, arrays: Arrays, *, summary: Mapping[str, Any] | None, late: Iterable[str]
    ) -> Checkpoint:
        manifest = {
            **self._identity,
            "summary": summary,
            "late": list(late),
            "evaluations": self._improvement.as_json(),
        }
        return Checkpoint(server_round, arrays, self._strategy.state(), manifest)

    def _save(self, done: Checkpoint) -> float:
        """Write the checkpoint; the seconds it took."""
        begin = time.monotonic()
        policy = self._federation.checkpoints
        checkpoints.save(self._run_dir, done, keep=policy.keep, keep_every=policy.keep_every)
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
                self._weigh(done.server_round, evaluation)
        if done.manifest["summary"] is not None:
            self._log.record("round_finished", round=done.server_round, **done.manifest["summary"])

    def _weigh(self, server_round: int, evaluation: Mapping[str, Any]) -> None:
        """Name this checkpoint the best, if it is."""
        self._improvement.see(server_round, evaluation)
        best = self._improvement.best
        if best is not None and best[0] == server_round:
            named = Best(server_round=server_round, metric=self._improvement.metric, value=best[1])
            checkpoints.name_best(self._run_dir, named)

    def _tell_stopped(self, server_round: int) -> None:
        evaluation, best = self._federation.evaluation, self._improvement.best
        self._log.record(
            "stopped_early",
            round=server_round,
            best_round=best and best[0],
            metric=evaluation.metric,
            value=best and best[1],
            reason=f"{evaluation.stop_after} evaluations were no better (evaluation.stop-after)",
        )


def _strategy(federation: Federation, run_dir: Path, *, in_turn: bool) -> Strategy:
    training = federation.training
    return strategy_of(
        federation.strategy,
        folder=run_dir / STRATEGY_FOLDER,
        step_length=training.learning_rate * training.steps,
        memory_bytes=SUM_BYTES if in_turn else 0,
    )


def _without(path: Path) -> Path:
    """Where it is kept that a round has no prototypes: asked again, it would be another round."""
    return path.with_suffix(".none")


def _too_few(server_round: int, outcome: Outcome, min_sites: int, *, attempts: int) -> str:
    codes = ", ".join(f"{site.name} {code}" for site, code in outcome.refused.items())
    remedy = "Each site's own log says why; repair that, then --resume asks for this round again"
    if RefusalCode.BUDGET in outcome.refused.values():
        remedy += "; a spent budget stays spent, and only its site can raise policy.epsilon-max"
    asked = f" in each of {attempts} attempts" if attempts > 1 else ""
    reason = f"{outcome.reason}. " if outcome.reason else ""
    return (
        f"round {server_round}: {len(outcome.replied)} sites replied{asked}, {min_sites} are needed "
        f"(strategy.min-sites); the others: {codes or 'none'}. {reason}{remedy}"
    )


def _train_seconds(replies: Iterable[ReleaseFacts], *, in_turn: bool) -> float:
    """Seconds the sites trained, as they report: one after the other in this process, else side by side."""
    seconds = [0.0, *(one.seconds for one in replies if not one.replayed)]
    return sum(seconds) if in_turn else max(seconds)
