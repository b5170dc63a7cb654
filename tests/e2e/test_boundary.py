"""Nothing of a patient leaves a hospital's folder, whatever fails on the way, and nothing depends on one.

The hospitals' files hold marker strings wherever a patient could be recognised. A whole run is searched for
them: every message, every file outside of the hospitals, the metrics page, all that was printed or logged.
Then runs on other patients are compared: only noised arrays may differ. Each search is shown to find what
was planted for it.
"""

import json
import logging
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import client.app
import client.secure
from client import answers, training
from client.cohort import SourceMissingError, dicom_folder, display, pairing
from client.cohort.packing import CohortWriter
from client.errors import Refused
from client.releases import ReleaseStore
from client.reports.index import ReportIndex
from client.site import Site, packed_cohort
from encoders.errors import EncoderError
from encoders.tokenizer import TextTokenizer
from privacy.bookkeeping import BookKeepingEngine
from privacy.ledger import Ledger
from privacy.mechanism import AnchoredDpSgd
from privacy.noise import GaussianNoise
from strategies.bundles import BundleStore
from strategies.messages import (
    Arrays,
    Refusal,
    RefusalCode,
    Release,
    ReleaseFacts,
    SiteFacts,
    decode,
    encode,
)
from tests.small_hospitals import PATIENTS, ROUNDS, STEPS, change_site, write_federation
from tests.watched import (
    EVERYTHING,
    MARKERS,
    PHRASE,
    At,
    Outside,
    raising,
    watching,
    write_hospital,
    write_site,
)

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

EXPORT = Path(__file__).parents[3] / "shared" / "data" / "dicom-hospital-ccby"
HEADS = ("text_projection.weight", "visual_projection.weight")


@pytest.fixture
def outside(made_hospitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Outside]:
    """Two hospitals full of markers, and every way out of them watched."""
    (tmp_path / "micro").symlink_to(made_hospitals / "micro")
    for name in ("north", "south"):
        write_hospital(tmp_path / "hospitals" / f"{MARKERS['folder']}-{name}", name)
    write_federation(tmp_path, strategy={"min-sites": 1})
    yield from watching(tmp_path, monkeypatch)


def hospital(outside: Outside, name: str = "south") -> Path:
    return outside.root / "hospitals" / f"{MARKERS['folder']}-{name}"


def incidents(folder: Path) -> dict[str, str]:
    """What the site's own log says, by incident."""
    entries = (folder / "site.log").read_text().split(" incident ")[1:]
    return {entry.split()[0]: entry for entry in entries}


def test_the_hospitals_really_hold_the_markers(outside: Outside) -> None:
    """Else a clean search would prove nothing; packed text is what training sees."""
    cohort = Site.open(hospital(outside)).cohort()
    assert len(cohort) == PATIENTS
    assert all(PHRASE in text.lower() for text in cohort.texts)


def test_a_run_without_failures_lets_nothing_out(outside: Outside) -> None:
    assert outside.run() == 0
    assert outside.codes() == {}
    assert outside.leaks() == []
    kinds = {type(decode(reply.content)).__name__ for reply in outside.replies}
    assert kinds == {"SiteFacts", "Installed", "Release"}
    assert any("clipward_epsilon_spent" in page.decode() for page in outside.pages)
    places = {place.partition("/")[0] for place, _ in outside.places()}
    assert {"message 0", "runs", "federation.toml", "what was printed", "the log", ""} <= places


def quoting(error: type[Exception]) -> Callable[..., Any]:
    return raising(error(EVERYTHING))


def for_releases(other: Callable[..., Any]) -> Callable[..., Any]:
    """Instead of encoding a release; a refusal is encoded as ever."""

    def chosen(original: Callable[..., Any], message: Any) -> Any:
        return other(original, message) if isinstance(message, Release) else original(message)

    return chosen


def malformed(*_: Any) -> Any:
    record = encode(Refusal(site="south", code=RefusalCode.FAILED, incident="0"))
    record["facts"]["json"] = '{"site": "south"}'
    return record


def not_a_number(*_: Any, **__: Any) -> Arrays:
    return {name: np.full((8, 16), np.nan, dtype=np.float32) for name in HEADS}


# Layer, where it fails and how, the code that leaves, and whether the site's log must hold the marked cause:
# not where one file is left out, and not where the coordinator is who finds the answer wanting.
Layer = tuple[str, Any, str, Callable[..., Any], str, bool]
LAYERS: list[Layer] = [
    ("policy", answers, "check_plan", quoting(ValueError), "failed", True),
    ("mechanism chosen", answers, "mechanism_for", quoting(ArithmeticError), "failed", True),
    ("ledger opened", Site, "ledger", raising(PermissionError(13, "denied", EVERYTHING)), "failed", True),
    ("ledger charged", Ledger, "reserve", quoting(sqlite3.OperationalError), "failed", True),
    ("ledger closed", Ledger, "released", quoting(sqlite3.IntegrityError), "failed", True),
    ("ledger asked", Ledger, "spent", quoting(ZeroDivisionError), "failed", True),
    ("cohort opened", answers, "packed_cohort", quoting(SourceMissingError), "cohort", True),
    ("cohort scanned", dicom_folder, "read_header", raising(OSError(5, "bad", EVERYTHING)), "failed", True),
    ("report kept", ReportIndex, "add", quoting(UnicodeError), "failed", True),
    ("image decoded", display, "display_image", quoting(SystemError), "cohort", False),
    ("report read", pairing, "parse", quoting(IndexError), "failed", True),
    ("cohort written", CohortWriter, "add", raising(OSError(28, "full", EVERYTHING)), "failed", True),
    ("bundle loaded", BundleStore, "load", quoting(OSError), "failed", True),
    ("model made", answers, "part_of", quoting(EncoderError), "model", True),
    ("text tokenized", TextTokenizer, "__call__", quoting(OverflowError), "failed", True),
    ("anchors encoded", answers, "anchors_of", quoting(ValueError), "failed", True),
    ("patients drawn", training, "poisson_sample", quoting(KeyError), "failed", True),
    ("gradients clipped", BookKeepingEngine, "clipped_sum", quoting(RuntimeError), "failed", True),
    ("noise added", GaussianNoise, "add_to", quoting(FloatingPointError), "failed", True),
    ("mechanism run", AnchoredDpSgd, "release", quoting(MemoryError), "failed", True),
    ("facts gathered", answers, "_facts", quoting(AttributeError), "failed", True),
    ("release looked up", ReleaseStore, "find", raising(OSError(5, "bad", EVERYTHING)), "failed", True),
    ("release stored", ReleaseStore, "store", raising(OSError(28, "full", EVERYTHING)), "failed", True),
    ("release cleared", client.secure, "check_release", quoting(RecursionError), "failed", True),
    ("release encoded", client.app, "encode", for_releases(quoting(TypeError)), "failed", True),
    ("reply malformed", client.app, "encode", for_releases(malformed), "message", False),
    ("reply useless", answers, "train_privately", not_a_number, "message", False),
]
# These work once and are remembered, unless the memory is dropped.
ONCE = (dicom_folder, ReportIndex, display, pairing, CohortWriter, BundleStore, TextTokenizer)


def test_a_failure_in_any_layer_lets_out_a_code_and_nothing_else(
    outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run; in each round another layer of one site fails, and its text holds all markers."""
    rounds = len(LAYERS)
    write_federation(
        outside.root, strategy={"min-sites": 1}, training={"rounds": rounds}, evaluation={"every": rounds}
    )
    # Each round is another event to account for, and the slowest of three accountants has tests of its own.
    monkeypatch.setattr("privacy.accounting._opacus_rdp_epsilon", lambda *_: 1e9)
    south = At("south", monkeypatch)
    for number, (_, owner, name, failure, _, _) in enumerate(LAYERS, start=1):
        south.put(owner, name, failure, server_round=number, fresh=owner in ONCE)
    assert outside.run() == 0
    wanted = {layer: code for layer, *_, code, _ in LAYERS}
    assert {LAYERS[number - 1][0]: code for number, code in outside.codes().items()} == wanted
    assert outside.leaks() == []
    known = incidents(hospital(outside))
    for event, (layer, *_, quoted) in zip(outside.events("site_refused"), LAYERS, strict=True):
        assert not quoted or PHRASE in known[event["incident"]], layer
    counted = (hospital(outside) / "refusals.jsonl").read_text().splitlines()
    assert [json.loads(line)["incident"] for line in counted] == list(known)
    assert not (hospital(outside, "north") / "site.log").exists()


def test_a_ledger_that_is_locked_lets_nothing_out(outside: Outside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("privacy.ledger._LOCK_TIMEOUT_SECONDS", 0.05)
    Site.open(hospital(outside)).ledger()
    with closing(sqlite3.connect(hospital(outside) / "ledger.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert outside.run() == 0
    assert set(outside.codes().values()) == {"failed"}
    assert outside.leaks() == []
    assert "database is locked" in (hospital(outside) / "site.log").read_text()


def test_a_ledger_that_was_tampered_with_lets_nothing_out(outside: Outside) -> None:
    path = hospital(outside) / "ledger.sqlite"
    Site.open(path.parent).ledger()
    path.write_bytes(path.read_bytes().replace(b'"opened"', b'"OPENED"'))
    assert outside.run() == 0
    assert set(outside.codes().values()) == {"ledger"}
    assert outside.leaks() == []
    assert "LedgerTampered" in (path.parent / "site.log").read_text()


def test_a_site_file_that_breaks_during_the_run_lets_nothing_out(
    outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_it(*_: Any, **__: Any) -> Any:
        change_site(hospital(outside), policy={EVERYTHING: 1})
        raise RuntimeError(EVERYTHING)

    At("south", monkeypatch).put(answers, "train_privately", break_it)
    assert outside.run() == 0
    assert outside.codes() == {1: "failed"}  # from then on it has no name to refuse under
    assert outside.leaks() == []
    assert "unknown key" in (hospital(outside) / "site.log").read_text()


@pytest.mark.skipif(not EXPORT.is_dir(), reason="the real hospital export is not beside the project")
def test_a_real_hospitals_export_stays_in_its_folder(
    outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real files in many transfer syntaxes, with broken ones; their own list of what must not be seen."""
    canaries = {f"canary {text}": text for text in json.loads((EXPORT / "canaries.json").read_text())}
    folder = outside.root / "hospitals" / "export"
    reports = EXPORT / "reports.csv"
    write_site(folder, "export", dicom=str(EXPORT), reports=str(reports))
    texts = Site.open(folder).cohort().texts
    assert len(texts) >= 8
    forbidden = {**MARKERS, **canaries, **{f"text {number}": text for number, text in enumerate(texts)}}
    at = At("export", monkeypatch)
    at.put(answers, "train_privately", raising(RuntimeError(" ".join(forbidden.values()))), server_round=2)
    at.put(pairing, "parse", _quoting_its_argument, server_round=3, fresh=True)
    assert outside.run() == 0
    assert outside.codes() == {2: "failed", 3: "failed"}
    assert outside.leaks(forbidden) == []
    log = (folder / "site.log").read_text()
    assert all(canary in log for canary in canaries.values())


def _quoting_its_argument(_: Any, report: str) -> Any:
    raise ValueError(report)


def test_the_search_finds_an_answer_that_quotes_its_cause(
    outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted mistake: an exception's text where its number belongs."""

    def quoted(folder: Path | None, name: str, cause: Exception) -> Refusal:
        return Refusal(site=name, code=RefusalCode.FAILED, incident=str(cause)[:60])

    At("south", monkeypatch).put(answers, "train_privately", quoting(RuntimeError))
    monkeypatch.setattr(client.app, "_refusal", quoted)
    assert outside.run() == 0
    leaks = "\n".join(outside.leaks())
    assert "patient name in message" in leaks
    assert "patient name in runs/small/metrics.jsonl" in leaks
    assert "patient name in what was printed" in leaks


def test_the_search_finds_a_name_in_the_log_in_arrays_and_in_a_file(
    outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    def telling(*_: Any, **__: Any) -> Any:
        logging.getLogger("clipward.client").warning("skipped %s", MARKERS["patient id"])
        (outside.root / "tmp" / "left.behind").write_text(PHRASE)
        name = np.frombuffer(MARKERS["patient name"][:8].encode(), dtype=np.float32)
        arrays = not_a_number()
        for value in arrays.values():
            value[:] = 0
            value.flat[: len(name)] = name
        return arrays

    monkeypatch.setitem(MARKERS, "patient name", MARKERS["patient name"][:8])
    At("south", monkeypatch).put(answers, "train_privately", telling)
    outside.run()
    leaks = "\n".join(outside.leaks())
    assert "patient id in the log" in leaks
    assert "patient name in message" in leaks
    assert "report in tmp/left.behind" in leaks


COHORTS: dict[str, dict[str, Any]] = {
    "as declared": {},
    "other images and reports": {"seed": 1},
    "fewer patients than the policy wants": {"patients": 6, "seed": 2},
    "more patients, of two studies": {"patients": 40, "studies": 2, "seed": 3},
}


@pytest.fixture
def a_slow_machine_is_no_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds are rounded up to far more than any round here takes; `test_answers` knows the real step."""
    monkeypatch.setattr(answers, "COARSE_SECONDS", 600)


def stories(outside: Outside, *cohorts: str) -> list[list[str]]:
    """What is told outside when the second hospital has these patients; its noise has a fixed seed."""
    told = []
    for cohort in cohorts:
        write_hospital(hospital(outside), "south", **COHORTS[cohort])
        for name in ("north", "south"):
            change_site(hospital(outside, name), testing={"insecure-noise-seed": 7})
        outside.forget()
        assert outside.run() == 0
        assert len(np.unique(Site.open(hospital(outside)).cohort().patients)) == COHORTS[cohort].get(
            "patients", PATIENTS
        )
        told.append(outside.story())
    return told


@pytest.mark.usefixtures("a_slow_machine_is_no_leak")
def test_nothing_but_noised_arrays_depends_on_the_patients(outside: Outside) -> None:
    """Whoever they are and however many: every message, event and line of the log is the same, bit for bit.

    Masked are clocks, and the ledger's head with its signature: a hash of salted rows. Of the hospital with
    fewer patients than it wants, its own log says so, and nothing else does.
    """
    first, *others = stories(outside, *COHORTS)
    assert sum(line.startswith("arrays/text_projection") for line in first) == 2 * 2 * ROUNDS
    for cohort, other in zip(list(COHORTS)[1:], others, strict=True):
        assert other == first, cohort
    stories(outside, "fewer patients than the policy wants")
    assert "training patients, policy.min-patients is 10" in (hospital(outside) / "site.log").read_text()


def raw_facts(field: str, measure: Callable[[Site], float]) -> Callable[[pytest.MonkeyPatch], None]:
    """The planted mistake: something measured on patients stands in a public fact."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        honest: Callable[..., ReleaseFacts] = vars(answers)["_facts"]

        def telling(site: Site, *args: Any, **kwargs: Any) -> ReleaseFacts:
            return honest(site, *args, **kwargs).model_copy(update={field: measure(site)})

        monkeypatch.setattr(answers, "_facts", telling)

    return plant


def brightness(site: Site) -> float:
    """Stands for a loss: some function of the site's images."""
    return float(packed_cohort(site.folder).images[:].mean())


def patients(site: Site) -> int:
    return len(np.unique(packed_cohort(site.folder).patients))


def greeted_by_its_true_size(monkeypatch: pytest.MonkeyPatch) -> None:
    honest: Callable[..., SiteFacts] = vars(client.app)["answer_hello"]

    def telling(site: Site, hello: Any) -> SiteFacts:
        return honest(site, hello).model_copy(update={"patients_declared": patients(site)})

    monkeypatch.setattr(client.app, "answer_hello", telling)


def logged_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = BookKeepingEngine.clipped_sum

    def telling(self: BookKeepingEngine, *args: Any, **kwargs: Any) -> Any:
        raw_sum = honest(self, *args, **kwargs)
        norm = sum(float(value.square().sum()) for value in raw_sum.values()) ** 0.5
        logging.getLogger("clipward.privacy.engine").info("step of norm %.3f", norm)
        return raw_sum

    monkeypatch.setattr(BookKeepingEngine, "clipped_sum", telling)


def refused_by_true_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a minimum that is held to the true number would."""

    def strict(site: Site, *_: Any, **__: Any) -> None:
        if patients(site) < PATIENTS:
            raise Refused(RefusalCode.COHORT, "too few")

    monkeypatch.setattr(answers, "_mind_small_cohort", strict)


@pytest.mark.usefixtures("a_slow_machine_is_no_leak")
@pytest.mark.parametrize(
    "plant",
    [
        pytest.param(raw_facts("max_grad_norm", brightness), id="a loss in the facts"),
        pytest.param(raw_facts("patients_declared", patients), id="the true count as weight"),
        pytest.param(raw_facts("steps", patients), id="a batch size as steps"),
        pytest.param(raw_facts("seconds", lambda site: 10.0 + patients(site) / 1000), id="exact seconds"),
        pytest.param(greeted_by_its_true_size, id="the true count in a greeting"),
        pytest.param(logged_norm, id="a norm in the log"),
        pytest.param(refused_by_true_size, id="a refusal that counts"),
    ],
)
def test_the_comparison_finds_what_was_measured_on_patients(
    plant: Callable[[pytest.MonkeyPatch], None], outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_round = {"rounds": 1, "steps": ROUNDS * STEPS}  # for which the noise has been found already
    write_federation(outside.root, strategy={"min-sites": 1}, training=one_round)
    plant(monkeypatch)
    one, other = stories(outside, "as declared", "fewer patients than the policy wants")
    assert one != other
