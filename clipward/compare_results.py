"""What a comparison came to, and the files that hold it: ``compare.json``, ``.csv`` and ``.md``."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from rich.filesize import decimal

from clipward.compare_reading import reading, shown
from clipward.compare_rows import MEASURES, Row, by_setting, rows_of
from clipward.compare_runs import Outcome
from clipward.summary import epsilon_text
from server.federation import Metric
from strategies.files import write_text

VERSION = 1
PICTURE = "compare.png"
HEADERS = (
    "arm",
    "image → text R@1/5/10 in %",
    "text → image R@1/5/10 in %",
    "macro AUROC",
    "up",
    "down",
    "s",
    "ε",
)
BRIEF_HEADERS = ("arm", "image → text R@10 %", "text → image R@10 %", "macro AUROC", "up", "s", "ε")
COSTS = ("bytes_up", "bytes_down", "seconds", "epsilon", "delta", "sites", "problem")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All arms.

    Attributes:
        name: Of the federation.
        metric: The measure that reading and picture are about.
        pairs: Held-out pairs of all sites, which every arm is measured on.
        sites: How many the federation has.
        rows: One an arm, those of one setting together.
        reading: Paragraphs in words.
    """

    name: str
    metric: Metric
    pairs: int
    sites: int
    rows: Sequence[Row]
    reading: Sequence[str]

    @classmethod
    def of(cls, outcomes: Iterable[Outcome], *, name: str, metric: Metric, pairs: int, sites: int) -> Self:
        """Sum up what came of every arm."""
        rows = rows_of(outcomes)
        words = reading(rows, metric=metric, pairs=pairs, sites=sites)
        return cls(name=name, metric=metric, pairs=pairs, sites=sites, rows=rows, reading=words)

    def write(self, folder: Path) -> None:
        """Write the files; the picture, which the third of them shows, is drawn elsewhere."""
        document = json.dumps({"version": VERSION, **asdict(self)}, indent=2, ensure_ascii=False)
        write_text(folder / "compare.json", document + "\n")
        write_text(folder / "compare.csv", self._csv())
        write_text(folder / "compare.md", self._markdown())

    def _csv(self) -> str:
        text = io.StringIO(newline="")
        table = csv.writer(text, lineterminator="\n")
        numbers = [column for measure in MEASURES for column in (measure, f"{measure}.margin")]
        table.writerow(["setting", "arm", "kind", "site", *numbers, *COSTS])
        for row in self.rows:
            found = (row.measures.get(measure) for measure in MEASURES)
            estimates = [cell for one in found for cell in ((one.mean, one.margin) if one else (None, None))]
            costs = (getattr(row, cost) for cost in COSTS)
            table.writerow([row.setting, row.name, row.kind, row.site, *estimates, *costs])
        return text.getvalue()

    def _markdown(self) -> str:
        lines = [f"# {self.name}: is joining worth it?", "", *(f"{words}\n" for words in self.reading)]
        for setting, rows in by_setting(self.rows):
            table = [HEADERS, ["---", *["---:"] * (len(HEADERS) - 1)], *map(cells, rows)]
            lines += [f"## {setting}", "", *(f"| {' | '.join(line)} |" for line in table), ""]
        return "\n".join([*lines, f"![Every arm with its interval]({PICTURE})", ""])


def cells(row: Row) -> list[str]:
    """A row as a person reads it, under `HEADERS`; what is not known or does not travel is a dash."""
    return [
        row.name,
        _recalls(row, "image_to_text"),
        _recalls(row, "text_to_image"),
        shown("zero_shot.macro_auroc", row.measures.get("zero_shot.macro_auroc")),
        *("-" if count is None else decimal(round(count)) for count in (row.bytes_up, row.bytes_down)),
        "-" if row.seconds is None else f"{row.seconds:.0f}",
        "-" if row.epsilon is None else epsilon_text(row.epsilon),
    ]


def brief_cells(row: Row) -> list[str]:
    """The same under `BRIEF_HEADERS`, without what a narrow terminal has no room for."""
    name, *_, auroc, up, _, seconds, epsilon = cells(row)
    recalls = (f"retrieval.{way}.r10" for way in ("image_to_text", "text_to_image"))
    shorter = [shown(measure, row.measures.get(measure)) for measure in recalls]
    return [name, *shorter, auroc, up, seconds, epsilon]


def _recalls(row: Row, way: str) -> str:
    """All three, and the last one's margin."""
    r1, r5, r10 = (
        shown(measure, row.measures.get(measure))
        for measure in MEASURES
        if measure.startswith(f"retrieval.{way}.")
    )
    return f"{r1.split()[0]}/{r5.split()[0]}/{r10}"
