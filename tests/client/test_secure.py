"""What one site does in a secure sum, whatever a coordinator says."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.releases import ReleaseStore
from client.secure import ATTEMPTS, answer_agree, answer_deal, answer_mask, answer_request, answer_unmask
from client.site import PINS_FILE, Site
from privacy.errors import KeyUnusable
from privacy.prototypes import PrototypeRelease
from strategies.messages import (
    PROTOTYPE_SUMS,
    Agree,
    Deal,
    LossPlan,
    Mask,
    Phase,
    PrototypePlan,
    Ready,
    Refusal,
    RefusalCode,
    Release,
    TrainRequest,
    Unmask,
    decode,
)
from strategies.secure_sum.attempts import MOST
from strategies.secure_sum.errors import OutOfRange, StepRefused, TermsRefused
from strategies.secure_sum.messages import Participant, Terms
from strategies.settings import SettingsError
from tests.small_hospitals import ask, change_site, plain_plan, ready, request

NAMES = ["site-1", "site-2", "site-3"]
PROTOTYPES = PrototypePlan(
    concepts=("effusion present", "effusion absent", "opacity present", "opacity absent"),
    noise_multiplier=0.5,
    max_norm=1.6,
    count_weight=0.5,
    wire="fp32",
)


@pytest.fixture
def sites(hospitals: Path) -> list[Site]:
    """Three that know each other's keys, train without a claim and hold the bundle."""
    folders = [hospitals / "hospitals" / name for name in NAMES]
    pins = {folder.name: Site.open(folder).key().public for folder in folders}
    return [
        ready(
            change_site(folder, policy={"require-dp": False}, **{"secure-aggregation": {"pins": pins}}).parent
            / folder.name
        )
        for folder in folders
    ]


def asked(sites: list[Site], **changes: Any) -> TrainRequest:
    """A request that names terms; ``changes`` are of them."""
    plain = replace(request(), plan=plain_plan())
    facts: dict[str, Any] = {
        "run": plain.run,
        "server_round": 1,
        "request": plain.digest,
        "attempt": 1,
        "participants": tuple(
            Participant(
                site=site.name, weight=site.settings.cohort.patients_declared, public=site.key().public
            )
            for site in sites
        ),
        "threshold": 2,
        "value_range": 1.0,
        **changes,
    }
    return replace(plain, secure=Terms(**facts))


def offered(site: Site, message: TrainRequest) -> Ready:
    said = answer_request(site, message)
    assert isinstance(said, Ready)
    return said


def equal(sites: list[Site]) -> tuple[Participant, ...]:
    return tuple(Participant(site=site.name, weight=1, public=site.key().public) for site in sites)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (lambda sites: {"request": "ab" * 32}, "terms are of another request"),
        (lambda sites: {"run": "other"}, "another run or round"),
        (lambda sites: {"server_round": 2}, "another run or round"),
        (lambda sites: {"participants": equal(sites)}, "expected weight 25 for 'site-1', asked was 1"),
        (lambda sites: {"weighting": "equal"}, "expected weight 1 for 'site-1', asked was 25"),
    ],
)
def test_terms_that_are_not_as_they_should_be_are_refused_before_anything_is_done(
    changes: Callable[[list[Site]], dict[str, Any]], reason: str, sites: list[Site]
) -> None:
    with pytest.raises(TermsRefused, match=reason):
        answer_request(sites[0], asked(sites, **changes(sites)))
    assert not (sites[0].folder / "releases").exists()
    assert not (sites[0].folder / "agreements").exists()


def test_equal_weights_are_one_each(sites: list[Site]) -> None:
    message = asked(sites, participants=equal(sites), weighting="equal")
    assert offered(sites[0], message).offer.site == "site-1"


def test_what_travels_shortened_cannot_be_masked(sites: list[Site]) -> None:
    message = asked(sites)
    short = replace(message, plan=plain_plan(wire="bf16"))
    assert message.secure is not None
    short = replace(short, secure=replace(message.secure, request=short.digest))
    with pytest.raises(TermsRefused, match="what travels as bf16 cannot be summed under masks"):
        answer_request(sites[0], short)


def in_phase(sites: list[Site], phase: Phase, run: str = "small", **changes: Any) -> TrainRequest:
    """A request with privacy, under terms of its own; ``changes`` are of these."""
    plan: dict[str, Any] = {"prototypes": PROTOTYPES, "losses": LossPlan(noise_multiplier=9.0, max_loss=9.0)}
    private = replace(request(run=run, **plan), phase=phase)
    terms = asked(sites).secure
    assert terms is not None
    facts = {"run": run, "participants": equal(sites), "weighting": "equal", "value_range": 1000.0, **changes}
    return replace(private, secure=replace(terms, **{"request": private.digest, **facts}))


def test_losses_are_not_summed_since_each_site_s_own_is_used(sites: list[Site]) -> None:
    with pytest.raises(TermsRefused, match="answers of phase 'losses' are used one by one"):
        answer_request(sites[0], in_phase(sites, "losses"))


def test_prototypes_are_summed_without_weights(sites: list[Site]) -> None:
    weighed = in_phase(sites, "prototypes")
    assert weighed.secure is not None
    terms = asked(sites, request=weighed.digest).secure  # weighs by declared patients
    with pytest.raises(TermsRefused, match="added up as they are: expected weighting 'equal'"):
        answer_request(sites[0], replace(weighed, secure=terms))


def test_terms_of_one_phase_are_refused_in_the_other(sites: list[Site]) -> None:
    prototypes, training = (in_phase(sites, phase) for phase in ("prototypes", "train"))
    assert prototypes.secure is not None
    assert training.secure is not None
    assert prototypes.secure.session != training.secure.session
    for message, terms in ((prototypes, training.secure), (training, prototypes.secure)):
        with pytest.raises(TermsRefused, match="terms are of another request"):
            answer_request(sites[0], replace(message, secure=terms))


@pytest.mark.parametrize("noise_reaches", ["farther", "less far"])
def test_the_range_is_held_against_the_noised_sum_and_not_the_patients_own(
    noise_reaches: str, sites: list[Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal is an answer: decided on the true sum, it would tell something that no noise covers."""
    raw_sums: list[np.ndarray] = []
    clipped_sum = PrototypeRelease.clipped_sum

    def listening(self: PrototypeRelease, raw: Any) -> Any:
        raw_sums.append(clipped_sum(self, raw))
        return raw_sums[-1]

    monkeypatch.setattr(PrototypeRelease, "clipped_sum", listening)
    for site in sites:
        change_site(site.folder, policy={"epsilon-max": 1e6}, testing={"insecure-noise-seed": 3})
    sites = [Site.open(site.folder) for site in sites]
    for drawn in range(40):  # noise is drawn anew for each run
        run = f"run-{drawn}"
        probe = in_phase(sites, "prototypes", run)
        offered(sites[0], probe)
        release = ReleaseStore(folder=sites[0].folder / "releases").find(probe.digest)
        assert release is not None
        values = release.update[PROTOTYPE_SUMS], raw_sums[-1]
        noised, raw = (float(np.abs(one).max()) for one in values)
        if (noised > raw) == (noise_reaches == "farther"):
            break
    else:
        pytest.fail("no such noise was drawn")
    message = in_phase(sites, "prototypes", run, value_range=(noised + raw) / 2, attempt=2)
    assert message.secure is not None
    number = message.secure.session
    offers = tuple(offered(site, message).offer for site in sites)
    dealt = [answer_deal(site, Deal(session=number, offers=offers)).shares for site in sites]
    mask = Mask(session=number, shares=tuple(shares[0] for shares in dealt))
    if noise_reaches == "farther":
        with pytest.raises(OutOfRange, match="that of prototypes follows from the patients"):
            answer_mask(sites[0], mask)
    else:
        assert answer_mask(sites[0], mask).arrays[PROTOTYPE_SUMS].dtype == np.uint32


def test_a_site_has_its_own_least_threshold(sites: list[Site]) -> None:
    change_site(sites[0].folder, **{"secure-aggregation": {"at-least": 3}})
    with pytest.raises(TermsRefused, match="threshold is 2, and 'site-1' takes part from 3 on"):
        answer_request(Site.open(sites[0].folder), asked(sites))


def test_a_site_that_knows_no_keys_takes_no_part(sites: list[Site]) -> None:
    change_site(sites[0].folder, secure_aggregation=None)
    with pytest.raises(TermsRefused, match="no key is pinned here for 'site-1'"):
        answer_request(Site.open(sites[0].folder), asked(sites))


def test_the_same_terms_again_get_the_same_keys_and_another_attempt_gets_others(sites: list[Site]) -> None:
    first, again = (offered(sites[0], asked(sites)) for _ in range(2))
    other = offered(sites[0], asked(sites, attempt=2))
    assert first.offer == again.offer
    assert other.offer.mask_key != first.offer.mask_key
    assert (first.facts.replayed, again.facts.replayed, other.facts.replayed) == (False, True, True)


def attempts_of(site: Site) -> list[Path]:
    return sorted((site.folder / ATTEMPTS).iterdir())


def test_a_new_attempt_of_a_run_ends_the_one_before(sites: list[Site]) -> None:
    messages = [asked(sites, attempt=number) for number in range(1, 4)]
    for message in messages:
        offered(sites[0], message)
        assert message.secure is not None
        assert [path.stem for path in attempts_of(sites[0])] == [message.secure.session]
    assert messages[0].secure is not None
    with pytest.raises(StepRefused, match="knows of no such attempt"):
        answer_deal(sites[0], Deal(session=messages[0].secure.session, offers=()))


def test_attempts_of_a_few_runs_are_kept_and_no_more(sites: list[Site]) -> None:
    for number in range(MOST + 3):
        plain = replace(request(run=f"run-{number}"), plan=plain_plan())
        terms = asked(sites, run=plain.run, request=plain.digest).secure
        offered(sites[0], replace(plain, secure=terms))
    assert len(attempts_of(sites[0])) == MOST


def test_what_is_kept_of_an_attempt_is_its_owners_alone_and_gone_when_it_is_over(sites: list[Site]) -> None:
    message = asked(sites)
    offers = tuple(offered(site, message).offer for site in sites)
    assert message.secure is not None
    number = message.secure.session
    dealt = [answer_deal(site, Deal(session=number, offers=offers)).shares for site in sites]
    for holder, site in enumerate(sites):
        (path,) = attempts_of(site)
        assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
        answer_mask(site, Mask(session=number, shares=tuple(shares[holder] for shares in dealt)))
    agree = Agree(session=number, survivors=tuple(NAMES))
    consents = tuple(answer_agree(site, agree).consent for site in sites)
    for site in sites:
        answer_unmask(site, Unmask(session=number, consents=consents))
        assert attempts_of(site) == []
        with pytest.raises(StepRefused, match="it is over, or was never asked"):
            answer_unmask(site, Unmask(session=number, consents=consents))


def test_no_process_of_a_site_masks_a_second_time(sites: list[Site]) -> None:
    """The attack: ask twice at the same moment, with shares of other sites in each."""
    message = asked(sites)
    offers = tuple(offered(site, message).offer for site in sites)
    assert message.secure is not None
    number = message.secure.session
    dealt = [answer_deal(site, Deal(session=number, offers=offers)).shares for site in sites]
    asking = [Mask(session=number, shares=tuple(shares[0] for shares in some)) for some in (dealt, dealt[:2])]
    with ThreadPoolExecutor(2) as pool:  # each opens the site anew, as a process does
        kinds = pool.map(lambda one: kind_of_answer(sites[0].folder, one), asking)
        assert sorted(kinds) == ["Masked", "StepRefused"]


def kind_of_answer(folder: Path, mask: Mask) -> str:
    try:
        return type(answer_mask(Site.open(folder), mask)).__name__
    except StepRefused as error:
        return type(error).__name__


def test_a_damaged_attempt_is_none(sites: list[Site]) -> None:
    message = asked(sites)
    offered(sites[0], message)
    (path,) = attempts_of(sites[0])
    path.write_text(path.read_text()[:-9])
    with pytest.raises(StepRefused, match="knows of no such attempt"):
        answer_deal(sites[0], Deal(session=path.stem, offers=()))


def test_a_site_that_lost_an_attempt_has_left_it(sites: list[Site]) -> None:
    message = asked(sites)
    offered(sites[0], message)
    for path in attempts_of(sites[0]):
        path.unlink()
    assert message.secure is not None
    number = message.secure.session
    answers: list[tuple[Callable[[Site, Any], Any], Any]] = [
        (answer_deal, Deal(session=number, offers=())),
        (answer_mask, Mask(session=number, shares=())),
        (answer_agree, Agree(session=number, survivors=())),
        (answer_unmask, Unmask(session=number, consents=())),
    ]
    for answer, said in answers:
        with pytest.raises(StepRefused, match="'site-1' knows of no such attempt: it is over, or was"):
            answer(sites[0], said)


def test_a_release_that_is_gone_is_not_made_anew(sites: list[Site]) -> None:
    message = asked(sites)
    offers = tuple(offered(site, message).offer for site in sites)
    assert message.secure is not None
    number = message.secure.session
    dealt = [answer_deal(site, Deal(session=number, offers=offers)).shares for site in sites]
    for path in (sites[0].folder / "releases").iterdir():
        path.unlink()
    with pytest.raises(StepRefused, match="the release to be masked is gone"):
        answer_mask(sites[0], Mask(session=number, shares=tuple(shares[0] for shares in dealt)))


def test_what_was_masked_never_leaves_in_the_clear(sites: list[Site]) -> None:
    """The attack: ask for a sum, then for the same update by itself."""
    message = asked(sites)
    offered(sites[0], message)
    for plain in (replace(message, secure=None), replace(message, secure=None, server_round=2)):
        said = decode(ask(sites[0].folder, plain).content)
        assert isinstance(said, Refusal)
        assert said.code is RefusalCode.POLICY
    assert "is now to go on in the clear" in (sites[0].folder / "site.log").read_text()
    assert isinstance(
        decode(ask(sites[0].folder, replace(message, secure=None, run="other")).content), Release
    )


def test_a_site_may_insist_on_masks(sites: list[Site]) -> None:
    change_site(sites[0].folder, **{"secure-aggregation": {"required": True}})
    message = asked(sites)
    said = decode(ask(sites[0].folder, replace(message, secure=None)).content)
    assert isinstance(said, Refusal)
    assert said.code is RefusalCode.POLICY
    log = (sites[0].folder / "site.log").read_text()
    assert "to allow that, change secure-aggregation.required in site.toml" in log
    assert isinstance(decode(ask(sites[0].folder, message).content), Ready)


def test_the_policy_holds_for_what_is_masked(sites: list[Site]) -> None:
    change_site(sites[0].folder, policy={"metrics": [], "max-release-bytes": 10})
    said = decode(ask(sites[0].folder, asked(sites)).content)
    assert isinstance(said, Refusal)
    assert said.code is RefusalCode.POLICY


def test_a_lost_key_is_not_replaced(sites: list[Site]) -> None:
    message = asked(sites)
    sites[0].ledger()
    (sites[0].folder / "site.key").unlink()
    with pytest.raises(KeyUnusable, match=r"site\.key is missing, so nothing can be signed"):
        answer_request(sites[0], message)
    said = decode(ask(sites[0].folder, asked(sites[1:] + sites[:1], attempt=2)).content)
    assert isinstance(said, Refusal)
    assert said.code is RefusalCode.LEDGER


def test_pins_of_the_settings_stand_above_those_of_the_file(sites: list[Site]) -> None:
    own = sites[0].pins()
    (sites[0].folder / PINS_FILE).write_text(f'[pins]\n"site-2" = "{"ab" * 32}"\n"site-9" = "{"cd" * 32}"\n')
    assert sites[0].pins() == {**own, "site-9": "cd" * 32}
    (sites[0].folder / PINS_FILE).write_text('[pins]\n"site-2" = "its key"\n')
    with pytest.raises(SettingsError, match=r"pins\.toml cannot be used"):
        sites[0].pins()
