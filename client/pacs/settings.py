"""The tables ``[cohort.dicomweb]`` and ``[cohort.dimse]`` of a site's file."""

from datetime import date
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator
from pydicom.datadict import tag_for_keyword

from strategies.settings import Settings

AeTitle = Annotated[str, StringConstraints(pattern=r"^[!-\[\]-~]([ -\[\]-~]{0,14}[!-\[\]-~])?$")]  # PS3.5 6.2
Port = Annotated[int, Field(ge=1, le=65535)]


def _known(keyword: str) -> str:
    if tag_for_keyword(keyword) is None:  # sent all the same, it would filter nothing
        raise ValueError(f"{keyword!r} is no DICOM keyword, such as StudyDescription")
    return keyword


Keyword = Annotated[str, AfterValidator(_known)]


class PacsTable(Settings):
    """Which studies are asked for, and what both ways of asking have in common.

    Attributes:
        modalities: Series of these are fetched, from studies that hold one; empty takes any. Structured
            reports (SR) of such a study always come along.
        since: Earliest StudyDate; without it studies are not asked for by date.
        until: Latest StudyDate; by default today.
        studies: CSV with a column accession_number or study_instance_uid: only these studies. A table of
            reports serves.
        keys: More attributes a study must match, by keyword: ``{StudyDescription = "*CHEST*"}``.
        ca: File of certificates that vouch for the PACS.
        certificate: This site's own TLS certificate (PEM).
        key: Its private key (PEM).
        timeout_seconds: How long the PACS may be silent.
        connections: Studies fetched at a time.
    """

    modalities: tuple[str, ...] = ("CR", "DX")
    since: date | None = None
    until: date | None = None
    studies: Path | None = None
    keys: dict[Keyword, str] = Field(default_factory=dict)
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    timeout_seconds: float = Field(default=60.0, gt=0, le=3600)
    connections: int = Field(default=2, ge=1, le=16)

    PATHS: ClassVar[tuple[str, ...]] = ("studies", "ca", "certificate", "key")

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        if self.until is not None and (self.since is None or self.until < self.since):
            raise ValueError("until needs since, a date before it")
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together")
        return self

    def relative_to(self, folder: Path) -> Self:
        """These settings with every relative path below ``folder``."""
        paths = {name: folder / path for name in self.PATHS if (path := getattr(self, name)) is not None}
        return self.model_copy(update=paths)


class DicomWebTable(PacsTable):
    """A PACS that speaks DICOMweb.

    Attributes:
        url: Of its DICOMweb service, as ``https://pacs.example.org/dicom-web``.
        user: With it the secret is a password (basic authentication), without it a bearer token.
        secret_file: Holds the secret, read anew for every request: a token may be renewed meanwhile.
        secret_env: Instead of it, the name of an environment variable.
    """

    url: str = Field(pattern=r"^https?://[^/?#@\s]+(/[^?#\s]*)?$")
    user: str | None = Field(default=None, pattern=r"^[^:\x00-\x1f]+$")
    secret_file: Path | None = None
    secret_env: str | None = None

    PATHS: ClassVar[tuple[str, ...]] = (*PacsTable.PATHS, "secret_file")

    @model_validator(mode="after")
    def _one_secret(self) -> Self:
        if self.secret_file is not None and self.secret_env is not None:
            raise ValueError("name one of secret-file and secret-env")
        if self.user is not None and self.secret_file is None and self.secret_env is None:
            raise ValueError("user needs secret-file or secret-env")
        return self


class DimseTable(PacsTable):
    """A PACS that speaks DICOM's own protocol: it is queried by C-FIND and sends what C-MOVE asks for.

    Attributes:
        host: The PACS's address.
        port: The PACS's port.
        called_ae: The PACS's AE title.
        calling_ae: This site's AE title; the PACS must know it, with this machine's address and ``own_port``.
        own_address: Where this site listens while it fetches.
        own_port: The port it listens at.
        senders: AE titles that may send; by default the PACS's.
        tls: Whether both directions are encrypted; needs ``certificate`` and ``key``.
    """

    host: str = Field(min_length=1)
    port: Port = 104
    called_ae: AeTitle
    calling_ae: AeTitle = "CLIPWARD"
    own_address: str = "0.0.0.0"  # noqa: S104 - the PACS connects from another machine
    own_port: Port = 11112
    senders: tuple[AeTitle, ...] = ()
    tls: bool = False

    @model_validator(mode="after")
    def _tls_has_certificate(self) -> Self:
        if self.tls and self.certificate is None:
            raise ValueError("tls needs certificate and key: this site is a server too when the PACS sends")
        return self
