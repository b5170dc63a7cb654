"""The program as a person uses it: what it leaves, and one line with the remedy when something is wrong."""

import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import tomli_w
from click.testing import Result
from typer.testing import CliRunner

from client.reports.settings import ReportSettings
from client.site import Site
from clipward import demonstration, simulate
from clipward.cli import app
from clipward.summary import epsilon_text
from server.metrics import PrometheusExporter
from strategies.messages import Arrays
from tests.small_hospitals import (
    EPSILON,
    ROUNDS,
    change_site,
    document,
    federation,
    without_claim,
    write_federation,
)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """The program sets up logging for its process, which here is everybody's."""
    root = logging.getLogger()
    handlers, level = root.handlers.copy(), root.level
    levels = {name: logging.getLogger(name).level for name in ("clipward", "flwr")}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, was in levels.items():
        logging.getLogger(name).setLevel(was)


@pytest.fixture
def root(hospitals: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder a person stands in: hospitals, a federation file, nothing run yet."""
    monkeypatch.chdir(hospitals)
    write_federation(hospitals)
    return hospitals


def invoke(*arguments: str | Path | int) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def done(*arguments: str | Path | int) -> Result:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments: str | Path | int) -> str:
    """The last words of a command that fails as it should: no traceback, exit status 2."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    return result.stderr[result.stderr.rindex("error: ") :].rstrip()


def test_without_a_command_it_lists_them() -> None:
    listed = invoke().output
    assert all(command in listed for command in ("synthesize", "cohort", "start", "simulate", "demo"))
    assert done("--version").stdout.startswith("clipward 0.")


@pytest.mark.slow
def test_from_nothing_to_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command in the order of the manual, with the shipped model."""
    monkeypatch.chdir(tmp_path)
    synthesized = done("synthesize", "hospitals", "--sites", 2, "--patients", 30, "--public-patients", 8)
    assert synthesized.stdout.split() == ["hospitals/site-1", "hospitals/site-2"]
    packed = done("cohort", "build", "hospitals/site-1").stdout
    assert "used " in packed
    assert "its quarantine.csv names every file that was not used" in packed
    settings = document(
        tmp_path,
        model={"encoder": "tiny"},
        public_start={
            "dicom": "hospitals/public/dicom",
            "reports": "hospitals/public/reports.csv",
            "epochs": 1,
        },
        training={"rounds": 1, "batch": 12},
    )
    settings["model"].update({"image-size": 32, "max-tokens": 16})
    Path("federation.toml").write_text(tomli_w.dumps(settings))
    (start,) = done("start", "federation.toml").stdout.split()
    assert (tmp_path / start / "start.json").is_file()
    result = done("simulate", "federation.toml")
    assert "train the public start" not in result.stderr
    for line in ("public start", "after private federation", "image to text R@10", "zero-shot macro AUROC"):
        assert line in result.stdout
    assert "model:  runs/small/model" in result.stdout
    assert "report: runs/small/report.html" in result.stdout
    assert (tmp_path / "runs/small/report.html").is_file()


def test_the_guarantee_is_printed_and_never_stronger_than_the_ledgers(root: Path) -> None:
    result = done("simulate", "federation.toml")
    spent = max(Site.open(folder).ledger().spent() for folder in root.glob("hospitals/*"))
    printed = result.stdout.split("Every patient: epsilon = ")[1].split()[0]
    assert printed == epsilon_text(spent)
    assert spent <= float(printed) <= EPSILON
    assert f"round {ROUNDS} of {ROUNDS}: finished" in result.stderr


def test_without_privacy_it_says_so(root: Path) -> None:
    for folder in root.glob("hospitals/*"):
        change_site(folder, policy={"require-dp": False})
    write_federation(root, **without_claim())
    result = done("simulate", "federation.toml")
    assert "No formal guarantee: this run had no differential privacy." in result.stdout
    assert "epsilon" not in result.stdout


def test_noise_from_a_fixed_seed_is_no_guarantee_and_says_so(root: Path) -> None:
    for folder in root.glob("hospitals/*"):
        change_site(folder, testing={"insecure-noise-seed": 1})
    assert (
        "No formal guarantee: the noise came from a fixed seed" in done("simulate", "federation.toml").stdout
    )


def test_a_comparison_is_a_column_and_costs_the_hospitals_nothing(root: Path) -> None:
    result = done("simulate", "federation.toml", "--compare")
    assert "after private federation" in result.stdout
    assert "without DP" in result.stdout
    summary = json.loads((root / "runs/small/summary.json").read_text())
    assert set(summary["compare"]) == {"without_dp"}
    for folder in root.glob("hospitals/*"):
        assert len(Site.open(folder).ledger().events()) == ROUNDS
    assert "error" not in done("simulate", "federation.toml", "--compare", "--resume").stderr


def test_a_resumed_run_shows_the_same_result(root: Path) -> None:
    first = done("simulate", "federation.toml").stdout
    assert done("simulate", "federation.toml", "--resume").stdout == first
    (root / "runs/small/metrics.jsonl").unlink()
    assert (
        "No formal guarantee: nobody knows how this run began."
        in done("simulate", "federation.toml", "--resume").stdout
    )


def test_metrics_are_served_while_it_runs_and_only_then(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scraped: list[str] = []
    ports: list[int] = []
    serve: Callable[..., int] = PrometheusExporter.serve
    evaluator: Callable[..., Callable[[Arrays], Any]] = vars(simulate)["evaluator"]

    def noted(exporter: PrometheusExporter, port: int) -> int:
        assert port == 0
        ports.append(serve(exporter, port))
        return ports[-1]

    def scraping(*args: Any) -> Callable[[Arrays], Any]:
        def measure(arrays: Arrays) -> Any:
            with urlopen(f"http://127.0.0.1:{ports[0]}/metrics", timeout=60) as page:
                scraped.append(page.read().decode())
            return evaluator(*args)(arrays)

        return measure

    monkeypatch.setattr(PrometheusExporter, "serve", noted)
    monkeypatch.setattr(simulate, "evaluator", scraping)
    result = done("simulate", "federation.toml", "--metrics-port", 0, "--compare")
    assert f"metrics: http://127.0.0.1:{ports[0]}/metrics" in result.stderr
    private = scraped[ROUNDS + 1 :]
    assert len(private) == ROUNDS + 1
    assert "clipward_round 0.0" in private[1]
    assert "clipward_up 1.0" in private[-1]
    assert f"clipward_round {ROUNDS - 1}.0" in private[-1]
    assert 'clipward_epsilon_spent{site="site-1"}' in private[-1]
    with pytest.raises(URLError):
        urlopen(f"http://127.0.0.1:{ports[0]}/metrics", timeout=60)


def test_the_demo_can_be_repeated_with_the_same_result_at_no_cost(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = demonstration.Hospitals(sites=2, patients=30, public_patients=0, seed=3)
    monkeypatch.setattr(demonstration, "HOSPITALS", small)
    monkeypatch.setattr(
        demonstration,
        "settings",
        lambda folder: federation(root, simulation={"sites": str(folder)}, training={"batch": 12}),
    )
    first = done("demo", "--folder", root / "demo").stdout
    heads = [Site.open(folder).ledger().head for folder in root.glob("demo/site-*")]
    assert done("demo", "--folder", root / "demo").stdout == first
    assert [Site.open(folder).ledger().head for folder in root.glob("demo/site-*")] == heads
    assert "without DP" in first


def test_an_image_that_cannot_be_read_costs_that_image_only(root: Path) -> None:
    folder = root / "hospitals" / "site-1"
    originals = (folder / "dicom").resolve()
    (folder / "dicom").unlink()
    shutil.copytree(originals, folder / "dicom", copy_function=os.link)
    (folder / "dicom" / "broken.dcm").write_bytes(b"no image at all")
    first, second = sorted(folder.glob("dicom/*/*.dcm"))[:2]
    torn = first.read_bytes()
    first.unlink()
    first.write_bytes(torn[: len(torn) // 2])
    second.unlink()
    second.touch()
    built = done("cohort", "build", folder).stdout
    assert "1 x E_NOT_DICOM" in built
    assert "1 x E_EMPTY_FILE" in built
    assert "1 x E_TRUNCATED" in built
    done("simulate", "federation.toml")
    summary = json.loads((root / "runs/small/summary.json").read_text())
    assert [site["rounds"] for site in summary["sites"]] == [ROUNDS] * 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[training]\nround = 3\n", r"unknown key 'training.round'; did you mean 'rounds'?"),
        ("[trainning]\n", r"unknown key 'trainning'; did you mean 'training'?"),
        ('[objective]\nname = "infonce"\n', "couples the patients of a batch, so no epsilon can be claimed"),
        (
            '[share]\npart = "everything"\n',
            "share.part: Input should be 'full', 'image-tower', 'lora', 'heads', 'image-head', 'prompts' or",
        ),
        ("[training\n", "federation.toml is not TOML"),
        ("\0", "federation.toml is not TOML"),
    ],
)
def test_a_federation_file_that_cannot_be_meant(text: str, message: str, root: Path) -> None:
    Path("federation.toml").write_text('version = 1\nname = "small"\nprivacy.epsilon = 8.0\n' + text)
    for command in ("simulate", "start"):
        assert message in refused(command, "federation.toml")
    assert not Path("runs").exists()


def test_privacy_none_asks_for_the_objective_that_sites_then_train(root: Path) -> None:
    write_federation(root, privacy={"mode": "none", "epsilon": None})
    assert "without privacy every site trains objective.name = 'infonce'" in refused(
        "simulate", "federation.toml"
    )


def test_a_file_that_is_not_there_or_is_none(root: Path) -> None:
    assert refused("simulate", "absent.toml") == "error: no settings file at absent.toml"
    assert "Is a directory: 'hospitals'" in refused("simulate", "hospitals")
    assert "no site folder absent: make it with a site.toml" in refused("cohort", "build", "absent")
    assert "no settings file at runs/site.toml" in refused("cohort", "build", _made(root / "runs"))


def _made(folder: Path) -> str:
    folder.mkdir()
    return folder.name


def test_a_site_file_that_cannot_be_meant(root: Path) -> None:
    change_site(root / "hospitals" / "site-2", policy={"epsilon-maximum": 1.0})
    for command in (("simulate", "federation.toml"), ("cohort", "build", "hospitals/site-2")):
        words = refused(*command)
        assert "site-2/site.toml cannot be used" in words
        assert "unknown key 'policy.epsilon-maximum'; did you mean 'epsilon-max'?" in words


def test_sites_that_are_not_there(root: Path) -> None:
    write_federation(root, simulation={"sites": "nowhere"})
    assert "no site in" in refused("simulate", "federation.toml")
    assert "nowhere: expected sub-folders with a site.toml" in refused("simulate", "federation.toml")


def test_a_cohort_without_a_usable_pair(root: Path) -> None:
    folder = root / "hospitals" / "site-1"
    (folder / "reports.csv").write_text("accession_number,report,patient_id\nnobody,clear,nobody\n")
    for command in (("simulate", "federation.toml"), ("cohort", "build", folder)):
        words = refused(*command)
        assert "no usable pair among" in words
        assert "E_NO_REPORT (no report carries this accession number or study UID)" in words
        assert "quarantine.csv" in words
    assert not list(root.glob("hospitals/*/ledger.sqlite"))


def test_a_model_that_cannot_be_used(root: Path) -> None:
    write_federation(root, model={"encoder": "huge"})
    assert "huge" in refused("simulate", "federation.toml")
    write_federation(root, model={"encoder": "tiny", "image-size": 33})
    assert "expected image_size=33 to be a multiple of the patch size" in refused(
        "simulate", "federation.toml"
    )


def test_a_second_run_on_patients_whose_budget_is_spent(root: Path) -> None:
    done("simulate", "federation.toml")
    heads = [Site.open(folder).ledger().head for folder in root.glob("hospitals/*")]
    write_federation(root, name="second")
    words = refused("simulate", "federation.toml")
    assert "site-1 budget" in words
    assert "only its site can raise policy.epsilon-max" in words
    assert [Site.open(folder).ledger().head for folder in root.glob("hospitals/*")] == heads


def test_a_run_that_exists_or_is_another(root: Path) -> None:
    done("simulate", "federation.toml")
    kept = {path: path.read_bytes() for path in Path("runs/small").rglob("*") if path.is_file()}
    assert "got to round 3: --resume continues it" in refused("simulate", "federation.toml")
    write_federation(root, training={"learning-rate": 0.5})
    words = refused("simulate", "federation.toml", "--resume")
    assert "holds another run: plan.learning_rate was 0.001, is 0.5" in words
    write_federation(root, objective={"anchors": 3})
    assert "holds another run: bundle was" in refused("simulate", "federation.toml", "--resume")
    assert {path: path.read_bytes() for path in Path("runs/small").rglob("*") if path.is_file()} == kept


def test_a_metrics_port_in_use(root: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = refused("simulate", "federation.toml", "--metrics-port", str(port))
    assert f"metrics port {port} on 127.0.0.1 is in use: choose another, or 0 for any" in words
    assert not Path("runs").exists()


def test_a_start_that_was_changed_on_the_disk(root: Path) -> None:
    done("start", "federation.toml")
    (file,) = Path("runs/.starts").glob("*/*/bundle.json")
    file.write_text(file.read_text().replace('"version": 1', '"version": 1, "odd": 1', 1))
    done("simulate", "federation.toml")
    file.write_text(file.read_text().replace("projection_dim", "projection_dam", 1))
    shutil.rmtree("runs/small")
    assert "was changed on disk; delete its folder" in refused("simulate", "federation.toml")


def test_hospitals_of_other_parameters_are_not_overwritten(root: Path) -> None:
    done("synthesize", "new", "--sites", "1", "--patients", "2")
    words = refused("synthesize", "new", "--sites", "1", "--patients", "3")
    assert "new holds synthetic hospitals of other parameters" in words
    assert "expected sites=0 to be at least 1" in refused("synthesize", "more", "--sites", "0")


def test_a_disk_that_cannot_be_written(root: Path) -> None:
    Path("runs").write_text("a file where the folder of all runs should be")
    assert "runs" in refused("simulate", "federation.toml")


def test_the_demos_settings_name_their_data_as_a_federation_file_does(tmp_path: Path) -> None:
    public = demonstration.settings(tmp_path).public_start
    assert public is not None
    assert ReportSettings.of(public, Path()).tables == [tmp_path / "public" / "reports.csv"]
