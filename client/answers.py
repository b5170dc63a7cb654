"""What a site answers to each of the coordinator's messages."""

import math
import time
import zlib
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import torch

from client.batches import TrainingData
from client.centre import raw_centre, release_centre
from client.cohort import Cohort, CohortError
from client.engines import engine_maker
from client.errors import Refused
from client.journal import write_note
from client.losses import release_mean_loss
from client.objectives import Anchors
from client.personal import personal_weights
from client.policy import (
    centre_for,
    check_code,
    check_plan,
    check_run,
    losses_for,
    mechanism_for,
    prototypes_for,
)
from client.prototypes import raw_prototypes, release_prototypes
from client.releases import RELEASES, ReleaseStore
from client.site import Site, packed_cohort
from client.training import plain_steps, train_plainly, train_privately
from client.workbench import (
    InstalledBundle,
    LocalModel,
    anchors_of,
    device_name,
    kept_optimizer,
    local_model,
    part_of,
    require_rows_apart,
    training_data,
    training_pairs,
)
from encoders.errors import EncoderError
from encoders.parts import TrainablePart
from privacy.errors import AlreadyReleased, BudgetExceeded, PrivacyError
from privacy.ledger import Ledger, Reservation, ReservationRequest
from privacy.losses import LossRelease
from privacy.mechanism import Mechanism
from privacy.noise import GaussianNoise, os_generator
from privacy.prototypes import PrototypeRelease
from strategies.bundles import BundleMissing, BundleStore
from strategies.messages import (
    Arrays,
    Hello,
    Installed,
    PublicBundle,
    RefusalCode,
    Release,
    ReleaseFacts,
    SiteFacts,
    TrainRequest,
    digest_of,
)
from strategies.share import IMAGE_SHIFT, personal, wire_of
from strategies.wire import pack

AnyMechanism = Mechanism | PrototypeRelease | LossRelease
# True batch sizes show in exact durations, so under privacy they leave rounded up.
COARSE_SECONDS = 10


def answer_hello(site: Site, hello: Hello) -> SiteFacts:
    """The site's name and declared size, and whether it holds the run's public bundle."""
    check_run(site, hello.run)
    return SiteFacts(
        site=site.name,
        patients_declared=site.settings.cohort.patients_declared,
        has_bundle=_bundles(site).has(hello.bundle),
    )


def answer_install(site: Site, bundle: PublicBundle) -> Installed:
    """Keep the public bundle."""
    check_code(site)
    return Installed(site=site.name, bundle=_bundles(site).store(bundle))


def answer_train(site: Site, request: TrainRequest) -> Release:
    """One round of local training: policy, ledger, training, ledger, in this order.

    Guarantees:
        Under privacy: nothing is computed from patients before the cost is on the ledger's disk; the
        release is stored before it is returned; the same request again gets the same bytes at no cost.
        Nothing of this happens on a ledger that lacks what the coordinator or a stored release remembers of
        it. The returned release carries the ledger's head of after it was recorded.

    Raises:
        Refused: with one of the closed list of codes.
        LedgerError: the ledger cannot be used, or is not whole.
        UnsoundTraining: by the model or the loss one patient's row reaches another's. Where a frozen tower is
            at fault nothing is charged; else the failed try is, as every other failure.
    """
    check_plan(site, request)
    torch.set_num_threads(site.settings.device.cores)
    if request.plan.privacy == "none":
        return _without_claim(site, request)
    keeps = request.phase == "train" and bool(request.plan.personal or not request.plan.shares_weights)
    with personal_weights(site, request.run).alone() if keeps else nullcontext():
        return _with_claim(site, request)


def _with_claim(site: Site, request: TrainRequest) -> Release:
    noise = GaussianNoise(insecure_seed=_insecure_seed(site, request))
    mechanism = _mechanism(site, request)
    charge = _charge(request, mechanism, noise)
    releases, ledger = ReleaseStore(folder=site.folder / RELEASES), site.ledger()
    ledger.require(*([request.anchor] if request.anchor else []), *releases.anchors().values())
    stored = releases.find(request.digest)
    if stored is not None:
        return _replayed(ledger, charge, stored)
    part = _ready(site, request)
    require_rows_apart(part)
    reservation = _reserve(ledger, charge)
    try:
        started = time.monotonic()
        match mechanism:
            case PrototypeRelease() if request.phase == "centre":
                update = _centre(site, request, part, mechanism, noise)
            case PrototypeRelease():
                update = _prototypes(site, request, part, mechanism, noise)
            case LossRelease():
                update = _mean_loss(site, request, part, mechanism, noise)
            case _:
                update = _trained(site, request, part, mechanism, noise)
        seconds = COARSE_SECONDS * math.ceil((time.monotonic() - started) / COARSE_SECONDS)
        insecure = noise.insecure_seed
        facts = _facts(site, request, seconds=seconds, mechanism=mechanism, ledger=ledger, insecure=insecure)
        release = releases.store(request.digest, Release(facts=facts, update=update))
    except Exception:
        try:
            ledger.abandoned(reservation, code=RefusalCode.FAILED)
        except AlreadyReleased:  # by another process with this request: its release leaves, not our failure
            return _with_claim(site, request)
        raise
    ledger.released(reservation, output_digest=digest_of(release.update))
    return _as_sent(release, ledger)


def _mechanism(site: Site, request: TrainRequest) -> AnyMechanism:
    """What the request costs; all say it before a patient's file is opened, from public constants."""
    match request.phase:
        case "train":
            return mechanism_for(site, request.plan)
        case "losses":
            return losses_for(site, request.plan)
        case "prototypes":
            return prototypes_for(site, request.plan, width=_part(site, request).encoder.width)
        case "centre":
            return _centre_release(site, request)


def _trained(
    site: Site, request: TrainRequest, part: TrainablePart, mechanism: Mechanism, noise: GaussianNoise
) -> Arrays:
    anchors, data = _data(site, request, part)
    device = site.settings.device
    difference = train_privately(
        part,
        data,
        anchors,
        request.plan,
        mechanism=mechanism,
        patients_declared=site.settings.cohort.patients_declared,
        noise=noise,
        server_round=request.server_round,
        correction=request.correction,
        sampling=_sampling(noise),
        make_engine=engine_maker(
            device.engine, physical_batch=device.physical_batch, precision=device.precision
        ),
    )
    return _kept_and_packed(site, request, part, difference)


def _data(site: Site, request: TrainRequest, part: TrainablePart) -> tuple[Anchors, TrainingData]:
    """The public bank with this round's prototypes, and the site's pairs beside it."""
    anchors, texts = anchors_of(_installed(site, request), part, request.plan.anchors)
    if request.prototypes is not None:
        anchors = replace(anchors, prototypes=request.prototypes)
    of_round = request.prototypes
    data = training_data(
        site.folder,
        part,
        texts,
        request.plan.soft_positives,
        anchors.wordings if of_round is None else (),
        site.settings.cohort.modality,
        concepts=() if of_round is None else of_round.concepts,
        drawn=not request.plan.shares_weights,
        all_partly_right=request.plan.soft_targets is not None,
    )
    return anchors, data


def _sampling(noise: GaussianNoise) -> np.random.Generator:
    """Draws patients and studies: as secret as the noise, or, in a test, as repeatable."""
    return np.random.default_rng(noise.insecure_seed) if noise.insecure_seed else os_generator()


def _mean_loss(
    site: Site, request: TrainRequest, part: TrainablePart, mechanism: LossRelease, noise: GaussianNoise
) -> Arrays:
    anchors, data = _data(site, request, part)
    return release_mean_loss(
        part,
        data,
        anchors,
        request.plan,
        mechanism=mechanism,
        patients_declared=site.settings.cohort.patients_declared,
        noise=noise,
        sampling=_sampling(noise),
    )


def _prototypes(
    site: Site, request: TrainRequest, part: TrainablePart, mechanism: PrototypeRelease, noise: GaussianNoise
) -> Arrays:
    known = training_pairs(site.folder, part, site.settings.cohort.modality)
    released = release_prototypes(part, known, mechanism=mechanism, noise=noise)
    return _packed(site, request, released)


def _centre_release(site: Site, request: TrainRequest) -> PrototypeRelease:
    shift = _part(site, request).constants()[IMAGE_SHIFT]
    return centre_for(site, request.plan, width=len(shift))


def _centre(
    site: Site, request: TrainRequest, part: TrainablePart, mechanism: PrototypeRelease, noise: GaussianNoise
) -> Arrays:
    known = training_pairs(site.folder, part)
    released = release_centre(
        known.pairs,
        patients=known.patients,
        public=part.arrays()[IMAGE_SHIFT],
        mechanism=mechanism,
        noise=noise,
    )
    return _packed(site, request, released)


def _replayed(ledger: Ledger, charge: ReservationRequest, stored: Release) -> Release:
    """The stored release once more. It leaves only if the ledger has it, or takes it now.

    The ledger lacks it when a process died between storing and saying so (its open reservation is taken up),
    and when it recorded a failure instead (which costs anew).

    Raises:
        AlreadyReleased: the ledger has another release for this request, so the file was changed.
    """
    digest = digest_of(stored.update)
    try:
        ledger.released(_reserve(ledger, charge), output_digest=digest)
    except AlreadyReleased as released:
        if released.output_digest != digest:
            raise
    return _as_sent(stored, ledger, replayed=True)


def _as_sent(stored: Release, ledger: Ledger, *, replayed: bool = False) -> Release:
    """The stored release with the ledger's newest head: the stored one is older than its own recording."""
    facts = stored.facts.model_copy(update={"anchor": ledger.anchor, "replayed": replayed})
    return Release(facts=facts, update=stored.update)


def _without_claim(site: Site, request: TrainRequest) -> Release:
    if request.secure is None:
        return _made_without_claim(site, request)
    # What is summed is asked for again under other masks, and two answers would give away their difference.
    releases = ReleaseStore(folder=site.folder / RELEASES)
    if (stored := releases.find(request.digest)) is not None:
        return Release(facts=stored.facts.model_copy(update={"replayed": True}), update=stored.update)
    return releases.store(request.digest, _made_without_claim(site, request))


def _made_without_claim(site: Site, request: TrainRequest) -> Release:
    part = _ready(site, request)
    started, steps = time.monotonic(), 0
    match request.phase:
        case "centre":
            raw_update = _raw_centre(site, request, part)
        case "prototypes":
            raw_update = _raw_prototypes(site, request, part)
        case _:
            raw_update, steps = _raw_training(site, request, part)
    facts = _facts(site, request, seconds=time.monotonic() - started, steps=steps)
    return Release(facts=facts, update=raw_update)


def _raw_training(site: Site, request: TrainRequest, part: TrainablePart) -> tuple[Arrays, int]:
    """The update, and in how many steps it was made."""
    anchors, data = _data(site, request, part)
    seed = (request.plan.seed, request.server_round, zlib.crc32(site.name.encode()))
    difference = train_plainly(
        part,
        data,
        anchors,
        request.plan,
        rng=np.random.default_rng(seed),
        server_round=request.server_round,
        correction=request.correction,
        kept=kept_optimizer(site.folder, request.run) if request.plan.keep_optimizer else None,
    )
    update = _kept_and_packed(site, request, part, difference)
    return update, plain_steps(request.plan, pairs=len(data.pairs))


def _raw_centre(site: Site, request: TrainRequest, part: TrainablePart) -> Arrays:
    known = training_pairs(site.folder, part)
    raw_sum = raw_centre(
        known.pairs,
        patients=known.patients,
        public=part.arrays()[IMAGE_SHIFT],
        mechanism=_centre_release(site, request),
    )
    return _packed(site, request, raw_sum)


def _raw_prototypes(site: Site, request: TrainRequest, part: TrainablePart) -> Arrays:
    known = training_pairs(site.folder, part, site.settings.cohort.modality)
    raw_sums = raw_prototypes(
        part,
        known,
        mechanism=prototypes_for(site, request.plan, width=part.encoder.width),
    )
    return _packed(site, request, raw_sums)


def _kept_and_packed(site: Site, request: TrainRequest, part: TrainablePart, difference: Arrays) -> Arrays:
    """What leaves of a round, in the form it travels in; the site's own weights are kept before that."""
    own = personal(part.parameters(), request.plan)
    if own:
        arrays, private = part.arrays(), request.plan.privacy == "dp"
        personal_weights(site, request.run).store(
            request.server_round,
            {name: arrays[name] for name in own},
            request=request.digest if private else "",
            about={
                "bundle": request.bundle,
                "lora_rank": str(request.plan.lora_rank),
                "prompt_tokens": str(request.plan.prompt_tokens),
            },
        )
    shared = {name: value for name, value in difference.items() if name not in own}
    return _packed(site, request, shared)


def _packed(site: Site, request: TrainRequest, update: Arrays) -> Arrays:
    seed = zlib.crc32(f"{site.name}/{request.digest}".encode())  # the same update again is the same bytes
    return pack(update, wire_of(request), rng=np.random.default_rng(seed))


def _own_weights(site: Site, request: TrainRequest, part: TrainablePart) -> Arrays:
    """What the site keeps, from its last round of this run or else as the public model has it."""
    own = personal(part.parameters(), request.plan)
    if not own:
        return {}
    kept = personal_weights(site, request.run).before(request.server_round)
    if kept is not None:
        return kept
    if not request.plan.shares_weights:
        return _local_model(site, request).start
    start = _installed(site, request).load().weights
    return {name: start[name] for name in own}


def _ready(site: Site, request: TrainRequest) -> TrainablePart:
    """The part with the requested weights in it, once the cohort is known to be usable."""
    try:
        cohort = packed_cohort(site.folder)
    except CohortError as error:
        raise Refused(RefusalCode.COHORT, str(error)) from error
    _mind_small_cohort(site, cohort, private=request.plan.privacy == "dp")
    part = _part(site, request)
    try:
        part.load({**request.arrays, **_own_weights(site, request, part)})
    except EncoderError as error:
        raise Refused(RefusalCode.MODEL, str(error)) from error
    return part


def _part(site: Site, request: TrainRequest) -> TrainablePart:
    """The part that the plan trains; its weights are whatever was loaded last."""
    plan, device = request.plan, device_name(site.settings.device.name)
    if not plan.shares_weights:
        return _local_model(site, request).part
    try:
        return part_of(_installed(site, request), plan.part, plan.lora_rank, plan.prompt_tokens, device)
    except (EncoderError, BundleMissing, PrivacyError) as error:
        raise Refused(RefusalCode.MODEL, str(error)) from error


def _local_model(site: Site, request: TrainRequest) -> LocalModel:
    """The site's own model, for a run that shares prototypes alone."""
    plan, device = request.plan, device_name(site.settings.device.name)
    try:
        return local_model(
            _installed(site, request), site.own_model, plan.lora_rank, plan.prompt_tokens, device
        )
    except (EncoderError, BundleMissing) as error:
        raise Refused(RefusalCode.MODEL, str(error)) from error


def _mind_small_cohort(site: Site, cohort: Cohort, *, private: bool) -> None:
    """Tell the hospital, and under privacy nobody else, that fewer patients are trained on than it wanted.

    A refusal would be an exact answer about the true number, which noise is there to hide: one patient more
    or less would turn it. The promise to each patient holds for any number of them, so training goes on.

    Raises:
        Refused: COHORT; only without privacy, where nothing is promised that this could break.
    """
    raw_patients, least = len(np.unique(cohort.patients[cohort.train()])), site.settings.policy.min_patients
    if raw_patients >= least:
        return
    reason = f"{raw_patients} training patients, policy.min-patients is {least}"
    if not private:
        raise Refused(RefusalCode.COHORT, reason, rule="min-patients")
    write_note(site.folder, f"{reason}: add patients, or stop this site; a refusal would tell the number")


def _charge(request: TrainRequest, mechanism: AnyMechanism, noise: GaussianNoise) -> ReservationRequest:
    return ReservationRequest(
        request_digest=request.digest,
        run=request.run,
        server_round=request.server_round,
        kind=mechanism.kind,
        unit=mechanism.unit,
        adjacency=mechanism.adjacency,
        sampler=mechanism.sampler,
        sample_rate=mechanism.sample_rate,
        steps=mechanism.steps,
        max_grad_norm=mechanism.max_grad_norm,
        sensitivity=mechanism.sensitivity,
        noise_std=mechanism.noise_std,
        insecure_seed=noise.insecure_seed,
        code_version=version("clipward"),
        input_digest=request.arrays_digest,
    )


def _reserve(ledger: Ledger, charge: ReservationRequest) -> Reservation:
    try:
        return ledger.reserve(charge)
    except BudgetExceeded as error:
        raise Refused(RefusalCode.BUDGET, str(error)) from error


def _facts(
    site: Site,
    request: TrainRequest,
    *,
    seconds: float,
    mechanism: AnyMechanism | None = None,
    ledger: Ledger | None = None,
    insecure: bool = False,
    steps: int = 0,
) -> ReleaseFacts:
    return ReleaseFacts(
        site=site.name,
        server_round=request.server_round,
        patients_declared=site.settings.cohort.patients_declared,
        steps=mechanism.steps if mechanism else steps,
        seconds=seconds,
        epsilon=ledger.spent() if ledger else None,
        epsilon_max=ledger.epsilon_max if ledger else None,
        delta=ledger.delta if ledger else None,
        noise_multiplier=mechanism.noise_multiplier if mechanism else None,
        sample_rate=mechanism.sample_rate if mechanism else None,
        max_grad_norm=mechanism.max_grad_norm if mechanism else None,
        anchor=ledger.anchor if ledger else None,
        insecure_seed=insecure,
        replayed=False,
    )


def _insecure_seed(site: Site, request: TrainRequest) -> int | None:
    seed = site.settings.testing.insecure_noise_seed
    return None if seed is None else zlib.crc32(f"{seed}/{site.name}/{request.digest}".encode())


def _installed(site: Site, request: TrainRequest) -> InstalledBundle:
    return InstalledBundle(store=_bundles(site), digest=request.bundle)


def _bundles(site: Site) -> BundleStore:
    return BundleStore(folder=site.folder / "bundles")
