"""Whole rounds as secure sums, over four real hospitals in this process."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from client.site import PINS_FILE, Site
from clipward.simulate import simulate, with_keys
from server import app as coordinator_app
from server import checkpoints, secure_exchange
from server.errors import QuorumError, RunError
from server.federation import Federation
from server.metrics import PrometheusExporter, read_events
from server.secure_exchange import SUMS_FOLDER, Pledge, Pledges
from strategies.messages import (
    DEAL,
    MASK,
    Masked,
    Ready,
    RefusalCode,
    TrainRequest,
    decode,
    encode,
)
from strategies.settings import SettingsError
from tests.server.cases import Killed, close, same
from tests.server.secure_runs import (
    NAMES,
    Overheard,
    Run,
    charges,
    dying,
    four_of,
    killed,
    sites_of,
    with_claim,
)
from tests.small_hospitals import federation, without_claim

KEYS = {name: f"{number}{number}" * 32 for number, name in enumerate(NAMES)}


@pytest.fixture
def four(hospitals: Path) -> Path:
    return four_of(hospitals)


@pytest.mark.parametrize("weighting", ["declared", "equal"])
def test_the_result_is_that_of_the_plain_federation(weighting: str, four: Path) -> None:
    changes: dict[str, Any] = {
        "training": {"rounds": 3},
        "strategy": {"min-sites": 2, "weighting": weighting},
    }
    plain = Run(four, secure=False, folder="plain", name="plain", **changes).go()
    masked = Run(four, name="masked", **changes)
    arrays = masked.go()
    assert close(arrays, plain)
    assert [event["sites"] for event in masked.events("sum_made")] == [NAMES] * 3
    assert [event["replied"] for event in masked.events("round_finished")] == [4] * 3


def test_one_round_is_within_the_stated_error(four: Path) -> None:
    run = Run(four)
    arrays, terms = run.go(), run.pledge.terms
    bound = terms.grid.error(sites=4, weight=terms.weight_of(NAMES))
    exact = run.moved_by(NAMES)
    for name, value in arrays.items():
        rounding = 2 * np.spacing(np.abs(value))  # float32: of the mean, and of the new weight
        assert (np.abs(value - exact[name]) <= bound + rounding).all()
    assert any(np.abs(exact[name] - value).max() > 0 for name, value in arrays.items())


def test_with_privacy_the_ledgers_and_the_result_are_those_of_the_plain_federation(four: Path) -> None:
    private = with_claim(four)
    plain = Run(four, secure=False, folder="plain", **private)
    expected = plain.go()
    spent = [Site.open(folder).ledger().spent() for folder in plain.folders]
    for folder in plain.folders:
        (folder / "ledger.sqlite").unlink()
        shutil.rmtree(folder / "releases")
    run = Run(four, **private)
    arrays = run.go()
    assert close(arrays, expected)
    assert [Site.open(folder).ledger().spent() for folder in run.folders] == spent
    assert all(event["insecure_seed"] for event in run.events("site_replied"))


def test_what_the_coordinator_is_sent_holds_no_update_in_the_clear(four: Path) -> None:
    run = Run(four, model={"encoder": str(four / "micro")}, share={"part": "full"})
    grid = Overheard(run)
    run.go(grid=grid)
    with_arrays = [said for _, said in grid.replies if isinstance(said, Masked)]
    assert [said.site for said in with_arrays] == NAMES
    texts = "".join(repr(said) for _, said in grid.replies if not isinstance(said, Masked))
    grid_of = run.pledge.terms.grid
    for said in with_arrays:
        update = run.stored(said.site)
        weight = run.pledge.terms.by_name[said.site].weight
        words = np.concatenate([said.arrays[name].reshape(-1) for name in sorted(update)])
        encoded = np.concatenate(
            [grid_of.encode(update[name], weight=weight).reshape(-1) for name in sorted(update)]
        )
        assert words.dtype == np.uint32
        assert np.mean(words == encoded) < 0.001
        assert str(float(next(iter(update.values())).reshape(-1)[0])) not in texts
        for bits in (words, words - encoded):  # what was sent, and the masks themselves
            counts = np.bincount(bits >> 24, minlength=256)
            statistic = float(((counts - words.size / 256) ** 2).sum() / (words.size / 256))
            assert statistic < 255 + 6 * np.sqrt(2 * 255)
            assert abs(np.corrcoef(bits.astype(float), encoded.astype(np.int32))[0, 1]) < 0.05
    # The words that an unmasked update would be fail the same test, so it can fail.
    counts = np.bincount(encoded >> 24, minlength=256)
    assert ((counts - words.size / 256) ** 2).sum() / (words.size / 256) > 10_000


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
def test_a_site_that_dies_at_any_step_holds_up_nobody(
    answer: str, summed: list[str], four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying(monkeypatch, answer, "site-2")
    run = Run(four)
    arrays = run.go()
    assert close(arrays, run.moved_by(summed))
    (made,) = run.events("sum_made")
    assert made["sites"] == summed
    (end,) = run.events("round_finished")
    assert (end["replied"], end["refused"]) == (len(summed), 4 - len(summed))
    told = run.events("site_refused" if answer == "answer_request" else "site_dropped_out")
    assert {(event["site"], event["code"]) for event in told} == {("site-2", "failed")}


@pytest.mark.parametrize("answer", ["answer_deal", "answer_mask", "answer_agree", "answer_unmask"])
def test_below_the_threshold_nothing_is_summed_and_the_round_is_repeated_at_no_cost(
    answer: str, four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying(monkeypatch, answer, "site-2", "site-3", times=2)
    private = with_claim(four)
    run = Run(four, strategy={"min-sites": 2, "round-retries": 1}, **private)
    arrays = run.go()
    (failed,) = run.events("sum_failed")
    assert "2 of 4 sites" in failed["reason"]
    assert "below the threshold of 3" in failed["reason"]
    (made,) = run.events("sum_made")
    assert (made["attempt"], made["sites"]) == (2, NAMES)
    assert close(arrays, run.moved_by(NAMES))
    assert charges(run) == [1] * 4


def test_without_a_sum_the_run_stops_and_says_why(four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dying(monkeypatch, "answer_mask", "site-2", "site-3")
    run = Run(four)
    with pytest.raises(
        QuorumError, match=r"site-2 failed, site-3 failed\. no secure sum was made: 2 of 4 sites sent"
    ):
        run.go()
    monkeypatch.undo()
    assert close(run.go(resume=True), run.moved_by(NAMES))


def test_sites_that_saw_the_sum_of_some_complete_that_one_and_no_other(
    four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as first:
        dying(first, "answer_mask", "site-4")
        dying(first, "answer_unmask", "site-1")
        run = Run(four)
        with pytest.raises(QuorumError, match="below the threshold"):
            run.go()
    assert run.pledge.survivors == ("site-1", "site-2", "site-3")
    with monkeypatch.context() as second:
        dying(second, "answer_mask", "site-2")
        with pytest.raises(QuorumError, match="2 of 4 sites sent a masked update"):
            run.go(resume=True)
    arrays = run.go(resume=True)
    assert run.events("sum_made")[0]["sites"] == ["site-1", "site-2", "site-3"]
    assert run.events("sum_made")[0]["attempt"] == 3
    assert close(arrays, run.moved_by(["site-1", "site-2", "site-3"]))


def test_a_site_that_agreed_and_is_gone_is_waited_for_by_name_or_the_round_is_passed_over(
    four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(four, training={"rounds": 2})
    with monkeypatch.context() as first:
        dying(first, "answer_unmask", "site-1", "site-2")
        with pytest.raises(QuorumError):
            run.go()
    dying(monkeypatch, "answer_mask", "site-4", times=2)
    with pytest.raises(QuorumError, match="agree to no other; missing: site-4: go on when they are back"):
        run.go(resume=True)
    table = run.settings.secure_aggregation
    assert table is not None
    skipping = table.model_copy(update={"skip_failed": True})
    run.settings = run.settings.model_copy(update={"secure_aggregation": skipping})
    arrays = run.go(resume=True)
    assert [event["round"] for event in run.events("round_skipped")] == [1]
    assert [event["replied"] for event in run.events("round_finished")] == [0, 4]
    skipped, after = (
        checkpoints._load(run.run_dir / "checkpoints" / f"round-000{number}", number).arrays
        for number in (1, 2)
    )
    assert same(skipped, run.start.arrays)
    assert same(after, arrays)
    assert not close(after, run.start.arrays)


def test_a_coordinator_that_forgot_what_it_asked_is_refused(
    four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attack: the same updates in two sums, whose difference is one hospital's."""
    with monkeypatch.context() as first:
        dying(first, "answer_unmask", "site-1", "site-2", "site-3")
        dying(first, "answer_mask", "site-4")
        run = Run(four)
        with pytest.raises(QuorumError):
            run.go()
    forged = run.pledge.model_copy(update={"survivors": None})
    Pledges(folder=run.run_dir / SUMS_FOLDER).keep(forged)
    with pytest.raises(QuorumError, match="1 of 4 sites agreed to the sum"):
        run.go(resume=True)
    refused = [event for event in run.events("site_dropped_out") if event["step"] == "consent"]
    assert {event["site"] for event in refused[-3:]} == {"site-1", "site-2", "site-3"}
    assert "agreed before to sum its answer to this request" in (run.folders[0] / "site.log").read_text()


def test_sites_bound_to_a_sum_are_asked_alone(four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as first:
        dying(first, "answer_mask", "site-1", "site-2")
        run = Run(four)
        run.folders.pop()  # site-4 joins later
        with pytest.raises(QuorumError):
            run.go()
    run.folders.append(four / "hospitals" / "site-4")
    run.go(resume=True)
    assert run.events("round_started")[-1]["sites"] == NAMES[:3]
    assert run.events("sum_made")[0]["sites"] == NAMES[:3]


def test_the_terms_of_a_masked_request_stay_although_a_site_is_gone(
    four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as first:
        dying(first, "answer_mask", "site-3", "site-4")
        run = Run(four)
        with pytest.raises(QuorumError):
            run.go()
    run.folders.pop()
    run.go(resume=True)
    assert run.pledge.terms.names == tuple(NAMES)
    assert run.events("sum_made")[0]["sites"] == NAMES[:3]


@pytest.mark.parametrize("step", range(10))
def test_killed_at_any_step_and_resumed_the_result_is_the_same(
    step: int, four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(four)
    with pytest.raises(Killed):
        killed(run, die_at=step, monkeypatch=monkeypatch)
    arrays = run.go(resume=True)
    assert same(arrays, run.summed(NAMES))


def test_a_key_swapped_in_the_federation_file_is_caught_by_the_sites(four: Path) -> None:
    run = Run(four)
    table = run.settings.secure_aggregation
    assert table is not None
    keys = {**table.sites, "site-2": "ab" * 32}
    run.settings = run.settings.model_copy(
        update={"secure_aggregation": table.model_copy(update={"sites": keys})}
    )
    with pytest.raises(QuorumError, match="policy"):
        run.go()
    assert {event["code"] for event in run.events("site_refused")} == {"policy"}
    assert "the key of 'site-2' is not the one pinned here" in (run.folders[0] / "site.log").read_text()
    assert not (run.folders[0] / "releases").exists()


def test_keys_swapped_on_the_way_are_caught_by_the_sites(four: Path) -> None:
    mine: dict[str, Any] = {}

    def swap(action: str, message: Message) -> Message:
        if action != f"to {DEAL}":
            return message
        asked: Any = decode(message.content)
        first, *rest = asked.offers
        mine.setdefault("key", "cd" * 32)
        forged = asked.model_copy(
            update={"offers": (type(first)(**{**vars(first), "mask_key": mine["key"]}), *rest)}
        )
        return Message(encode(forged), message.metadata.dst_node_id, message.metadata.message_type)

    run = Run(four)
    with pytest.raises(QuorumError, match="0 of 4 sites dealt shares"):
        run.go(grid=Overheard(run, swap))
    assert "were swapped, or belong to another round" in (run.folders[1] / "site.log").read_text()


def test_a_site_that_sends_nonsense_drops_out(four: Path) -> None:
    def nonsense(action: str, reply: Message) -> Message:
        said = decode(reply.content) if action == MASK else None
        if not isinstance(said, Masked) or said.site != "site-2":
            return reply
        arrays = {name: value.astype(np.float32) for name, value in said.arrays.items()}
        return Message(encode(Masked(site="site-2", arrays=arrays)), reply_to=_asked(reply))

    run = Run(four)
    arrays = run.go(grid=Overheard(run, nonsense))
    assert [(one["site"], one["code"]) for one in run.events("site_dropped_out")] == [("site-2", "message")]
    assert close(arrays, run.moved_by(["site-1", "site-3", "site-4"]))


def test_a_site_cannot_mask_for_another(four: Path) -> None:
    def other(action: str, reply: Message) -> Message:
        said = decode(reply.content) if action == MASK else None
        if not isinstance(said, Masked) or said.site != "site-2":
            return reply
        return Message(encode(Masked(site="site-3", arrays=said.arrays)), reply_to=_asked(reply))

    run = Run(four)
    run.go(grid=Overheard(run, other))
    assert [(one["site"], one["code"]) for one in run.events("site_dropped_out")] == [("site-2", "message")]


def test_a_site_cannot_answer_for_another(four: Path) -> None:
    def other(action: str, reply: Message) -> Message:
        said = decode(reply.content)
        if not isinstance(said, Ready) or said.facts.site != "site-2":
            return reply
        stolen = type(said.offer)(**{**vars(said.offer), "site": "site-3"})
        return Message(encode(said.model_copy(update={"offer": stolen})), reply_to=_asked(reply))

    run = Run(four)
    run.go(grid=Overheard(run, other))
    assert [(one["site"], one["code"]) for one in run.events("site_refused")] == [("site-2", "message")]


def _asked(reply: Message) -> Message:
    """A message that another reply may be made for."""
    asked = Message(RecordDict({}), reply.metadata.src_node_id, reply.metadata.message_type)
    asked.metadata.__dict__["_message_id"] = reply.metadata.reply_to_message_id
    return asked


def test_a_value_beyond_the_range_is_refused_by_its_site(four: Path) -> None:
    run = Run(four)
    table = run.settings.secure_aggregation
    assert table is not None
    narrow = table.model_copy(update={"value_range": 1e-6})
    run.settings = run.settings.model_copy(update={"secure_aggregation": narrow})
    with pytest.raises(QuorumError, match="0 of 4 sites sent a masked update"):
        run.go()
    assert {event["code"] for event in run.events("site_dropped_out")} == {"policy"}
    assert "beyond the agreed range" in (run.folders[0] / "site.log").read_text()


def test_a_site_without_a_key_in_the_file_is_not_asked(four: Path) -> None:
    run = Run(four)
    table = run.settings.secure_aggregation
    assert table is not None
    keys = {name: key for name, key in table.sites.items() if name != "site-4"}
    run.settings = run.settings.model_copy(
        update={"secure_aggregation": table.model_copy(update={"sites": keys})}
    )
    run.go()
    assert run.events("sum_made")[0]["sites"] == NAMES[:3]
    (refused,) = run.events("site_refused")
    assert (refused["site"], refused["code"]) == ("site-4", RefusalCode.POLICY)


def test_masked_bytes_are_counted(four: Path) -> None:
    run = Run(four)
    arrays = run.go()
    exporter = PrometheusExporter()
    exporter.replay(read_events(run.run_dir / "metrics.jsonl"))
    up = exporter.registry.get_sample_value("clipward_bytes_total", {"direction": "up", "site": "site-1"})
    assert up == sum(4 * value.size for value in arrays.values())


def test_a_damaged_pledge_stops_the_run(four: Path) -> None:
    run = Run(four)
    (run.run_dir / SUMS_FOLDER).mkdir(parents=True)
    (run.run_dir / SUMS_FOLDER / "round-0001.json").write_text("{}")
    with pytest.raises(RunError, match=r"round-0001\.json is damaged: restore it"):
        run.go()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"strategy": {"name": "median", "min-sites": 3}}, "'median' looks at single updates"),
        ({"strategy": {"name": "q-ffl"}}, "'q-ffl' looks at single updates"),
        ({"strategy": {"name": "afl"}}, "'afl' looks at single updates"),
        ({"share": {"wire": "bf16"}}, r"share\.wire 'bf16' cannot be summed under masks"),
        ({"strategy": {"late": "stale"}}, r"strategy\.late has to be 'drop'"),
        ({"strategy": {"min-sites": 4}, "secure-aggregation": {"threshold": 3}}, "fewer than min-sites = 4"),
        (
            {"secure-aggregation": {"threshold": 2, "sites": KEYS}},
            "has to be more than half of the 4 sites",
        ),
        ({"secure-aggregation": {"sites": {"a": "ab" * 32, "b": "ab" * 32}}}, "two sites have one key"),
        ({"secure-aggregation": {"sites": {"a": "site.pub"}}}, "String should match pattern"),
        ({"secure-aggregation": {"value-range": 0}}, "greater than or equal"),
    ],
)  # fmt: skip
def test_settings_of_which_no_sum_can_be_made_are_refused(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=reason):
        federation(tmp_path, **without_claim(**{"secure-aggregation": {}, **changes}))


def test_without_a_simulation_the_file_has_to_name_the_keys(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"secure-aggregation\.sites has to name every site's public key"):
        federation(tmp_path, simulation=None, **{"secure-aggregation": {}})


def test_a_threshold_that_the_simulated_sites_do_not_meet_is_refused(four: Path) -> None:
    with pytest.raises(SettingsError, match="more than half of the 4 sites"):
        with_keys(federation(four, **{"secure-aggregation": {"threshold": 5}}), sites_of(four))


def test_a_simulation_gives_its_sites_their_keys(four: Path) -> None:
    settings = federation(four, **{"secure-aggregation": {}})
    made = with_keys(settings, sites_of(four))
    assert made.secure_aggregation is not None
    assert sorted(made.secure_aggregation.sites) == NAMES
    for folder in sites_of(four):
        site = Site.open(folder)
        assert site.pins() == made.secure_aggregation.sites
        assert site.pins()[site.name] == (folder / "site.pub").read_text().strip()
    assert with_keys(made, sites_of(four)) is made
    plain = federation(four)
    assert with_keys(plain, sites_of(four)) is plain


def test_clipward_simulate_sums_in_secret(four: Path) -> None:
    settings = federation(
        four, **without_claim(**{"training": {"rounds": 1}, "secure-aggregation": {"threshold": 4}})
    )
    result = simulate(settings, runs=four / "runs")
    assert result.report.is_file()
    events = read_events(result.run_dir / "metrics.jsonl")
    assert [event["sites"] for event in events if event["kind"] == "sum_made"] == [NAMES]
    assert (four / "hospitals" / "site-1" / PINS_FILE).is_file()


def test_where_nobody_makes_keys_the_file_has_to_name_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = federation(tmp_path, **{"secure-aggregation": {}})
    monkeypatch.setattr(Federation, "load", lambda _: settings)

    class Context:
        run_config = {"federation": "federation.toml", "run-dir": "", "resume": False}  # noqa: RUF012

    with pytest.raises(RunError, match=r"secure-aggregation\.sites has to name every site's public key"):
        coordinator_app.main(None, Context())


def test_the_range_is_part_of_what_a_run_is(four: Path) -> None:
    run = Run(four, training={"rounds": 1})
    run.go()
    table = run.settings.secure_aggregation
    assert table is not None
    run.settings = run.settings.model_copy(
        update={"secure_aggregation": table.model_copy(update={"value_range": 2.0})}
    )
    with pytest.raises(RunError, match=r"secure-aggregation\.value-range was 1\.0, is 2\.0"):
        run.go(resume=True)


def test_what_binds_is_written_before_a_site_can_learn_of_it(
    four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(four)
    seen: list[tuple[str, bool, bool]] = []

    def looking(action: str, message: Message) -> Message:
        if action.startswith("to "):
            path = run.run_dir / SUMS_FOLDER / "round-0001.json"
            pledge = Pledge.model_validate_json(path.read_text()) if path.is_file() else None
            found = pledge is not None and pledge.masked, pledge is not None and pledge.survivors is not None
            seen.append((action.removeprefix("to ").removeprefix("query."), *found))
        return message

    run.go(grid=Overheard(run, looking))
    assert {one for one in seen if one[0] == "mask"} == {("mask", True, False)}
    assert {one for one in seen if one[0] == "consent"} == {("consent", True, True)}
    assert {one for one in seen if one[0] == "deal"} == {("deal", False, False)}


def test_the_request_names_terms_of_itself(four: Path) -> None:
    run = Run(four)
    grid = Overheard(run)
    run.go(grid=grid)
    asked = [said for _, said in grid.sent if isinstance(said, TrainRequest)]
    assert all(said.secure is not None and said.secure.request == said.digest for said in asked)
    assert secure_exchange.SUM not in NAMES
