import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client.cohort import SaltError, SourceMissingError, TooManyFailuresError
from client.cohort.salt import SALT_FILE
from client.site import Device, Site, packed_cohort
from privacy.errors import WrongLedger
from strategies.settings import SettingsError

SHORTEST = 'version = 1\nname = "north"\n[cohort]\ntable = "images.csv"\npatients-declared = 1000\n'


def opened(folder: Path, text: str = SHORTEST) -> Site:
    (folder / "site.toml").write_text(text)
    return Site.open(folder)


def test_the_shortest_file_has_the_strictest_defaults(tmp_path: Path) -> None:
    site = opened(tmp_path)
    policy = site.settings.policy
    assert (site.name, policy.require_dp, policy.epsilon_max, policy.min_patients) == ("north", True, 8.0, 20)
    assert site.settings.testing.insecure_noise_seed is None


def test_the_shipped_example_is_a_valid_file_that_says_the_defaults(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "configs" / "site.toml"
    site = opened(tmp_path, example.read_text())
    plain = opened(
        tmp_path, SHORTEST.replace('table = "images.csv"', 'dicom = "dicom"\nreports = "reports.csv"')
    )
    assert site.settings.policy == plain.settings.policy
    assert site.settings.device == plain.settings.device
    assert site.settings.cohort == plain.settings.cohort


@pytest.mark.parametrize(("declared", "delta"), [(1, 0.1), (20, 1e-3), (1000, 1e-4), (1001, 1e-5)])
def test_delta_follows_from_the_declared_size(declared: int, delta: float, tmp_path: Path) -> None:
    text = SHORTEST.replace("patients-declared = 1000", f"patients-declared = {declared}")
    assert opened(tmp_path, text).delta == pytest.approx(delta, rel=1e-12)


def test_the_hospital_may_choose_its_delta(tmp_path: Path) -> None:
    assert opened(tmp_path, SHORTEST + "[policy]\ndelta = 1e-9\n").delta == 1e-9


def test_cores_are_those_of_the_file_or_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert (Device(threads=2).cores, Device().cores) == (2, 3)


@pytest.mark.parametrize("unusable", [None, "", "0", "-1", "many", "4,2"])
def test_without_a_number_of_threads_every_core_of_this_process_trains(
    unusable: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if unusable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", unusable)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {1, 4, 5})  # of more that the machine has
    assert Device().cores == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("[policy]\nepsilon_maks = 1\n", r"unknown key 'policy.epsilon_maks'; did you mean 'epsilon-max'\?"),
        ("[polici]\n", r"unknown key 'polici'; did you mean 'policy'\?"),
        (
            "[policy]\nparts = ['all']\n",
            r"policy.parts.0: Input should be 'full', 'image-tower', 'lora', 'heads', 'image-head', ",
        ),
        ("[policy]\nmin-patients = 1\n", "policy.min-patients: .*greater than or equal to 2"),
        ("[policy]\nmax-sample-rate = 1.5\n", "policy.max-sample-rate: .*less than or equal to 1"),
        ("[policy]\nepsilon-max = nan\n", "policy.epsilon-max: .*greater than 0"),
        ("[policy]\nmax-steps = 0\n", "policy.max-steps: .*greater than or equal to 1"),
        ("[policy]\nobjectives = ['infoncee']\n", "policy.objectives.0: Input should be 'anchored', "),
        ("[policy]\nmetrics = ['loss']\n", "policy.metrics.0: Input should be 'epsilon', 'epsilon-max', "),
        ("[policy]\ncode = ['abc']\n", "policy.code.0: String should match pattern"),
        ("[policy]\nruns = ['']\n", "policy.runs.0: String should have at least 1 character"),
        ("[policy]\nmax-release-byte = 1\n", "unknown key .*did you mean 'max-release-bytes'"),
        ("[policy]\nquiet-hours = '22:00-06:00'\n", "policy: .*quiet-hours and timezone belong together"),
        ("[policy]\ntimezone = 'Europe/Berlin'\n", "policy: .*quiet-hours and timezone belong together"),
        ("[policy]\nquiet-hours = '22-6'\n", "policy.quiet-hours: .*such as '22:00-06:00', got '22-6'"),
        ("[policy]\nquiet-hours = '24:00-06:00'\n", "policy.quiet-hours: .*two times of day"),
        ("[policy]\nquiet-hours = '06:00-06:00'\n", "is either always or never: name two different times"),
        ("[policy]\nquiet-hours = 22\n", "policy.quiet-hours: "),
        ("[policy]\ntimezone = 'CEST'\n", "policy.timezone: invalid timezone: CEST"),
        ("[testing]\ninsecure-noise-seed = -1\n", "testing.insecure-noise-seed"),
        ("[device]\nname = 'tpu'\n", "device.name: Input should be 'auto', 'cpu' or 'cuda'"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(change: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        opened(tmp_path, SHORTEST + change)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "name one source: table, or dicom with reports"),
        ('table = "t.csv"\ndicom = "dicom"\nreports = "r.csv"', "name one source"),
        ('table = "t.csv"\nreports = "r.csv"', "reports belong to dicom"),
        ('table = "t.csv"\nreports-hl7 = ["a", "b"]', "reports-hl7 belong to dicom"),
    ],
)
def test_a_cohort_has_one_source(source: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        opened(tmp_path, SHORTEST.replace('table = "images.csv"', source))


@pytest.mark.parametrize("name", ["", "../up", "a b", "-x", "x" * 65, "a\\nb"])
def test_a_name_that_could_not_be_a_label_or_a_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="name: "):
        opened(tmp_path, SHORTEST.replace("north", name))


def test_a_missing_folder_or_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no site folder .*absent: make it with a site.toml"):
        Site.open(tmp_path / "absent")
    with pytest.raises(SettingsError, match=r"no settings file at .*site.toml"):
        Site.open(tmp_path)


def test_data_lies_relative_to_the_site(tmp_path: Path) -> None:
    with pytest.raises(SourceMissingError, match=str(tmp_path / "images.csv")):
        opened(tmp_path).cohort()


def images(folder: Path) -> str:
    """Write a table of a few images; return what a site file says of it."""
    for number in range(8):
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(folder / f"{number}.png")
    rows = [f"{number}.png,Note {number}.,p{number}" for number in range(8)]
    (folder / "images.csv").write_text("\n".join(["image,text,patient_id", *rows]))
    return SHORTEST.replace("patients-declared", "image-size = 16\ntest-fraction = 0.5\npatients-declared")


def test_a_site_keeps_a_secret_of_its_own(tmp_path: Path) -> None:
    text = images(tmp_path)
    first = opened(tmp_path, text).cohort()
    secret = (tmp_path / SALT_FILE).read_bytes()
    assert opened(tmp_path, text.replace("north", "south")).cohort().identity == first.identity
    assert (tmp_path / SALT_FILE).read_bytes() == secret
    (tmp_path / SALT_FILE).unlink()
    with pytest.raises(SaltError, match="restore it"):
        opened(tmp_path, text).cohort()
    shutil.rmtree(tmp_path / "cohort")
    assert opened(tmp_path, text).cohort().identity != first.identity


def test_a_simulated_site_repeats_its_split(tmp_path: Path) -> None:
    text = images(tmp_path).replace("image-size", 'salt = "sim"\nimage-size')
    first = opened(tmp_path, text).cohort()
    shutil.rmtree(tmp_path / "cohort")
    assert opened(tmp_path, text).cohort().identity == first.identity
    assert not (tmp_path / SALT_FILE).exists()
    with pytest.raises(SettingsError, match=r"cohort.salt: String should have at least 1 character"):
        opened(tmp_path, text.replace('"sim"', '""'))


def test_what_a_site_says_of_merges_and_failures_is_heard(tmp_path: Path) -> None:
    text = images(tmp_path).replace("image-size", 'merge = "m.csv"\nmax-failure-share = 0.1\nimage-size')
    (tmp_path / "m.csv").write_text("patient_id,same_as\np1,p2\n")
    assert opened(tmp_path, text).cohort().patients.max() + 1 == 7
    (tmp_path / "0.png").unlink()
    with pytest.raises(TooManyFailuresError, match="1 of 8 inputs cannot be used"):
        opened(tmp_path, text).cohort()
    assert opened(tmp_path, text.replace("0.1", "0.2")).cohort().patients.max() + 1 == 6


def test_a_cohort_is_looked_at_once_per_process(hospitals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hospitals / "hospitals" / "site-1"
    first = packed_cohort(folder)
    (folder / "reports.csv").unlink()
    assert packed_cohort(folder) is first
    with pytest.raises(SourceMissingError):
        Site.open(folder).cohort()


def test_the_ledger_belongs_to_the_site_and_stays_when_its_policy_changes(tmp_path: Path) -> None:
    head = opened(tmp_path).ledger().head
    ledger = opened(tmp_path, SHORTEST + "[policy]\nepsilon-max = 3.0\n").ledger()
    assert (ledger.head, ledger.epsilon_max) == (head, 3.0)
    with pytest.raises(WrongLedger, match="ledger of cohort north, not of south"):
        opened(tmp_path, SHORTEST.replace("north", "south")).ledger()
