"""`clipward cohort inspect`: a page on which a physician sees what the model will see."""

import base64
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

if TYPE_CHECKING:
    from client.cohort.store import Cohort

PAGE = "inspect.html"
SAMPLE = 2000  # images whose grey levels are counted
COMMON_TEXTS = 8
_WORD_BINS = (0, 5, 10, 20, 30, 40, 60, 80, 120)
_GREY_BINS = 16


def inspect(
    site: Annotated[Path, typer.Argument(metavar="SITE", help="The site's folder, with its site.toml.")],
    images: Annotated[int, typer.Option(min=0, help="Images on the contact sheet.")] = 24,
    out: Annotated[Path | None, typer.Option(help="The page; by default inspect.html in the site.")] = None,
    seed: Annotated[int, typer.Option(help="Another seed shows other images.")] = 0,
) -> None:
    """Write a page with counts, texts, labels and random images of a site's cohort, for the site's own eyes.

    The page holds patient data: only its owner may read it, it fetches nothing, and it stays here.

    Example: clipward cohort inspect demo/hospitals/site-1 --images 48
    """
    from client.cohort import CohortError
    from client.site import Site
    from clipward.console import errors_in_one_line, progress_bars
    from strategies.settings import SettingsError

    with errors_in_one_line((CohortError, SettingsError, OSError)), progress_bars() as show:
        opened = Site.open(site)
        cohort = opened.cohort(on_progress=lambda done, total: show("read files", done, total))
        page = out or site / PAGE
        write_page(page, cohort, name=opened.name, images=images, seed=seed)
    typer.echo(f"wrote {page}: it holds patient data, open it here and leave it here")


def write_page(path: Path, cohort: "Cohort", *, name: str, images: int = 24, seed: int = 0) -> None:
    """Write the page, one HTML file.

    Guarantees:
        It needs no network, runs no script and forbids both to the browser. Everything from the cohort is
        escaped. Only its owner may read it. Equal input gives equal bytes.

    Args:
        path: The file; it is replaced atomically.
        cohort: The cohort.
        name: The site's.
        images: How many random images are shown with their texts, held-out ones among them.
        seed: Of their choice.
    """
    import jinja2

    from strategies.files import write_text

    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("clipward"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["count"] = lambda value: f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    templates.filters["percent"] = lambda value: f"{100 * value:.1f} %"
    rng = np.random.default_rng(seed)
    content = {"name": name, **figures(cohort, rng=rng), "sheet": _sheet(cohort, images, rng)}
    write_text(path, templates.get_template("inspect.html").render(content), mode=0o600)


def figures(cohort: "Cohort", *, rng: np.random.Generator) -> dict[str, Any]:
    """Return what the page says in numbers.

    Args:
        cohort: The cohort.
        rng: Chooses the images whose grey levels are counted.
    """
    from client.text.masks import MASK

    rows = len(cohort)
    words = np.array([len(text.split()) for text in cohort.texts])
    chosen = np.sort(rng.permutation(rows)[:SAMPLE])
    grey = [_grey(np.asarray(cohort.images[row])) for row in chosen.tolist()]
    means, contrasts, black = np.array(grey).reshape(-1, 3).T
    images_of = np.bincount(cohort.patients)
    common = [
        {"text": text, "count": count}
        for text, count in Counter(cohort.texts).most_common(COMMON_TEXTS)
        if count > 1
    ]
    return {
        "images": rows,
        "patients": len(images_of),
        "studies": len(np.unique(cohort.studies)),
        "texts": len(np.unique(cohort.text_ids)),
        "held_out": len(np.unique(cohort.patients[cohort.is_test])),
        "most_images": int(images_of.max()),
        "size": cohort.images.shape[1],
        "channels": math.prod(cohort.images.shape[3:]),
        "pipeline": cohort.pipeline,
        "states": {state.value: count for state, count in cohort.counts.items()},
        "codes": [(code.value, count, code.meaning) for code, count in cohort.codes.items()],
        "unpaired_reports": cohort.unpaired_reports,
        "unknown_merges": cohort.unknown_merges,
        "text_rules": cohort.text_rules,
        "masked": cohort.masked,
        "masked_texts": sum(MASK in text for text in cohort.texts),
        "words": _bars(words, _WORD_BINS),
        "median_words": int(np.median(words)),
        "common": common,
        "labels": _prevalence(cohort.labels),
        "sampled": len(chosen),
        "means": _bars(means, np.linspace(0, 256, _GREY_BINS, endpoint=False)),
        "contrasts": _bars(contrasts, np.linspace(0, 128, _GREY_BINS, endpoint=False)),
        "black": float(black.mean()),
        "dark": int((means < 16).sum()),
        "flat": int((contrasts < 8).sum()),
    }


def _grey(image: NDArray[np.uint8]) -> tuple[float, float, float]:
    """Return mean and standard deviation of what is not padding, and the share of black; channels' means."""
    channels = image.reshape(*image.shape[:2], -1)
    shown = np.asarray(channels.max(axis=2) > 0)
    inside = channels[np.ix_(shown.any(axis=1), shown.any(axis=0))]
    return float(inside.mean()), float(inside.std(axis=(0, 1)).mean()), float((image == 0).mean())


def _bars(values: NDArray[Any], starts: Sequence[float] | NDArray[Any]) -> list[dict[str, Any]]:
    """Return a histogram: bins by where they start, the last one open, with their share of the largest."""
    counts = np.histogram(values, [*starts, np.inf])[0]
    most = max(1, int(counts.max()))
    return [
        {"start": f"{start:g}", "count": int(count), "share": float(count / most)}
        for start, count in zip(starts, counts, strict=True)
    ]


def _prevalence(labels: Mapping[str, NDArray[np.float32]]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "positive": int((values > 0.5).sum()),
            "negative": int((values <= 0.5).sum()),
            "unknown": int(np.isnan(values).sum()),
        }
        for name, values in sorted(labels.items())
    ]


def _sheet(cohort: "Cohort", images: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    rows = np.sort(rng.permutation(len(cohort))[:images])
    return [
        {
            "row": row,
            "picture": _png(np.asarray(cohort.images[row])),
            "text": cohort.texts[row],
            "side": "held out" if cohort.is_test[row] else "training",
            "labels": [name for name, values in sorted(cohort.labels.items()) if values[row] > 0.5],
        }
        for row in rows.tolist()
    ]


def _png(image: NDArray[np.uint8]) -> str:
    from PIL import Image

    file = io.BytesIO()
    # Channels side by side, each as grey as it is seen: a colour is what no viewer of CT shows.
    beside = image if image.ndim == 2 else np.concatenate(np.moveaxis(image, -1, 0), axis=1)
    Image.fromarray(beside).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
