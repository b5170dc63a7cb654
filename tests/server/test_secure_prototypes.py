"""Prototypes of a round as a secure sum: the coordinator learns what all sites released together."""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import app as site_app
from client import secure
from client.site import Site
from clipward.simulate import simulate
from privacy.banks import PrototypeBank
from server.errors import QuorumError
from server.metrics import PrometheusExporter, effective, read_events
from server.prototypes import PROTOTYPES_FOLDER, PrototypeSum, largest_value
from strategies.messages import PROTOTYPE_SUMS, Arrays, Masked, Revealed, TrainRequest
from strategies.secure_sum import masks
from tests.server.cases import Killed, same
from tests.server.secure_runs import (
    NAMES,
    Overheard,
    Run,
    charges,
    dying,
    four_of,
    killed,
    with_claim,
)
from tests.small_hospitals import change_site, federation

TABLE = {"noise-multiplier": 2.0, "least-cosine": 0.01, "findings": ["effusion", "opacity"]}
NOISE = 2.0 * math.sqrt(2.5)  # of one site: multiplier times the bound that count-weight 0.5 leads to
Folded = list[tuple[Arrays, float]]


@pytest.fixture
def four(hospitals: Path) -> Path:
    return four_of(hospitals)


def run_of(four: Path, **changes: Any) -> Run:
    return Run(four, **{"prototypes": TABLE, **with_claim(four), **changes})


@pytest.fixture
def folded(monkeypatch: pytest.MonkeyPatch) -> Folded:
    """What was added up in a run."""
    taken: Folded = []
    fold = PrototypeSum.fold

    def listening(self: PrototypeSum, site: str, update: Arrays, weight: float) -> None:
        taken.append((update, weight))
        fold(self, site, update, weight)

    monkeypatch.setattr(PrototypeSum, "fold", listening)
    return taken


def exact(run: Run, names: list[str]) -> np.ndarray:
    """The sum of what these sites stored."""
    stored = [run.stored(name, "prototypes")[PROTOTYPE_SUMS] for name in names]
    return np.asarray(np.sum([one.astype(np.float64) for one in stored], axis=0))


def assert_summed(run: Run, folded: Folded, names: list[str]) -> None:
    """What was added up is the sum of these sites' releases within the stated error."""
    ((mean, weight),) = folded
    assert weight == len(names)
    grid = run.pledge_of("prototypes").terms.grid
    bound = len(names) * (
        grid.error(sites=len(names), weight=len(names)) + np.spacing(np.abs(mean[PROTOTYPE_SUMS]))
    )
    assert (np.abs(weight * mean[PROTOTYPE_SUMS].astype(np.float64) - exact(run, names)) <= bound).all()


def test_the_sum_is_that_of_the_stored_releases(four: Path, folded: Folded) -> None:
    run = run_of(four)
    run.go()
    assert_summed(run, folded, NAMES)
    terms = run.pledge_of("prototypes").terms
    assert terms.weighting == "equal"
    assert [one.weight for one in terms.participants] == [1] * 4
    assert [(event["phase"], event["sites"]) for event in run.events("sum_made")] == [
        ("prototypes", NAMES),
        ("train", NAMES),
    ]


def test_a_round_between_is_one_sum_and_uses_the_prototypes_of_before(four: Path) -> None:
    run = run_of(four, prototypes={**TABLE, "every": 2}, training={"rounds": 3})
    run.go()
    assert [(event["round"], event["phase"]) for event in run.events("sum_made")] == [
        (1, "prototypes"), (1, "train"), (2, "train"), (3, "prototypes"), (3, "train"),
    ]  # fmt: skip


def test_the_bank_is_the_one_that_the_same_releases_make_in_the_clear(four: Path) -> None:
    run = run_of(four)
    run.go()
    prototypes = run.prototypes
    plain = PrototypeSum(prototypes)
    for name in NAMES:
        plain.fold(name, run.stored(name, "prototypes"), weight=1)
    made = PrototypeBank.load(run.run_dir / PROTOTYPES_FOLDER / "round-0001.safetensors")
    expected = plain.bank(run.start.arrays)
    assert expected is not None
    np.testing.assert_allclose(made.image, expected.image, atol=1e-5)
    np.testing.assert_allclose(made.text, expected.text, atol=1e-5)
    (told,) = run.events("prototypes_made")
    assert {key: told[key] for key in plain.facts()} == dict(plain.facts())


def test_the_ledgers_are_charged_as_in_the_clear(four: Path) -> None:
    clear = run_of(four, secure=False, folder="plain")
    clear.go()
    spent = [Site.open(folder).ledger().spent() for folder in clear.folders]
    for folder in clear.folders:
        (folder / "ledger.sqlite").unlink()
        shutil.rmtree(folder / "releases")
    run = run_of(four)
    run.go()
    assert [Site.open(folder).ledger().spent() for folder in run.folders] == spent
    assert charges(run) == [2] * 4


def test_the_sites_train_with_what_was_made(four: Path) -> None:
    run = run_of(four)
    grid = Overheard(run)
    run.go(grid=grid)
    made = PrototypeBank.load(run.run_dir / PROTOTYPES_FOLDER / "round-0001.safetensors")
    trained = [said for _, said in grid.sent if isinstance(said, TrainRequest) and said.phase == "train"]
    assert len(trained) == 4
    assert all(
        one.prototypes is not None and np.array_equal(one.prototypes.image, made.image) for one in trained
    )


@pytest.mark.parametrize(
    ("answer", "summed"),
    [
        ("answer_request", ["site-1", "site-3", "site-4"]),
        ("answer_deal", ["site-1", "site-3", "site-4"]),
        ("answer_mask", ["site-1", "site-3", "site-4"]),
        ("answer_agree", NAMES),
        ("answer_unmask", NAMES),
    ],
)
def test_a_site_that_drops_out_is_not_in_the_sum_nor_its_noise_in_the_claim(
    answer: str, summed: list[str], four: Path, folded: Folded, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying(monkeypatch, answer, "site-2", times=1)
    run = run_of(four)
    run.go()
    assert_summed(run, folded, summed)
    (made,) = run.events("prototypes_made")
    assert made["sites"] == len(summed)
    cosine, width = 0.01, run.prototypes.width
    noise = math.sqrt(len(summed)) * NOISE * math.sqrt(width)
    assert made["least_count"] == pytest.approx(max(0.5, noise * cosine / math.sqrt(1 - cosine**2)))
    told = run.events("prototypes_refused" if answer == "answer_request" else "site_dropped_out")
    assert [(event["site"], event["code"]) for event in told] == [("site-2", "failed")]
    assert [event["sites"] for event in run.events("sum_made") if event["phase"] == "train"] == [NAMES]


@pytest.mark.parametrize("answer", ["answer_deal", "answer_mask", "answer_agree", "answer_unmask"])
def test_below_the_threshold_nothing_is_revealed_and_the_round_waits_at_no_cost(
    answer: str, four: Path, folded: Folded, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(four)
    grid = Overheard(run)
    with monkeypatch.context() as first:
        dying(first, answer, "site-2", "site-3", times=2)
        with pytest.raises(
            QuorumError, match=r"no secure sum of prototypes was made: 2 of 4 sites .* below the"
        ):
            run.go(grid=grid)
    revealed = [said for _, said in grid.replies if isinstance(said, Revealed)]
    assert len(revealed) == (2 if answer == "answer_unmask" else 0)
    assert folded == []
    assert charges(run) == [1] * 4
    run.go(resume=True)
    assert charges(run) == [2] * 4
    assert_summed(run, folded, NAMES)
    (failed,) = run.events("sum_failed")
    assert (failed["phase"], failed["attempt"]) == ("prototypes", 1)
    made = next(event for event in run.events("sum_made") if event["phase"] == "prototypes")
    assert made["attempt"] == 2


def test_a_round_is_repeated_for_its_prototypes_too(four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dying(monkeypatch, "answer_mask", "site-2", "site-3", times=2)
    run = run_of(four, strategy={"min-sites": 2, "round-retries": 1})
    run.go()
    (repeated,) = run.events("round_repeated")
    assert repeated["reason"].startswith("no secure sum of prototypes was made: 2 of 4 sites")
    assert charges(run) == [2] * 4


def test_a_round_whose_prototypes_are_lost_for_good_is_passed_over(
    four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying(monkeypatch, "answer_mask", "site-2", "site-3", times=2)
    run = run_of(four, **{"training": {"rounds": 2}, "secure-aggregation": {"skip-failed": True}})
    run.go()
    (skipped,) = run.events("round_skipped")
    assert skipped["round"] == 1
    assert "no secure sum of prototypes was made" in skipped["reason"]
    assert [event["replied"] for event in run.events("round_finished")] == [0, 4]
    kinds = [
        [charge.request.kind for charge in Site.open(folder).ledger().charges()] for folder in run.folders
    ]
    assert kinds == [["prototypes", "prototypes", "anchored"]] * 4


def test_sites_that_agreed_to_a_sum_of_prototypes_agree_to_no_other(
    four: Path, folded: Folded, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as first:
        dying(first, "answer_mask", "site-4")
        dying(first, "answer_unmask", "site-1")
        run = run_of(four)
        with pytest.raises(QuorumError, match="below the threshold"):
            run.go()
    assert run.pledge_of("prototypes").survivors == ("site-1", "site-2", "site-3")
    run.go(resume=True)
    assert_summed(run, folded, NAMES[:3])
    assert run.events("prototypes_made")[0]["sites"] == 3


def test_the_masks_of_two_phases_and_of_two_rounds_have_no_key_in_common(
    four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key of a pair or a site serves one sum: used for two updates it would give away their difference."""
    used: dict[str, set[bytes]] = {}
    add_mask = masks.add_mask

    def listening(total: Any, key: bytes, *, tensor: str, sign: masks.Sign) -> None:
        used.setdefault(tensor, set()).add(key)
        add_mask(total, key, tensor=tensor, sign=sign)

    monkeypatch.setattr(masks, "add_mask", listening)
    run_of(four, training={"rounds": 2}).go()
    a_sum = 4 + 6  # one for each site, one for each pair
    prototypes = used.pop(PROTOTYPE_SUMS)
    assert len(prototypes) == 2 * a_sum
    for tensor, keys in used.items():
        assert len(keys) == 2 * a_sum, tensor
        assert not keys & prototypes


def test_what_one_site_sends_looks_like_noise(four: Path) -> None:
    all_findings = {key: value for key, value in TABLE.items() if key != "findings"}
    run = run_of(four, prototypes=all_findings)
    grid = Overheard(run)
    run.go(grid=grid)
    masked = [said for _, said in grid.replies if isinstance(said, Masked) and PROTOTYPE_SUMS in said.arrays]
    assert [said.site for said in masked] == NAMES
    texts = "".join(repr(said) for _, said in grid.replies if not isinstance(said, Masked))
    fixed = run.pledge_of("prototypes").terms.grid
    plain = {name: run.stored(name, "prototypes")[PROTOTYPE_SUMS] for name in NAMES}
    for said in masked:
        words, values = said.arrays[PROTOTYPE_SUMS].reshape(-1), plain[said.site].reshape(-1)
        encoded = fixed.encode(values, weight=1)
        assert np.mean(words == encoded) < 0.01
        assert str(float(values[0])) not in texts
        for bits in (words, words - encoded):  # what was sent, and the masks themselves
            assert looks_random(bits)
            assert abs(np.corrcoef(bits.astype(float), values)[0, 1]) < 6 / math.sqrt(values.size)
    assert not looks_random(encoded)  # so the test can fail


def looks_random(words: np.ndarray) -> bool:
    """Every byte value about as often as every other: a chi-square of 255 degrees of freedom."""
    counts = np.bincount(words.view(np.uint8), minlength=256)
    expected = 4 * words.size / 256
    return float(((counts - expected) ** 2).sum() / expected) < 255 + 6 * math.sqrt(2 * 255)


def test_the_range_holds_for_all_declared_patients_on_one_concept() -> None:
    plan = federation(Path(), prototypes=TABLE).plan().prototypes
    assert plan is not None
    assert largest_value(plan, patients=1000) == pytest.approx(math.sqrt(2.5) * 1000 + 10 * NOISE)


def test_the_range_is_of_the_largest_site(four: Path) -> None:
    change_site(four / "hospitals" / "site-2", cohort={"patients-declared": 25})
    run = run_of(four)
    change_site(four / "hospitals" / "site-2", cohort={"patients-declared": 900})
    run.go()
    assert run.pledge_of("prototypes").terms.value_range == pytest.approx(math.sqrt(2.5) * 900 + 10 * NOISE)
    assert run.pledge.terms.value_range == 1.0


def test_masked_bytes_of_both_phases_are_counted(four: Path) -> None:
    run = run_of(four)
    arrays = run.go()
    events = read_events(run.run_dir / "metrics.jsonl")
    masked = [event for event in effective(events) if event["kind"] == "site_masked"]
    assert len(masked) == 2 * 4
    exporter = PrometheusExporter()
    exporter.replay(events)
    up = exporter.registry.get_sample_value("clipward_bytes_total", {"direction": "up", "site": "site-1"})
    sums = run.prototypes.like[PROTOTYPE_SUMS]
    assert up == sums.nbytes + sum(4 * value.size for value in arrays.values())


def test_sums_travel_in_full_precision_under_masks_only(tmp_path: Path) -> None:
    clear = federation(tmp_path, prototypes={}).plan().prototypes
    masked = federation(tmp_path, prototypes={}, **{"secure-aggregation": {}}).plan().prototypes
    assert clear is not None
    assert masked is not None
    assert (clear.wire, masked.wire) == ("bf16", "fp32")


@pytest.mark.parametrize("step", [1, 4, 6, 7, 8, 9, 12, 16])  # up to 8: of the prototypes
def test_killed_at_any_step_of_either_phase_and_resumed_it_ends_the_same(
    step: int, four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one site that fails in the phase of prototypes, before and after the kill."""
    answer = secure.answer_request

    def failing(site: Site, asked: TrainRequest) -> Any:
        if (site.name, asked.phase) == ("site-2", "prototypes"):
            raise MemoryError
        return answer(site, asked)

    monkeypatch.setattr(site_app, "answer_request", failing)
    whole = run_of(four, folder="whole")
    expected = whole.go()
    for folder in whole.folders:
        (folder / "ledger.sqlite").unlink()
        for kept in ("releases", "agreements"):
            shutil.rmtree(folder / kept)
    run = run_of(four)
    with pytest.raises(Killed):
        killed(run, die_at=step, monkeypatch=monkeypatch)
    assert same(run.go(resume=True), expected)
    assert charges(run) == [2, 1, 2, 2]
    assert run.events("prototypes_made")[-1]["sites"] == 3


@pytest.mark.slow
def test_clipward_simulate_sums_prototypes_in_secret_with_a_site_that_fails(
    four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = {
        **with_claim(four),
        "prototypes": TABLE,
        "training": {"rounds": 2},
        "strategy": {"min-sites": 2},
    }
    settings = federation(four, **tables, **{"secure-aggregation": {}})
    dying(monkeypatch, "answer_unmask", "site-3", times=1)
    result = simulate(settings, runs=four / "runs")
    made = [event for event in read_events(result.run_dir / "metrics.jsonl") if event["kind"] == "sum_made"]
    assert [(event["round"], event["phase"]) for event in made] == [
        (1, "prototypes"),
        (1, "train"),
        (2, "prototypes"),
        (2, "train"),
    ]
    assert result.report.is_file()
