"""What a hospital says about its data: where it lies and how it is packed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from client.cohort.display import CHANNELS, channels
from client.cohort.errors import CohortSettingsError
from client.cohort.workers import SECONDS_PER_FILE
from client.reports.settings import ReportSettings

MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 16, 1024
CohortModality = Literal["pairs", "images", "texts"]


@dataclass(frozen=True, kw_only=True)
class CohortSettings:
    """One site's data source, either a DICOM folder with reports or a table of images.

    Attributes:
        dicom: Folder of DICOM files, read recursively.
        reports: Reports for ``dicom`` beside the structured reports in it; a path is a CSV or Parquet file.
        table: CSV with the columns image, text, patient_id and perhaps split.
        where: Keep only the rows of ``table`` with these values, column by column.
        labels: CSV of labels beside the reports or the table.
        modality: What a row is: a pair, or an image or a text by itself, beside what is black, or empty.
        label_reports: Whether texts are read for labels of the findings for which the source brings none.
        findings: YAML of the findings to read them for; by default those of ``client.text``.
        image_size: Side of the packed square images, in pixels.
        ct_windows: Centre and width in Hounsfield units, such as (-600, 1500) for lungs and (40, 400) for
            soft tissue: what a slice is shown by. One gives a grey image; two or three are the channels of
            every image, see ``client.cohort.display.channels``. Without any, CT is not read.
        test_fraction: Share of patients held out where no split column says so.
        merge: CSV with the columns patient_id and same_as: ids of one patient.
        seconds_per_file: Wall time after which a file is given up, in a process beside this one.
        max_failure_share: Largest share of inputs that may be quarantined, unsupported or unpaired among all
            but those ignored and second copies; above it there is no new cohort.
        salt: The site's secret for pseudonyms, the split and the cohort's identity. Another salt is
            another split: choose it once.

    Raises:
        CohortSettingsError: The settings contradict themselves.
    """

    dicom: Path | None = None
    reports: Path | ReportSettings | None = None
    table: Path | None = None
    where: Mapping[str, str] = field(default_factory=dict)
    labels: Path | None = None
    modality: CohortModality = "pairs"
    label_reports: bool = False
    findings: Path | None = None
    image_size: int = 224
    ct_windows: tuple[tuple[float, float], ...] = ()
    test_fraction: float = 0.2
    merge: Path | None = None
    seconds_per_file: float = SECONDS_PER_FILE
    max_failure_share: float = 1.0
    salt: str | bytes

    def __post_init__(self) -> None:
        if (self.dicom is None) == (self.table is None):
            raise CohortSettingsError("expected exactly one of cohort.dicom and cohort.table")
        if self.dicom is None and self.report_settings:
            raise CohortSettingsError("expected cohort.reports only with cohort.dicom")
        if self.where and self.table is None:
            raise CohortSettingsError("expected cohort.where only with cohort.table")
        if self.modality == "texts" and self.table is None:
            raise CohortSettingsError("expected cohort.modality 'texts' only with cohort.table")
        if self.findings is not None and not self.label_reports:
            raise CohortSettingsError("expected cohort.findings only with cohort.label_reports")
        if not MIN_IMAGE_SIZE <= self.image_size <= MAX_IMAGE_SIZE:
            raise CohortSettingsError(
                f"expected cohort.image_size={self.image_size} in [{MIN_IMAGE_SIZE}, {MAX_IMAGE_SIZE}]"
            )
        if self.ct_windows and self.dicom is None:
            raise CohortSettingsError("expected cohort.ct_windows only with cohort.dicom")
        if len(self.ct_windows) > CHANNELS:
            raise CohortSettingsError(
                f"expected at most {CHANNELS} windows in cohort.ct_windows, one for each channel of an "
                f"image, got {len(self.ct_windows)}"
            )
        for centre, width in self.ct_windows:
            if not (math.isfinite(centre) and 1 <= width < math.inf):
                raise CohortSettingsError(f"expected a window in cohort.ct_windows, got {(centre, width)}")
        if not 0 <= self.test_fraction < 1:
            raise CohortSettingsError(f"expected cohort.test_fraction={self.test_fraction} in [0, 1)")
        if not self.seconds_per_file > 0:
            raise CohortSettingsError(f"expected cohort.seconds_per_file={self.seconds_per_file} > 0")
        if not 0 <= self.max_failure_share <= 1:
            raise CohortSettingsError(f"expected cohort.max_failure_share={self.max_failure_share} in [0, 1]")
        if not self.salt:
            raise CohortSettingsError("expected cohort.salt to be the site's secret, got an empty one")

    def __repr__(self) -> str:
        source = "dicom" if self.table is None else "table"
        return f"CohortSettings(source={source!r}, image_size={self.image_size})"

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Of a packed image: (S, S), or (S, S, 3) where CT windows are channels."""
        count = len(channels(self.ct_windows))
        return (self.image_size, self.image_size, *([count] if count > 1 else []))

    @property
    def report_settings(self) -> ReportSettings:
        """Every source of reports beside the images."""
        if isinstance(self.reports, Path):
            return ReportSettings(tables=(self.reports,))
        return self.reports or ReportSettings()

    @property
    def key(self) -> bytes:
        """The salt as the key of every HMAC."""
        return self.salt.encode() if isinstance(self.salt, str) else self.salt
