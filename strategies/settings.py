"""Settings files: frozen models that refuse an unknown key and name the nearest known one."""

import difflib
import tomllib
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


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


class PairSource(Settings):
    """Where image-text pairs are: a DICOM folder with a reports CSV, or an image table.

    Attributes:
        dicom: Folder of DICOM files, with ``reports``, a CSV.
        reports: One report per study.
        table: Instead of them, an image table (CSV: image, text, patient_id, perhaps split).
        where: Only the rows of ``table`` with these values.
        labels: CSV of labels, for evaluation only.
    """

    dicom: Path | None = None
    reports: Path | None = None
    table: Path | None = None
    where: dict[str, str] = Field(default_factory=dict)
    labels: Path | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.table is None) == (self.dicom is None):
            raise ValueError("name one source: table, or dicom with reports")
        if (self.dicom is None) != (self.reports is None):
            raise ValueError("dicom and reports belong together")
        return self


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
