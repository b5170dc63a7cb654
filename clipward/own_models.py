"""The models that sites have of their own after a run that shared prototypes alone: measured, and exported.

A hospital's model never leaves it. A simulation owns all hospitals, so it may look at each.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from client.personal import personal_weights
from client.site import Site
from client.workbench import InstalledBundle, device_name, local_model
from clipward.public_start import evaluation_set
from encoders.parts import TrainablePart
from server.evaluation import EvaluationSet, evaluator
from strategies.bundles import BundleStore


def own_model(site: Site, *, run: str) -> TrainablePart | None:
    """The model of a site after its last round of a run; None: it has not trained.

    Raises:
        BundleMissing: the run's public bundle is not at the site any more.
        EncoderError: the site's model cannot be built, or is not the one that was trained.
    """
    newest = personal_weights(site, run).newest()
    if newest is None:
        return None
    weights, about = newest
    installed = InstalledBundle(store=BundleStore(folder=site.folder / "bundles"), digest=about["bundle"])
    device = device_name(site.settings.device.name)
    numbers = int(about["lora_rank"]), int(about["prompt_tokens"])
    part = local_model(installed, site.own_model, *numbers, device).part
    part.load(weights)
    return part


def measured(
    folders: Sequence[Path], *, run: str, held_out: EvaluationSet | None
) -> dict[str, dict[str, Any] | None]:
    """What each site's own model is worth on the same pairs, by site; None: no model, or no pairs."""
    found: dict[str, dict[str, Any] | None] = {}
    for site in map(Site.open, folders):
        part = own_model(site, run=run) if held_out is not None else None
        found[site.name] = (
            None if part is None or held_out is None else evaluator(part, held_out)(part.arrays())
        )
    return found


def measured_at_home(site: Site, part: TrainablePart) -> dict[str, Any] | None:
    """What a site's own model is worth on the site's own held-out pairs; None: there are none."""
    cohort = site.cohort()
    rows = cohort.test()
    if site.settings.cohort.modality != "pairs" or not len(rows):
        return None
    return evaluator(part, evaluation_set(cohort, rows))(part.arrays())
