"""Running the arms of a comparison: each in a folder named by the digest of all that decides its figures."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w

from client.cohort.salt import SALT_FILE
from client.site import SITE_FILE, Site
from clipward.compare_arms import Arm
from clipward.heterogeneity import pool
from clipward.public_start import Progress, evaluation_set, prepare_start
from clipward.refusals import CertainRefusal, warn_of
from clipward.simulate import prepare_sites, run_sites
from clipward.summary import summarise
from server.errors import QuorumError
from server.evaluation import EvaluationSet
from server.federation import Checkpoints, Federation
from server.metrics import RELEASED, Event, read_events
from server.start import STARTS, start_folder
from strategies.files import write_text
from strategies.settings import SettingsError

VERSION = 1
RESULT, EVENTS = "result.json", "metrics.jsonl"
POOLED = "pooled"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a finished arm came to.

    Attributes:
        evaluation: On the held-out patients of all sites.
        bytes_up: All rounds and sites together, without the model that is installed once.
        bytes_down: The other way.
        seconds: On this machine, one site after the other.
        epsilon: The largest that a site's patients have spent; None: no privacy.
        delta: Its delta.
        sites: How many sites trained in some round.
    """

    evaluation: Mapping[str, Any]
    bytes_up: int
    bytes_down: int
    seconds: float
    epsilon: float | None
    delta: float | None
    sites: int

    @classmethod
    def of(cls, events: list[Event]) -> "Figures":
        """What the events of a finished run say."""
        summary = summarise(events)
        # An answer that was given anew after a crash was sent anew, too.
        sent = [event for event in events if event["kind"] in RELEASED]
        return cls(
            evaluation=summary["evaluation"],
            bytes_up=sum(event.get("bytes_up") or 0 for event in sent),
            bytes_down=sum(event.get("bytes_down") or 0 for event in sent),
            seconds=summary["seconds"]["total"],
            epsilon=summary["privacy"]["epsilon"],
            delta=summary["privacy"]["delta"],
            sites=sum(site["rounds"] > 0 for site in summary["sites"]),
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """An arm, and its figures or why there are none."""

    arm: Arm
    figures: Figures | None = None
    problem: str | None = None


class Runner:
    """Runs arms over the sites of one federation file.

    Guarantees:
        No site's own ledger, policy or release is touched: every arm has sites of its own, which share the
        packed cohorts, and so a budget of its own. A finished arm is read and not run again; one that was
        interrupted goes on with its next round. All arms are measured on the same held-out patients.

    Args:
        federation: The file; its sites are packed where they are not yet.
        runs: Folder of all runs.
        on_progress: Told of the work before rounds.

    Raises:
        SettingsError: no sites where the file points, or none has held-out patients.
        CohortError: a site's data cannot be used.
    """

    def __init__(self, federation: Federation, *, runs: Path, on_progress: Progress | None = None) -> None:
        self.folder = runs / f"{federation.name}-compare"
        self._starts, self._progress = runs / STARTS, on_progress
        self._bundles: dict[Path, str] = {}
        self._warned: set[tuple[str, str]] = set()
        self._sites = {site.name: site for site in map(Site.open, prepare_sites(federation, self.folder))}
        for site in self._sites.values():
            site.cohort(on_progress=partial(on_progress, f"read {site.name}") if on_progress else None)
        self._pooled = _pooled_site(self._sites, self.folder / POOLED)
        cohort = self._pooled.cohort()
        self._identity, self._held_out = cohort.identity, evaluation_set(cohort, cohort.test())
        if not self._held_out.texts:
            raise SettingsError(
                f"no site of {federation.name} has held-out patients to compare on: see test-fraction"
            )

    @property
    def sites(self) -> list[str]:
        """Names of the federation's sites."""
        return list(self._sites)

    @property
    def held_out(self) -> EvaluationSet:
        """What every arm is measured on."""
        return self._held_out

    def run(self, arm: Arm, *, on_round: Callable[[int], None] | None = None) -> Outcome:
        """The arm's figures, from its folder or by running it.

        A finished arm leaves its events and figures; weights, sites and ledgers are removed.

        Args:
            arm: What is run.
            on_round: Told the number of every round that is finished.
        """
        folder = self.folder / self.digest(arm)
        if not (folder / RESULT).is_file():
            try:
                self._train(arm, folder, on_round)
            except QuorumError as error:
                return Outcome(arm=arm, problem=f"{error} ({folder / 'sites'})")
            figures = Figures.of(read_events(folder / EVENTS))
            write_text(folder / RESULT, json.dumps({"version": VERSION, **asdict(figures)}, indent=2) + "\n")
        for left in folder.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
        stored = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        stored.pop("version")
        return Outcome(arm=arm, figures=Figures(**stored))

    def digest(self, arm: Arm) -> str:
        """Names all that decides the arm's figures: settings, start, data, rules of its sites, program."""
        settings = arm.federation.model_dump(mode="json", exclude={"simulation", "checkpoints"})
        released = arm.federation.objective.prototypes
        facts = {
            "version": (VERSION, version("clipward")),
            "kind": arm.kind,
            "settings": settings,
            "start": self._bundle(arm.federation),
            "prototypes": released and hashlib.sha256(released.read_bytes()).hexdigest(),
            "data": self._identity,
            "sites": [
                {
                    **site.settings.model_dump(mode="json", exclude={"cohort"}),
                    "patients declared": site.settings.cohort.patients_declared,
                    "delta": site.delta,
                }
                for site in self._members(arm)
            ],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def _members(self, arm: Arm) -> list[Site]:
        if arm.kind == "pooled":
            return [self._pooled]
        return [site for name, site in self._sites.items() if arm.site in (None, name)]

    def _bundle(self, federation: Federation) -> str:
        """The digest of the arm's start, prepared once."""
        place = start_folder(federation, self._starts)
        if place not in self._bundles:
            prepared = prepare_start(federation, cache=self._starts, on_progress=self._progress)
            self._bundles[place] = prepared.bundle.digest
        return self._bundles[place]

    def _train(self, arm: Arm, folder: Path, on_round: Callable[[int], None] | None) -> None:
        federation = arm.federation.model_copy(update={"checkpoints": Checkpoints(keep=1)})
        prepared = prepare_start(federation, cache=self._starts)
        sites = [
            own_site(site, folder / "sites", private=federation.privacy.mode == "dp")
            for site in self._members(arm)
        ]

        def tell(event: Event) -> None:
            if on_round is not None and event["kind"] == "round_finished":
                on_round(event["round"])

        run_sites(
            federation,
            prepared,
            sites,
            run_dir=folder,
            held_out=self._held_out,
            resume=True,
            listeners=[tell],
            warn=self._warn,
        )

    def _warn(self, refusal: CertainRefusal) -> None:
        """Say of every site once what it refuses in arm after arm."""
        new = tuple(site for site in refusal.sites if (site, refusal.reason) not in self._warned)
        self._warned |= {(site, refusal.reason) for site in new}
        if new:
            warn_of(replace(refusal, sites=new))


def own_site(site: Site, root: Path, *, private: bool) -> Path:
    """Make a site of an arm's own in ``root``: the given one's cohort and rules, another budget."""
    folder = root / site.folder.name
    settings = site.settings.model_dump(mode="json", by_alias=True, exclude_none=True)
    settings["policy"]["require-dp"] &= private
    cohort = site.settings.cohort.relative_to(site.folder.resolve())
    settings["cohort"] = cohort.model_dump(mode="json", by_alias=True, exclude_none=True)
    _write_site(folder, settings)
    for shared in (site.cohort_folder, site.folder / SALT_FILE):
        link = folder / shared.name
        if shared.exists() and not link.exists():
            link.symlink_to(shared.resolve(), target_is_directory=shared.is_dir())
    return folder


def _pooled_site(sites: Mapping[str, Site], root: Path) -> Site:
    """All sites' packed pairs as one site, whose rules and delta are the mildest of theirs."""
    members = list(sites.values())
    identities = [site.cohort().identity for site in members]
    folder = root / hashlib.sha256(json.dumps(identities).encode()).hexdigest()[:16] / POOLED
    size = {site.settings.cohort.image_size for site in members}
    if len(size) > 1:
        raise SettingsError(f"the sites pack images at different sizes {sorted(size)}: use one image-size")
    table = folder.parent / "pool.csv"
    if not (folder / SITE_FILE).is_file():
        table = pool([site.folder for site in members], folder.parent)
    policies = [site.settings.policy for site in members]
    settings = {
        "version": 1,
        "name": POOLED,
        "cohort": {
            "table": str(table.resolve()),
            "patients-declared": sum(site.settings.cohort.patients_declared for site in members),
            "image-size": size.pop(),
            "salt": f"clipward/{POOLED}",
        },
        "policy": {
            "require-dp": False,
            "epsilon-max": max(policy.epsilon_max for policy in policies),
            "delta": max(site.delta for site in members),
            "min-patients": 2,
            "min-noise-multiplier": min(policy.min_noise_multiplier for policy in policies),
            "max-sample-rate": max(policy.max_sample_rate for policy in policies),
            "max-steps": len(members) * max(policy.max_steps for policy in policies),
            "max-rounds": max(policy.max_rounds for policy in policies),
        },
        "device": members[0].settings.device.model_dump(mode="json", by_alias=True),
    }
    _write_site(folder, settings)
    return Site.open(folder)


def _write_site(folder: Path, settings: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / SITE_FILE, "# Made for a comparison.\n" + tomli_w.dumps(settings))
