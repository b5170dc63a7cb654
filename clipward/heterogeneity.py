"""Sites that differ as a study wants them to: who is where, how images look, what is missing.

Everything here is public and decided by a seed; it is for synthetic hospitals and public tables.
"""

import csv
import difflib
import io
import math
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from client.cohort.errors import CohortSettingsError
from client.cohort.image_table import ImageTable
from client.cohort.outcomes import Rejected
from client.cohort.sources import stamp
from client.cohort.tables import Table, read_table
from client.site import Site
from server.federation import Cut, Simulation
from strategies.files import write_text
from strategies.settings import SettingsError

SITE = "simulated_site"
CUT, LOOKS = "cut.csv", "looks"
# At strength 1, about what the synthetic hospitals' scanners differ by.
_GAMMA, _CONTRAST, _BRIGHTNESS, _BLUR = math.log(1.4), 0.15, 0.05, 0.008

Rows = list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a site's scanner does to a packed image, in grey levels of 0 to 1.

    Attributes:
        gamma: Exponent of the display curve; above 1 is darker.
        contrast: Slope at mid-grey.
        brightness: Added.
        blur: Standard deviation of the blur, as a share of the image's side.
    """

    gamma: float
    contrast: float
    brightness: float
    blur: float

    @classmethod
    def of(cls, site: str, *, strength: float, seed: int) -> "Look":
        """The scanner of a site: the same whatever other sites there are. Strength 0 changes nothing."""
        rng = _rng(seed, "look", site)
        gamma, contrast, brightness = strength * rng.uniform(-1, 1, size=3)
        return cls(
            gamma=math.exp(_GAMMA * gamma),
            contrast=math.exp(_CONTRAST * contrast),
            brightness=_BRIGHTNESS * brightness,
            blur=strength * _BLUR * rng.uniform(),
        )

    def __call__(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The image as this scanner takes it.

        Args:
            pixels: Grey levels, shape (S, S). What is black stays black: it is padding, or the collimator.
        """
        grey = pixels.astype(np.float32) / 255
        if self.blur:
            grey = gaussian_filter(grey, self.blur * len(grey))
        grey = (grey - 0.5) * np.float32(self.contrast) + np.float32(0.5 + self.brightness)
        taken = np.rint(255 * np.clip(grey, 0, 1) ** np.float32(self.gamma)).astype(np.uint8)
        return np.where(pixels == 0, pixels, taken)


def sizes(patients: int, *, sites: int, skew: float) -> list[int]:
    """Patients of each site: one, and of the others a share proportional to k ** -skew for site k.

    Guarantees:
        They add up to ``patients``, and none is 0.

    Raises:
        SettingsError: fewer patients than sites.
    """
    if patients < sites:
        raise SettingsError(
            f"simulation.cut.sites = {sites} sites cannot be made of {patients} patients: ask for fewer"
        )
    shares = np.arange(1, sites + 1) ** -float(skew)
    ends = np.rint(np.cumsum(shares) / shares.sum() * (patients - sites)).astype(int)
    return [1 + int(size) for size in np.diff(ends, prepend=0)]


def assign(values: Sequence[str], cut: Cut, *, seed: int) -> NDArray[np.intp]:
    """The site of each patient, 0 to ``cut.sites`` - 1.

    Guarantees:
        The same for the same arguments. Each site has as many patients as `sizes` says, whatever the skew.

    Args:
        values: The label of each patient; not looked at without ``cut.alpha``.
        cut: The sites asked for.
        seed: Of all draws.

    Source:
        Hsu et al. (2019), arXiv:1909.06335, section 3: each site draws its patients by its own shares of the
        labels, q ~ Dirichlet(alpha * prior), without replacement. Here sites take turns at random, so that
        what is left over meets all of them.
    """
    rng = np.random.default_rng(seed)
    seats = rng.permutation(
        np.repeat(np.arange(cut.sites), sizes(len(values), sites=cut.sites, skew=cut.size_skew))
    )
    if cut.alpha is None:
        return seats
    _, kind = np.unique(list(values), return_inverse=True)
    waiting = [list(rng.permutation(np.flatnonzero(kind == each))) for each in range(kind.max() + 1)]
    left = np.array([len(queue) for queue in waiting], dtype=float)
    wishes = rng.dirichlet(cut.alpha * left / left.sum(), size=cut.sites)
    assigned = np.empty(len(values), dtype=np.intp)
    for site in seats:
        odds = wishes[site] * (left > 0)
        if not odds.sum() > 0:  # nobody is left of the labels that this site has
            odds = left
        drawn = rng.choice(len(left), p=odds / odds.sum())
        assigned[waiting[drawn].pop()] = site
        left[drawn] -= 1
    return assigned


def pool(sites: Sequence[Path], out: Path) -> Path:
    """One image table of the packed pairs of several sites, their labels and held-out patients included.

    Its column ``site`` says whose they were. The sites' policies and ledgers hold for the sites and not for
    what is copied here.

    Args:
        sites: Folders of sites.
        out: Folder of the table and its images; made if absent.

    Raises:
        CohortError: a site's data cannot be used.
    """
    rows: Rows = []
    for site in map(Site.open, sites):
        cohort, folder = site.cohort(), out / site.name
        if cohort.images.ndim > 3:  # rows, and height and width of grey images
            raise CohortSettingsError(
                f"{site.name} shows CT windows as channels, and the images of a table are grey: "
                "name one window in its cohort.ct-windows"
            )
        folder.mkdir(parents=True, exist_ok=True)
        for row, text in enumerate(cohort.texts):
            image = folder / f"{cohort.identity[:16]}-{row}.png"
            if site.settings.cohort.modality != "texts":  # what is packed there is black
                _save(image, cohort.images[row])
            rows.append(
                {
                    "image": str(image.resolve()) if image.is_file() else "",
                    "text": text,
                    "patient_id": f"{site.name}/{cohort.patients[row]}",
                    "study_id": f"{site.name}/{cohort.studies[row]}",
                    "split": "test" if cohort.is_test[row] else "train",
                    "site": site.name,
                    **{name: _label(values[row]) for name, values in cohort.labels.items()},
                }
            )
    columns = dict.fromkeys(name for row in rows for name in row)
    return _written(out / "pool.csv", [{name: row.get(name, "") for name in columns} for row in rows])


def cut_table(table: Path, simulation: Simulation, out: Path) -> Path:
    """The table with a column `SITE`, and with what else a study asks for done to each site's rows.

    Guarantees:
        With ``simulation.cut`` every patient is in exactly one site; else the column ``simulation.by`` is
        taken as it is. Equal tables and settings give equal files, and one that is there already is left as
        it is, so that nothing built from it is built again.

    Args:
        table: An image table.
        simulation: How it is cut and changed.
        out: Folder of the new table and of changed images; made if absent.

    Raises:
        SettingsError: a site that is not there or cannot be named, or fewer patients than sites.
        CohortError: the table cannot be read, or lacks a column.
    """
    source = read_table(table)
    image, text, patient = (source.need(name) for name in ("image", "text", "patient_id"))
    if simulation.cut is None:
        column = source.need(simulation.by)  # not kept beside SITE: a column of 0 and 1 would be a label
        owners = _named_owners(source, column)
    else:
        column, owners = None, _cut_owners(source, simulation.cut, seed=simulation.seed)
    rows = [
        {
            **{name: cell for name, cell in row.items() if name != column},
            image: str(table.parent.resolve() / row[image]) if row[image] else "",
            SITE: owner,
        }
        for row, owner in zip(source.rows, owners, strict=True)
    ]
    require_known(simulation.missing, owners, key="missing")
    known = {image, text, patient, source.column("study_id"), source.column("split"), column}
    labels = source.label_columns(without=known)
    for site, missing in simulation.missing.items():
        own = [row for row in rows if row[SITE] == site]
        lots = _rng(simulation.seed, "missing", site).permutation(sorted({row[patient] for row in own}))
        reports, images = (math.floor(share * len(lots)) for share in (missing.reports, missing.images))
        without = {text: lots[:reports], image: lots[reports : reports + images]}
        unlabelled = _rng(simulation.seed, "labels", site).permutation(lots)
        without |= dict.fromkeys(labels, unlabelled[: round(missing.labels * len(lots))])
        _empty(own, patient, {column: set(lacking) for column, lacking in without.items()})
    out.mkdir(parents=True, exist_ok=True)
    if simulation.scanner_shift:
        _take_anew(rows, simulation, image=image, folder=out / LOOKS)
    return _written(out / CUT, rows)


def site_names(values: Iterable[str], *, of: str) -> dict[str, str]:
    """The name of the site of each value, in the values' order.

    Raises:
        SettingsError: a value makes no name, or that of another.
    """
    names: dict[str, str] = {}
    for value in sorted(set(values)):
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", value).strip("._-")[:64]
        if not name or name in names.values():
            other = next((each for each, taken in names.items() if name and taken == name), None)
            clash = "empty" if other is None else f"that of {other!r}"
            raise SettingsError(
                f"{of}: {value!r} cannot name a site, the name would be {clash}; "
                "give every row a name of letters and digits"
            )
        names[value] = name
    return names


def require_known(asked: Iterable[str], sites: Iterable[str], *, key: str) -> None:
    """Refuse a key of ``simulation`` that names a site which there is not.

    Raises:
        SettingsError: with the first such name and the sites.
    """
    known = sorted(set(sites))
    for name in asked:
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.0))
            raise SettingsError(
                f"simulation.{key} names {name!r}, which is none of the {len(known)} sites, such as {near}"
            )


def _cut_owners(source: Table, cut: Cut, *, seed: int) -> list[str]:
    patient = source.need("patient_id")
    label = source.need(cut.label) if cut.label else None
    seen: dict[str, Counter[str]] = {}
    for row in source.rows:
        seen.setdefault(row[patient], Counter())[row[label] if label else ""] += 1
    # A patient counts by the most frequent value, of several by the first in the alphabet.
    values = [min(counts, key=lambda value: (-counts[value], value)) for counts in seen.values()]
    sites = dict(zip(seen, assign(values, cut, seed=seed), strict=True))
    return [f"site-{sites[row[patient]] + 1}" for row in source.rows]


def _named_owners(source: Table, column: str) -> list[str]:
    names = site_names((row[column] for row in source.rows), of=f"{source.path}, column {column!r}")
    return [names[row[column]] for row in source.rows]


def _empty(rows: Rows, patient: str, without: Mapping[str, Collection[str]]) -> None:
    """Empty the cells of the patients who lack something, in place."""
    for row in rows:
        for column, lacking in without.items():
            if row[patient] in lacking:
                row[column] = ""


def _take_anew(rows: Rows, simulation: Simulation, *, image: str, folder: Path) -> None:
    """Put each image as its site's scanner takes it in its place, in place; one that cannot be read stays."""
    folder.mkdir(exist_ok=True)
    looks = {
        site: Look.of(site, strength=simulation.scanner_shift, seed=simulation.seed)
        for site in {row[SITE] for row in rows}
    }
    for row in rows:
        source, look = Path(row[image]), looks[row[SITE]]
        if not row[image] or not source.is_file():
            continue
        facts = repr((stamp(source, row[image]), look, simulation.image_size))
        taken = folder / f"{sha256(facts.encode()).hexdigest()[:32]}.png"
        if not taken.exists():
            rendered = ImageTable.render(source, simulation.image_size)
            if isinstance(rendered, Rejected):
                continue
            _save(taken, look(rendered.pixels))
        row[image] = str(taken.resolve())


def _save(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write an image, whole or not at all."""
    partial = path.with_suffix(".partial")
    Image.fromarray(pixels).save(partial, format="PNG")
    partial.replace(path)


def _written(path: Path, rows: Rows) -> Path:
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    if not path.exists() or path.read_text(encoding="utf-8") != text.getvalue():
        write_text(path, text.getvalue())
    return path


def _rng(seed: int, *purpose: str) -> np.random.Generator:
    return np.random.default_rng([seed, *map(zlib.crc32, map(str.encode, purpose))])


def _label(value: np.float32) -> str:
    return "" if np.isnan(value) else f"{value:g}"
