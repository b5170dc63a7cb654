"""What a site's file may say about a PACS."""

from pathlib import Path

import pytest

from client.cohort import SourceMissingError
from client.pacs import DicomWebTable, DimseTable
from client.site import Site
from strategies.settings import SettingsError

HEAD = 'version = 1\nname = "north"\n[cohort]\npatients-declared = 1000\nreports = "reports.csv"\n'
WEB = '[cohort.dicomweb]\nurl = "https://pacs.example.org/dicom-web"\n'
DIMSE = '[cohort.dimse]\nhost = "pacs.example.org"\ncalled-ae = "PACS"\n'


def opened(folder: Path, text: str) -> Site:
    (folder / "site.toml").write_text(text)
    return Site.open(folder)


def test_the_shortest_tables_have_careful_defaults(tmp_path: Path) -> None:
    web = opened(tmp_path, HEAD + WEB).settings.cohort
    assert web.dicom == Path("incoming")
    assert isinstance(web.pacs, DicomWebTable)
    assert (web.pacs.modalities, web.pacs.connections) == (("CR", "DX"), 2)
    dimse = opened(tmp_path, HEAD + DIMSE).settings.cohort
    assert isinstance(dimse.pacs, DimseTable)
    assert (dimse.pacs.port, dimse.pacs.calling_ae, dimse.pacs.senders) == (104, "CLIPWARD", ())


def test_the_folder_for_fetched_files_may_be_named(tmp_path: Path) -> None:
    text = HEAD.replace("[cohort]", '[cohort]\ndicom = "big/disk"')
    assert opened(tmp_path, text + WEB).settings.cohort.dicom == Path("big/disk")


def test_the_shipped_example_names_every_key(tmp_path: Path) -> None:
    lines = (Path(__file__).parents[3] / "configs" / "site.toml").read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if "[cohort.dicomweb]" in line)
    middle = next(number for number, line in enumerate(lines) if "[cohort.dimse]" in line)
    end = next(number for number, line in enumerate(lines) if line.startswith("[policy]"))

    def said(part: list[str]) -> str:
        return "\n".join(line.removeprefix("# ") for line in part)

    web = opened(tmp_path, f"{HEAD}{said(lines[start:middle])}").settings.cohort.pacs
    dimse = opened(tmp_path, HEAD + said(lines[middle:end]).replace("tls = false", "")).settings.cohort.pacs
    assert web is not None
    assert dimse is not None
    assert set(DicomWebTable.model_fields) - web.model_fields_set == {
        "until",
        "certificate",
        "key",
        "secret_env",
    }
    assert set(DimseTable.model_fields) - dimse.model_fields_set - set(DicomWebTable.model_fields) == {"tls"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (WEB + DIMSE, "name one PACS: dicomweb or dimse"),
        (WEB.replace("https", "ftp"), "dicomweb.url: String should match"),
        (WEB.replace("pacs.", "user:secret@pacs."), "dicomweb.url: String should match"),
        (WEB + 'user = "me"\n', "user needs secret-file or secret-env"),
        (WEB + 'secret-file = "a"\nsecret-env = "B"\n', "name one of secret-file and secret-env"),
        (WEB + 'secret = "x"\n', "unknown key 'cohort.dicomweb.secret'; did you mean 'secret-"),
        (WEB + "until = 2020-01-01\n", "until needs since"),
        (WEB + "since = 2020-01-02\nuntil = 2020-01-01\n", "until needs since, a date before it"),
        (WEB + 'certificate = "c.pem"\n', "certificate and key belong together"),
        (WEB + 'keys = { StudyDescripton = "X" }\n', "'StudyDescripton' is no DICOM keyword"),
        (WEB + "connections = 0\n", "dicomweb.connections: .*greater than or equal to 1"),
        (DIMSE + "port = 0\n", "dimse.port: .*greater than or equal to 1"),
        (DIMSE + 'calling-ae = "SEVENTEEN-LETTERS"\n', "dimse.calling-ae: String should match"),
        (DIMSE + 'calling-ae = "A\\\\B"\n', "dimse.calling-ae: String should match"),
        (DIMSE + "tls = true\n", "tls needs certificate and key"),
        (DIMSE + "timeout-seconds = nan\n", "dimse.timeout-seconds"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(change: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        opened(tmp_path, HEAD + change)


@pytest.mark.parametrize("title", ["A", "MY PACS", "SIXTEEN_LETTERS_"])
def test_usual_ae_titles_are_taken(title: str, tmp_path: Path) -> None:
    pacs = opened(tmp_path, HEAD + DIMSE.replace('"PACS"', f'"{title}"')).settings.cohort.pacs
    assert isinstance(pacs, DimseTable)
    assert pacs.called_ae == title


def test_paths_are_relative_to_the_site() -> None:
    table = DicomWebTable.model_validate({"url": "https://pacs", "secret-file": "secret", "ca": "/etc/ca"})
    moved = table.relative_to(Path("/site"))
    assert (moved.secret_file, moved.ca, moved.studies) == (Path("/site/secret"), Path("/etc/ca"), None)


def test_reading_never_asks_a_pacs(tmp_path: Path) -> None:
    site = opened(tmp_path, HEAD + WEB.replace("pacs.example.org", "pacs.invalid"))
    (tmp_path / "reports.csv").write_text("accession_number,report\n")
    with pytest.raises(SourceMissingError, match="nothing is fetched yet: run clipward cohort build"):
        site.cohort()


def test_a_site_without_a_pacs_fetches_nothing(tmp_path: Path) -> None:
    text = HEAD.replace('reports = "reports.csv"', 'table = "images.csv"')
    assert opened(tmp_path, text).fetch() is None
