"""`clipward cohort check`: what a site should look at before it trains: writing, names, copies, overlaps."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from numpy.typing import NDArray

if TYPE_CHECKING:
    from client.cohort.origins import Origin
    from client.cohort.overlap import Key
    from client.cohort.store import Cohort

EXAMPLES = 5
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One kind of thing that was found, for the hospital's own eyes.

    Attributes:
        kind: What.
        found: How often.
        unit: Of what.
        rows: The cohort's rows, from 0, the first of each.
        files: Where the first of them come from.
        remedy: What to do.
    """

    kind: str
    found: int
    unit: str
    rows: Sequence[int]
    files: Sequence[str]
    remedy: str


def check(
    site: Annotated[Path, typer.Argument(metavar="SITE", help="The site's folder, with its site.toml.")],
    against: Annotated[
        Path | None,
        typer.Option(help="Look for these images too: another site's hashes, or a public list of ids."),
    ] = None,
    export_hashes: Annotated[
        Path | None, typer.Option(help="Write this site's hashes for another site, and check nothing.")
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option(help="The key both sites share, such as `openssl rand -hex 32` makes.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Look for writing in images, identifiers in texts, near copies, and overlap with other data.

    Heuristics: what they find deserves a look, what they do not find may be there. Everything stays here but
    what --export-hashes writes. Exit status 1 says that something was found.

    Example: clipward cohort check demo/hospitals/site-1

    Example: clipward cohort check here --export-hashes here.json --key-file shared.key

    Example: clipward cohort check here --against there.json --key-file shared.key

    Example: clipward cohort check here --against rsna-ids.csv
    """
    from client.cohort import CohortError
    from client.cohort.origins import origins
    from client.cohort.overlap import Key, exported
    from client.site import Site
    from clipward.console import errors_in_one_line, progress_bars
    from strategies.files import write_text
    from strategies.settings import SettingsError

    if export_hashes is not None and key_file is None:
        raise typer.BadParameter("--export-hashes needs --key-file: without a key, hashes can be guessed")
    with errors_in_one_line((CohortError, SettingsError, OSError)), progress_bars() as show:
        key = Key.read(key_file) if key_file is not None else None
        opened = Site.open(site)
        cohort = opened.cohort(on_progress=lambda done, total: show("read files", done, total))
        rows = origins(opened.cohort_folder, secret=opened.cohort_settings().key)
        if export_hashes is not None and key is not None:
            write_text(export_hashes, exported(key, rows, cohort.images), mode=0o600)
            findings = None
        else:
            findings = list(look(cohort, rows, against=against, key=key, tell=show))
    if findings is None:
        typer.echo(f"wrote {export_hashes}: hand it to the other site, which needs the same key")
        return
    if as_json:
        typer.echo(json.dumps({"version": 1, "findings": [asdict(one) for one in findings]}, indent=2))
    else:
        _print(findings)
    if findings:
        raise typer.Exit(1)


def look(
    cohort: "Cohort",
    rows: "Sequence[Origin]",
    *,
    against: Path | None = None,
    key: "Key | None" = None,
    tell: Tell = lambda what, done, total: None,
) -> Iterator[Finding]:
    """Yield what there is to look at, kind by kind; nothing where nothing is.

    Args:
        cohort: The cohort.
        rows: Where its rows come from.
        against: Other data to look for, see ``client.cohort.overlap.shared``.
        key: For ``against``.
        tell: Told (what, done, total).

    Raises:
        OverlapError: ``against`` cannot be used.
    """
    from client.cohort.overlap import shared
    from client.cohort.similar import near_images, near_texts

    def finding(kind: str, found: int, unit: str, places: Sequence[int], remedy: str) -> Iterator[Finding]:
        if found:
            names = [name for row in places[:EXAMPLES] if (name := rows[row].name)]
            yield Finding(kind=kind, found=found, unit=unit, rows=places, files=names, remedy=remedy)

    written = _written(cohort.images, tell)
    look_at = "look at them; have the archive export them without, or leave them out"
    yield from finding("writing in the image", len(written), "images", written, look_at)
    for kind, places in _identifiers(cohort).items():
        remedy = "look at them; have the reports exported without"
        yield from finding(f"{kind} in the text", len(places), "rows", places, remedy)
    tell("near copies", 0, 2)
    for kind, remedy, groups in (
        ("one image of several patients", _MERGE, near_images(cohort.images)),
        ("one long text of several patients", "templates are harmless; copied reports are not",
         _rows_of_texts(cohort, near_texts(_distinct(cohort)))),
    ):  # fmt: skip
        across = [group for group in groups if len(set(cohort.patients[group].tolist())) > 1]
        yield from finding(kind, len(across), "groups", [int(group[0]) for group in across], remedy)
        split = [group for group in across if len(set(cohort.is_test[group].tolist())) > 1]
        first = [int(group[0]) for group in split]
        yield from finding(f"{kind}, held out and trained on", len(split), "groups", first, _MERGE)
    tell("near copies", 2, 2)
    if against is not None:
        same = shared(against, key, rows, cohort.images)
        yield from finding(f"images that {against.name} has too", len(same), "rows", same, _OVERLAP)


_MERGE = "if it is one person, name both ids in cohort.merge; else find out which study is mislabelled"
_OVERLAP = "leave them out of one of the two, or count a shared patient's epsilon at both"


def _written(images: NDArray[np.uint8], tell: Tell) -> list[int]:
    from client.cohort.burned_in import has_text

    found = []
    for row, image in enumerate(images):
        if has_text(np.asarray(image)):
            found.append(row)
        if row % 100 == 99 or row + 1 == len(images):
            tell("looked at images", row + 1, len(images))
    return found


def _identifiers(cohort: "Cohort") -> dict[str, list[int]]:
    """Return the rows whose texts hold an identifier, by its kind."""
    from client.text.scrub import scrub

    kinds = [frozenset(scrub(text).hits_by_kind) for text in _distinct(cohort)]
    rows: dict[str, list[int]] = {}
    for row, number in enumerate(cohort.text_ids.tolist()):
        for kind in kinds[number]:
            rows.setdefault(kind, []).append(row)
    return dict(sorted(rows.items()))


def _distinct(cohort: "Cohort") -> list[str]:
    _, first = np.unique(cohort.text_ids, return_index=True)
    return [cohort.texts[row] for row in first.tolist()]


def _rows_of_texts(cohort: "Cohort", groups: Sequence[NDArray[np.intp]]) -> list[NDArray[np.intp]]:
    """Return the rows with each group of near texts, and those with one long text."""
    from client.cohort.similar import is_long, rows_by_number

    near = [group.tolist() for group in groups]
    grouped = {number for group in near for number in group}
    alone = [
        [number] for number, text in enumerate(_distinct(cohort)) if number not in grouped and is_long(text)
    ]
    rows = rows_by_number(cohort.text_ids)
    return [np.sort(np.concatenate([rows[number] for number in group])) for group in [*near, *alone]]


def _print(findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    if not findings:
        typer.echo("nothing was found; that is no proof that nothing is there")
        return
    table = Table(title="worth a look; patient data, stays at this site", title_justify="left")
    for name in ("what", "found", "rows", "files", "what to do"):
        table.add_column(name, overflow="fold")
    for one in findings:
        rows = ", ".join(map(str, one.rows[:EXAMPLES])) + (", …" if len(one.rows) > EXAMPLES else "")
        table.add_row(one.kind, f"{one.found} {one.unit}", rows, "\n".join(one.files), one.remedy)
    Console().print(table)
