"""A comparison in words: what the federation reaches, who gains by joining, and how sure that is."""

from collections.abc import Iterator, Sequence

from clipward.compare_rows import LEVEL, Estimate, Row, by_setting
from server.federation import Metric

SITES_TOLD = 12  # of more, those that gain most and least


def reading(rows: Sequence[Row], *, metric: Metric, pairs: int, sites: int) -> list[str]:
    """One paragraph a federation, and what holds for all arms.

    Args:
        rows: Of all settings.
        metric: What the paragraphs are about.
        pairs: Held-out pairs that every arm is measured on.
        sites: How many the federation has.
    """
    paragraphs = [
        " ".join(_about(row, own, metric, sites))
        for _, own in by_setting(rows)
        for row in own
        if row.kind == "federation"
    ]
    return [*paragraphs, *_remarks(rows, pairs)]


def shown(metric: str, estimate: Estimate | None) -> str:
    """An estimate as people read it: retrieval in percent, AUROC with three digits, a dash for unknown."""
    if estimate is None:
        return "-"
    margin = "" if estimate.margin is None else f" ± {_number(metric, estimate.margin)}"
    return _number(metric, estimate.mean) + margin


def title_of(metric: str) -> str:
    """A measure's name for a person."""
    task, *way, name = metric.split(".")
    if task == "zero_shot":
        return "macro AUROC"
    return f"{' '.join(way).replace('_', ' ')} R@{name.removeprefix('r')}"


def percent(metric: str) -> bool:
    """Whether a measure is a share, which is shown in percent."""
    return not metric.startswith("zero_shot")


def _about(row: Row, rows: Sequence[Row], metric: Metric, sites: int) -> Iterator[str]:
    """The sentences of one federation among the rows of its setting."""
    reached, chance = row.measures.get(metric), row.chances.get(metric)
    if reached is None:
        yield f"{row.setting}: {row.name} without figures."
        return
    words = (
        f"{row.setting}: the {row.name} reaches {shown(metric, reached)}{_unit(metric)} {title_of(metric)}"
    )
    if chance is not None:
        words += f" (chance {_number(metric, chance)}{_unit(metric)})"
    pooled = next((one.measures.get(metric) for one in rows if one.kind == "pooled"), None)
    yield words + _beside(reached.mean, pooled, chance, metric) + "."
    yield from _joining(row, [one for one in rows if one.kind == "alone"], metric)
    if row.sites is not None and row.sites < sites:
        yield f"Only {row.sites} of {sites} sites trained in it: the others refused, or were not drawn."


def _beside(reached: float, pooled: Estimate | None, chance: float | None, metric: Metric) -> str:
    if pooled is None or not pooled.mean > 0:
        return ""
    words = f", {reached / pooled.mean:.2f} of pooled ({shown(metric, pooled)}{_unit(metric)})"
    if chance is None:
        return words
    if not pooled.mean > chance:
        return f"{words}, which is not above chance itself"
    return f"{words} and {(reached - chance) / (pooled.mean - chance):.2f} of its lift over chance"


def _joining(row: Row, alone: Sequence[Row], metric: Metric) -> Iterator[str]:
    """What each site gains over training alone."""
    found = {one.site: row.gain_over(one, metric) for one in alone}
    gains = {site: gain for site, gain in found.items() if gain is not None}
    if not gains:
        return
    order = sorted(gains, key=lambda site: -gains[site].mean)
    told = order if len(order) <= SITES_TOLD else [order[0], order[-1]]
    better = sum(gain.mean > 0 for gain in gains.values())
    yield (
        f"Joining is better than training alone for {better} of {len(gains)} sites, in points of it: "
        f"{', '.join(f'{site} {_gain(metric, gains[site])}' for site in told)}."
    )
    seeds = len(row.values[metric])
    if seeds == 1:
        yield "One seed: nothing is known of how much of that is chance."
        return
    clear = sum(gain.is_clear for gain in gains.values())
    yield f"Over {seeds} seeds zero is outside the {LEVEL:.0%} interval of that gain for {clear} of them."


def _remarks(rows: Sequence[Row], pairs: int) -> Iterator[str]:
    """What holds for all arms."""
    yield (
        f"All arms are measured on the same {pairs} held-out pairs of all sites. A site alone trains as many "
        "steps as in the federation; the pooled model sees as many pairs as all sites together."
    )
    if any(one.margin is not None for row in rows for one in row.measures.values()):
        yield f"Intervals ({LEVEL:.0%}, Student's t) are over seeds: other held-out patients widen them."
    if any(row.epsilon is not None for row in rows):
        yield (
            "Every private arm was paid from a budget of its own: on the same patients, all arms and seeds "
            "together would cost the sum. Compare on public or synthetic data."
        )
    for row in rows:
        if row.problem is not None:
            yield f"{row.setting}, {row.name}: not every seed has figures: {row.problem}"


def _number(metric: str, value: float) -> str:
    return f"{100 * value:.1f}" if percent(metric) else f"{value:.3f}"


def _unit(metric: str) -> str:
    return " %" if percent(metric) else ""


def _gain(metric: str, gain: Estimate) -> str:
    sign = "+" if gain.mean >= 0 else "-"
    return sign + shown(metric, Estimate(mean=abs(gain.mean), margin=gain.margin))
