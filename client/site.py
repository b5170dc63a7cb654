"""One hospital's installation: its folder, its `site.toml`, its cohort, ledger and policy."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from client.cohort import Cohort, CohortSettings, SourceMissingError, build_cohort
from client.cohort.salt import open_or_make_salt
from client.cohort.settings import MIN_IMAGE_SIZE, CohortModality
from client.cohort.workers import SECONDS_PER_FILE
from client.limits import Policy
from client.pacs import DicomWebTable, DimseTable, Fetched, Spool, fetch, open_source
from client.reports.settings import ReportSettings
from privacy.accounting import default_delta
from privacy.ledger import Ledger
from privacy.signing import SiteKey
from strategies.settings import OwnModel, PairSource, Settings, SettingsError

SITE_FILE = "site.toml"
LEDGER_FILE = "ledger.sqlite"
PINS_FILE = "pins.toml"
INCOMING = "incoming"
Pins = dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]]
EngineName = Literal["book-keeping", "hooks", "vmap"]
Precision = Literal["float32", "bfloat16"]


class CohortTable(PairSource):
    """Where the site's images and reports are, and what it says about them.

    Attributes:
        patients_declared: The cohort's size as the site states it in public; never the exact count.
        image_size: Pixels images are packed at.
        ct_windows: Centre and width in Hounsfield units of what CT is shown by; without any, it is not read.
            Two or three are the channels of what the model sees.
        test_fraction: Share of patients held out, where no split column says so.
        modality: ``pairs`` of an image and a report; or ``images`` without reports, or ``texts`` without
            images, which join concepts by their labels alone.
        label_reports: Whether reports are read for labels of the findings for which the source brings none.
        findings: YAML of the findings to read them for, instead of those that come along.
        merge: CSV with the columns patient_id and same_as: ids of one patient, who is one in everything.
        seconds_per_file: Wall time after which a file is given up.
        max_failure_share: Largest share of inputs that may fail; above it the cohort of before stays.
        salt: For simulations, which have to repeat. Whoever reads it can tell pseudonyms and the split; a
            hospital leaves it out and gets a secret of its own, in ``cohort.salt``.
        dicomweb: A PACS to fetch from; ``dicom``, by default ``incoming``, is then where its files are kept.
        dimse: Instead of it, a PACS that speaks DICOM's own protocol.
    """

    patients_declared: int = Field(ge=1)
    image_size: int = Field(default=224, ge=16, le=1024)
    ct_windows: tuple[tuple[float, float], ...] = Field(default=(), max_length=3)
    test_fraction: float = Field(default=0.2, ge=0, lt=1)
    modality: CohortModality = "pairs"
    label_reports: bool = False
    findings: Path | None = None
    merge: Path | None = None
    seconds_per_file: float = Field(default=SECONDS_PER_FILE, gt=0)
    max_failure_share: float = Field(default=1.0, ge=0, le=1)
    salt: str | None = Field(default=None, min_length=1)
    dicomweb: DicomWebTable | None = None
    dimse: DimseTable | None = None

    PATHS: ClassVar[tuple[str, ...]] = (*PairSource.PATHS, "findings", "merge")

    @model_validator(mode="before")
    @classmethod
    def _kept_somewhere(cls, table: Any) -> Any:
        if isinstance(table, dict) and ("dicomweb" in table or "dimse" in table):
            return {"dicom": INCOMING, **table}
        return table

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        if self.dicomweb is not None and self.dimse is not None:
            raise ValueError("name one PACS: dicomweb or dimse")
        if self.modality == "images" and (
            self.label_reports or any(getattr(self, name) for name in self.REPORTS)
        ):
            raise ValueError("cohort.modality 'images' has no reports: remove their keys, or say 'pairs'")
        if self.modality == "texts" and self.table is None:
            raise ValueError("cohort.modality 'texts' is read from a table with the columns text, patient_id")
        if self.findings is not None and not self.label_reports:
            raise ValueError("findings are what reports are read for: set label-reports = true")
        return self

    @property
    def pacs(self) -> DicomWebTable | DimseTable | None:
        """The PACS to fetch from, if there is one."""
        return self.dicomweb or self.dimse


class Device(Settings):
    """What trains, and how.

    Attributes:
        name: ``auto`` takes a GPU if there is one.
        threads: Cores used; 0 leaves it to `cores`.
        engine: What clips under privacy; all give the same sums, ``book-keeping`` is the fast one.
        physical_batch: Patients (or groups) differentiated at a time; bounds memory, not results.
        precision: Of the model's products under privacy.
    """

    name: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(default=0, ge=0)
    engine: EngineName = "book-keeping"
    physical_batch: int = Field(default=64, ge=1)
    precision: Precision = "float32"

    @model_validator(mode="after")
    def _engine_knows_precision(self) -> Self:
        if self.precision != "float32" and self.engine != "book-keeping":
            raise ValueError(f"precision {self.precision!r} is for engine 'book-keeping': set one of the two")
        return self

    @property
    def cores(self) -> int:
        """How many cores train: ``threads``, or else OMP_NUM_THREADS, or else all this process may use.

        Whoever runs several side by side bounds each by the environment, as Ray does.
        """
        asked = os.environ.get("OMP_NUM_THREADS", "")
        bound = int(asked) if asked.isdecimal() else 0
        return self.threads or bound or len(os.sched_getaffinity(0))


class Testing(Settings):
    """For tests alone: a fixed noise seed makes runs repeatable and protects nobody; the ledger says so."""

    insecure_noise_seed: int | None = Field(default=None, ge=0)


class SecureAggregation(Settings):
    """What the site asks of a sum in which its update is hidden among others.

    Attributes:
        pins: Public key (``site.pub``) of every site that may take part, by name. They have to come from
            these sites themselves: whoever chooses them reads the updates. Those of ``pins.toml`` beside this
            file, which a simulation writes, are added.
        at_least: Smallest threshold it takes part under.
        required: Whether to refuse whatever is not masked.
    """

    pins: Pins = Field(default_factory=dict)
    at_least: int = Field(default=2, ge=2)
    required: bool = False


class PinFile(Settings):
    """``pins.toml``: more pins, such as those a simulation writes."""

    pins: Pins


class SiteSettings(Settings):
    """The hospital's file. Relative paths are relative to its folder."""

    version: Literal[1]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    cohort: CohortTable
    policy: Policy = Policy()
    model: OwnModel | None = None
    device: Device = Device()
    secure_aggregation: SecureAggregation = SecureAggregation()
    testing: Testing = Testing()

    @model_validator(mode="after")
    def _something_to_train(self) -> Self:
        if self.cohort.modality == "images" and self.model is not None and self.model.part == "prompts":
            raise ValueError(
                "prompts are trained on texts, and cohort.modality is 'images': name another part"
            )
        return self


@dataclass(frozen=True, kw_only=True)
class Site:
    """An opened installation. Everything the hospital keeps lies in ``folder``."""

    folder: Path
    settings: SiteSettings

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read ``folder/site.toml``.

        Raises:
            SettingsError: no such folder or file, or a setting that cannot be meant.
        """
        if not folder.is_dir():
            raise SettingsError(f"no site folder {folder}: make it with a {SITE_FILE}, see configs/site.toml")
        return cls(folder=folder, settings=SiteSettings.load(folder / SITE_FILE))

    @property
    def name(self) -> str:
        """The site's public name."""
        return self.settings.name

    @property
    def own_model(self) -> OwnModel | None:
        """The site's own model, its folder's path absolute; null: it trains the public one of the run."""
        own = self.settings.model
        return None if own is None else own.below(self.folder.resolve())

    @property
    def delta(self) -> float:
        """The cohort's failure probability."""
        declared = self.settings.cohort.patients_declared
        return self.settings.policy.delta or default_delta(declared)

    def fetch(self, *, on_progress: Callable[[int, int], None] | None = None) -> Fetched | None:
        """Bring what the site's PACS has for it and is not here yet; nothing where no PACS is named.

        Only this asks a PACS. A round of training reads what is here.

        Raises:
            CohortError: the PACS cannot be used; what is fetched stays, and the next call goes on from there.
        """
        table, folder = self.settings.cohort.pacs, self._path(self.settings.cohort.dicom)
        if table is None or folder is None:
            return None
        table, spool = table.relative_to(self.folder), Spool(folder)
        return fetch(open_source(table, spool), table, spool, on_progress=on_progress)

    def cohort(self, *, on_progress: Callable[[int, int], None] | None = None) -> Cohort:
        """The packed cohort: built on first use, opened afterwards while its source is unchanged.

        Raises:
            CohortError: the source cannot be used; the text is for the hospital's eyes.
        """
        return build_cohort(self.cohort_settings(), self.cohort_folder, on_progress=on_progress)

    def cohort_settings(self) -> CohortSettings:
        """How the cohort is packed, with the site's secret, which is made if there is none.

        Raises:
            CohortError: nothing is fetched from the PACS yet, or the secret is lost.
        """
        source = self.settings.cohort
        folder = self._path(source.dicom)
        if source.pacs is not None and folder is not None and not folder.is_dir():
            raise SourceMissingError(f"nothing is fetched yet: run clipward cohort build {self.folder}")
        return CohortSettings(
            dicom=folder,
            reports=ReportSettings.of(source, self.folder),
            table=self._path(source.table),
            where=source.where,
            labels=self._path(source.labels),
            modality=source.modality,
            label_reports=source.label_reports,
            findings=self._path(source.findings),
            image_size=MIN_IMAGE_SIZE if source.modality == "texts" else source.image_size,
            ct_windows=source.ct_windows,
            test_fraction=source.test_fraction,
            merge=self._path(source.merge),
            seconds_per_file=source.seconds_per_file,
            max_failure_share=source.max_failure_share,
            salt=source.salt or open_or_make_salt(self.folder, cohort=self.cohort_folder),
        )

    def pins(self) -> dict[str, str]:
        """Public keys of the sites it may be summed with.

        Raises:
            SettingsError: ``pins.toml`` holds something else.
        """
        own, file = self.settings.secure_aggregation, self.folder / PINS_FILE
        kept = PinFile.load(file).pins if file.is_file() else {}
        return {**kept, **own.pins}

    @property
    def cohort_folder(self) -> Path:
        """Where the cohort is packed."""
        return self.folder / "cohort"

    def ledger(self) -> Ledger:
        """The budget of this site's patients. It stays one ledger when images are added to the cohort.

        Its key is made with it, never for a ledger that is there: that would hide that the key was lost.

        Raises:
            LedgerError: the ledger or its key cannot be used; the text says why and what to do.
        """
        return Ledger.open(key=self.key(), **self._budget())

    def key(self) -> SiteKey:
        """The site's key, made where there is neither key nor ledger.

        Raises:
            KeyUnusable: it cannot be used, or was lost.
        """
        make = not (self.folder / LEDGER_FILE).exists()
        return SiteKey.open_or_make(self.folder) if make else SiteKey.open(self.folder)

    def unread_ledger(self) -> Ledger:
        """The ledger without a look at its rows, for those who examine them.

        Raises:
            KeyUnusable: there is no public key to examine them with.
        """
        return Ledger(key=SiteKey.open(self.folder), **self._budget())

    def sign_ledger(self) -> Ledger:
        """Vouch with the site's key, made if there is none, for a ledger that another or none has signed.

        Raises:
            LedgerError: the ledger is not whole, or is not this site's.
        """
        ledger = Ledger(key=SiteKey.open_or_make(self.folder), **self._budget())
        ledger.sign_over()
        return ledger

    def _budget(self) -> dict[str, Any]:
        return {
            "path": self.folder / LEDGER_FILE,
            "cohort": self.name,
            "epsilon_max": self.settings.policy.epsilon_max,
            "delta": self.delta,
        }

    def _path(self, path: Path | None) -> Path | None:
        return None if path is None else self.folder / path


@lru_cache(maxsize=64)
def packed_cohort(folder: Path) -> Cohort:
    """The cohort of the site in ``folder``, looked at once per process: a round need not scan it again."""
    return Site.open(folder).cohort()
