"""Settings files: frozen models that refuse an unknown key and name the nearest known one."""

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator


class SettingsError(ValueError):
    """A settings file is missing, is not TOML, or says something that cannot be meant."""


def _kebab(name: str) -> str:
    return name.replace("_", "-")


class Settings(BaseModel):
    """Base of every table of a settings file: frozen, checked when built, kebab-case in TOML."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=_kebab, populate_by_name=True)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the file at ``path``.

        Raises:
            SettingsError: naming the file, the key and what is expected there.
        """
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise SettingsError(f"no settings file at {path}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SettingsError(f"{path} is not TOML: {error}") from None
        return cls.parse(document, source=str(path))

    @classmethod
    def parse(cls, document: dict[str, Any], *, source: str) -> Self:
        """Check ``document`` (keys as in TOML); ``source`` names it in errors.

        Raises:
            SettingsError: one line a mistake; an unknown key names its nearest known neighbour.
        """
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            lines = [_explain(cls, dict(mistake)) for mistake in error.errors()]
            raise SettingsError("\n".join([f"{source} cannot be used:", *lines])) from None


class ModelSettings(Settings):
    """Which CLIP model, as the coordinator's file or a site's names it.

    Attributes:
        encoder: ``tiny``, ``thumbnail``, ``vit-b-16``, or a local Hugging Face folder with a CLIP model.
        image_size: Pixels of the square model input; ignored for a folder, which knows its own.
        max_tokens: Longest text; ignored for a folder.
        seed: Initial weights.
    """

    encoder: str = "tiny"
    image_size: int = Field(default=64, ge=16, le=1024)
    max_tokens: int = Field(default=64, ge=8, le=512)
    seed: int = Field(default=0, ge=0)

    def below(self, folder: Path) -> Self:
        """The same with the absolute path of an encoder that lies in ``folder``."""
        local = folder / self.encoder
        return self.model_copy(update={"encoder": str(local)}) if local.is_dir() else self


class OwnModel(ModelSettings):
    """The model of a site's own in runs that share prototypes alone; others train the common one.

    Its initial weights, in a folder or by the seed, must not have been made from this cohort's patients: they
    are taken for public. Where its embeddings are not as wide as the run's, its projections begin anew.

    Attributes:
        part: What of it is trained.
    """

    part: Literal["full", "lora", "heads", "prompts"] = "heads"


def _several(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


Paths = Annotated[tuple[Path, ...], BeforeValidator(_several)]  # in TOML one string, or a list of them


class PairSource(Settings):
    """Where image-text pairs are: a DICOM folder with reports, or an image table.

    Attributes:
        dicom: Folder of DICOM files; structured reports among them are read, others are named below.
        reports: CSV or Parquet files of reports.
        reports_hl7: Files of HL7 v2 ORU messages, or folders of them.
        reports_fhir: JSON or NDJSON files of FHIR DiagnosticReports, or folders of them.
        reports_text: Folders of text files.
        reports_sr: DICOM structured reports that are not in ``dicom``, or folders of them.
        reports_text_pattern: Regular expression with the named groups accession, study_uid, or patient and
            study_id, which the end of a text file's path matches; by default that of MIMIC-CXR.
        hl7_accession: Fields such as ``OBR-18`` that hold the accession number, the first choice first.
        table: Instead of them, an image table (CSV: image, text, patient_id, perhaps split).
        where: Only the rows of ``table`` with these values.
        labels: CSV of labels, for evaluation only.
    """

    dicom: Path | None = None
    reports: Paths = ()
    reports_hl7: Paths = ()
    reports_fhir: Paths = ()
    reports_text: Paths = ()
    reports_sr: Paths = ()
    reports_text_pattern: str | None = None
    hl7_accession: tuple[str, ...] | None = None
    table: Path | None = None
    where: dict[str, str] = Field(default_factory=dict)
    labels: Path | None = None

    PATHS: ClassVar[tuple[str, ...]] = ("dicom", "table", "labels")
    REPORTS: ClassVar = ("reports", "reports_hl7", "reports_fhir", "reports_text", "reports_sr")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.table is None) == (self.dicom is None):
            raise ValueError("name one source: table, or dicom with reports")
        for name in self.REPORTS:
            if getattr(self, name) and self.dicom is None:
                raise ValueError(f"{_kebab(name)} belong to dicom; a table brings its own texts")
        return self

    @classmethod
    def path_keys(cls) -> list[str]:
        """The keys that TOML uses for paths, which are nobody else's business."""
        return [_kebab(name) for name in (*cls.PATHS, *cls.REPORTS)]

    def relative_to(self, folder: Path) -> Self:
        """These settings with every relative path below ``folder``."""
        single = {name: folder / path for name in self.PATHS if (path := getattr(self, name)) is not None}
        several = {name: tuple(folder / path for path in getattr(self, name)) for name in self.REPORTS}
        return self.model_copy(update={**single, **several})


def _explain(model: type[BaseModel], mistake: dict[str, Any]) -> str:
    location = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] != "extra_forbidden":
        return f"  {location or 'file'}: {mistake['msg']}"
    *tables, key = mistake["loc"]
    known = _keys(model, tables)
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"  unknown key {location!r}{hint} (known here: {', '.join(known)})"


def _keys(model: type[BaseModel], tables: list[Any]) -> list[str]:
    """The keys TOML may use in the table reached from ``model`` through ``tables``."""
    for table in tables:
        for name, field in model.model_fields.items():
            if table in (name, field.alias):
                nested = [t for t in (field.annotation, *_arguments(field.annotation)) if _is_model(t)]
                if nested:
                    model = nested[0]
    return [field.alias or name for name, field in model.model_fields.items()]


def _arguments(annotation: Any) -> tuple[Any, ...]:
    return getattr(annotation, "__args__", ())


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
