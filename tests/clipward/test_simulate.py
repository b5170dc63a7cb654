import csv
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from transformers import CLIPModel, CLIPProcessor

from client.site import Site
from clipward.simulate import Result, simulate, without_privacy
from server import checkpoints
from server.errors import CheckpointError, QuorumError
from server.metrics import Event, read_events
from strategies.messages import digest_of
from strategies.settings import SettingsError
from tests.small_hospitals import (
    EPSILON,
    PATIENTS,
    ROUNDS,
    STEPS,
    change_site,
    federation,
    without_claim,
)
from tests.watched import forget_memory

DIRECTION = {"r1", "r5", "r10", "chance_r1", "chance_r5", "chance_r10", "n"}


def run(root: Path, **changes: Any) -> Result:
    return simulate(federation(root, **changes), runs=root / "runs")


def run_freely(root: Path, **changes: Any) -> Result:
    for site in root.glob("hospitals/site-*"):
        change_site(site, policy={"require-dp": False})
    return run(root, **without_claim(**changes))


def final(result: Result) -> str:
    checkpoint = checkpoints.load_latest(result.run_dir)
    assert checkpoint is not None
    return digest_of(checkpoint.arrays)


def ledgers(root: Path) -> dict[str, list[str]]:
    stories = {}
    for folder in sorted(root.glob("hospitals/site-*")):
        rows = Site.open(folder).ledger().rows()[1:]
        stories[folder.name] = [row.body["event"] for row in rows]
    return stories


def test_a_private_run_leaves_model_summary_and_report(hospitals: Path) -> None:
    result = run(hospitals)
    assert result.run_dir == hospitals / "runs" / "small"
    assert {path.name for path in result.run_dir.iterdir()} == {
        "anchors.jsonl",
        "checkpoints",
        "federation.json",
        "metrics.jsonl",
        "model",
        "registry.sqlite",
        "report.html",
        "strategy",
        "summary.json",
    }
    assert result.report.read_text().startswith("<!doctype html>")
    assert read_events(result.run_dir / "metrics.jsonl")[-1]["kind"] == "run_finished"
    assert ledgers(hospitals) == {f"site-{n}": ["reserved", "released"] * ROUNDS for n in (1, 2, 3)}


def test_the_summary_has_the_keys_others_read(hospitals: Path) -> None:
    summary = json.loads((run(hospitals).run_dir / "summary.json").read_text())
    assert set(summary) == {
        "version", "run", "rounds", "seconds", "bytes_up_per_site_round",
        "privacy", "sites", "evaluation", "public_start", "versions",
    }  # fmt: skip
    assert set(summary["seconds"]) == {"total", "train", "communicate", "evaluate"}
    assert summary["seconds"]["train"] <= summary["seconds"]["total"]
    assert set(summary["privacy"]) == {"mode", "unit", "epsilon", "delta", "formal_guarantee"}
    assert summary["privacy"]["formal_guarantee"] is True
    assert 0.98 * EPSILON < summary["privacy"]["epsilon"] <= EPSILON
    assert [set(site) for site in summary["sites"]] == [
        {"name", "epsilon", "delta", "steps", "rounds", "refusals"}
    ] * 3
    assert [site["steps"] for site in summary["sites"]] == [ROUNDS * STEPS] * 3
    assert set(summary["evaluation"]) == {"retrieval", "zero_shot"}
    assert {task: set(found) for task, found in summary["evaluation"]["retrieval"].items()} == {
        "image_to_text": DIRECTION,
        "text_to_image": DIRECTION,
    }
    assert set(summary["evaluation"]["zero_shot"]) == {"macro_auroc", "chance", "per_class"}
    assert (summary["version"], summary["run"], summary["rounds"]) == (1, "small", ROUNDS)


@pytest.mark.parametrize("part", ["heads", "lora", "full"])
def test_the_model_loads_in_transformers_and_holds_the_last_weights(part: str, hospitals: Path) -> None:
    result = run_freely(hospitals, share={"part": part, "lora-rank": 2})
    model = CLIPModel.from_pretrained(result.run_dir / "model", local_files_only=True)
    processor = CLIPProcessor.from_pretrained(result.run_dir / "model", local_files_only=True)
    inputs = processor(
        text=["clear lungs"], images=[Image.new("RGB", (32, 32))], return_tensors="pt", padding=True
    )
    assert torch.isfinite(model(**inputs).logits_per_image).all()
    checkpoint = checkpoints.load_latest(result.run_dir)
    assert checkpoint is not None
    weights = model.state_dict()
    same = [
        np.array_equal(weights[name], value) for name, value in checkpoint.arrays.items() if name in weights
    ]
    assert all(same)
    assert len(same) >= 2
    assert not (result.run_dir / ".model.partial").exists()


def test_hospitals_asked_the_same_again_replay_and_spend_nothing(hospitals: Path) -> None:
    first = final(run(hospitals))
    spent = {folder: story.copy() for folder, story in ledgers(hospitals).items()}
    shutil.rmtree(hospitals / "runs")
    again = run(hospitals)
    assert final(again) == first
    assert ledgers(hospitals) == spent
    replies = [e for e in read_events(again.run_dir / "metrics.jsonl") if e["kind"] == "site_replied"]
    assert all(reply["replayed"] for reply in replies)


def test_a_second_run_on_the_same_patients_is_over_budget(hospitals: Path) -> None:
    run(hospitals)
    before = ledgers(hospitals)
    with pytest.raises(QuorumError, match=r"site-1 budget, .*only its site can raise policy.epsilon-max"):
        run(hospitals, name="second")
    assert ledgers(hospitals) == before


def test_a_run_that_exists_is_not_started_again_and_loses_nothing(hospitals: Path) -> None:
    result = run(hospitals)
    events = (result.run_dir / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"holds a run that got to round 3: --resume continues it"):
        run(hospitals)
    assert (result.run_dir / "metrics.jsonl").read_bytes() == events
    resumed = simulate(federation(hospitals), runs=hospitals / "runs", resume=True)
    assert final(resumed) == final(result)
    assert resumed.summary["rounds"] == ROUNDS


def test_the_comparison_has_sites_of_its_own_and_touches_no_given_one(hospitals: Path) -> None:
    for site in hospitals.glob("hospitals/site-*"):
        shutil.rmtree(site / "cohort")  # a clone's first run: nothing is packed yet
    given = {path: path.read_bytes() for path in hospitals.glob("hospitals/*/site.toml")}
    plain = without_privacy(federation(hospitals), runs=hospitals / "runs")
    assert (plain.name, plain.privacy.mode, plain.objective.name) == ("small-without-dp", "none", "infonce")
    result = simulate(plain, runs=hospitals / "runs")
    assert result.summary["privacy"]["formal_guarantee"] is False
    assert {path: path.read_bytes() for path in hospitals.glob("hospitals/*/site.toml")} == given
    assert not list(hospitals.glob("hospitals/*/ledger.sqlite"))
    assert not list(hospitals.glob("hospitals/*/releases"))
    again = without_privacy(federation(hospitals), runs=hospitals / "runs")
    assert again == plain
    private = simulate(
        federation(hospitals), runs=hospitals / "runs", compare={"without_dp": result.summary["evaluation"]}
    )
    assert private.summary["compare"] == {"without_dp": result.summary["evaluation"]}


def test_a_site_that_declares_too_few_refuses_every_round_and_the_others_go_on(hospitals: Path) -> None:
    change_site(hospitals / "hospitals" / "site-2", policy={"min-patients": PATIENTS + 1})
    with pytest.raises(QuorumError, match=r"round 1: 2 sites replied, 3 are needed .* site-2 policy"):
        run(hospitals, strategy={"min-sites": 3})
    assert ledgers(hospitals)["site-1"] == ["reserved", "released"]
    result = simulate(federation(hospitals), runs=hospitals / "runs", resume=True)
    assert ledgers(hospitals)["site-1"] == ["reserved", "released"] * ROUNDS
    assert [(site["name"], site["rounds"], site["refusals"]) for site in result.summary["sites"]] == [
        ("site-1", ROUNDS, 0),
        ("site-2", 0, ROUNDS),
        ("site-3", ROUNDS, 0),
    ]
    codes = {e["code"] for e in read_events(result.run_dir / "metrics.jsonl") if e["kind"] == "site_refused"}
    assert codes == {"policy"}


def test_who_will_refuse_every_round_is_told_before_the_first(
    hospitals: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("site-1", "site-3"):
        change_site(hospitals / "hospitals" / name, policy={"max-rounds": ROUNDS - 1})
    said_before: list[str] = []

    def listen(event: Event) -> None:
        if event["kind"] == "run_started":
            said_before.append(caplog.text)

    settings = federation(hospitals, strategy={"min-sites": 1})
    result = simulate(settings, runs=hospitals / "runs", listeners=[listen])
    warning = (
        "sites site-1, site-3 will refuse every round: the run has 3 rounds, policy.max-rounds is 2: lower "
        "training.rounds or have the hospitals raise policy.max-rounds"
    )
    assert [warning in text for text in said_before] == [True]
    assert [site["rounds"] for site in result.summary["sites"]] == [0, ROUNDS, 0]


def test_a_run_that_every_site_allows_is_not_warned_of(
    hospitals: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(hospitals)
    assert "refuse" not in caplog.text


def test_a_site_with_one_true_patient_trains_as_any_other_and_only_its_operator_hears_of_it(
    hospitals: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = hospitals / "hospitals" / "site-2"
    header, *rows = read_csv(folder / "reports.csv")
    patient = header.index("patient_id")
    write_csv(folder / "reports.csv", [header, *(row for row in rows if row[patient] == rows[0][patient])])
    result = run(hospitals, strategy={"min-sites": 3})
    assert [site["rounds"] for site in result.summary["sites"]] == [ROUNDS] * 3
    assert "site site-2 has fewer training patients than policy.min-patients = 10" in caplog.text
    assert "policy.min-patients is 10: add patients" in (folder / "site.log").read_text()


def test_without_held_out_patients_there_is_nothing_to_evaluate(hospitals: Path) -> None:
    for site in hospitals.glob("hospitals/site-*"):
        change_site(site, cohort={"test-fraction": 0.0})
    result = run_freely(hospitals)
    assert result.summary["evaluation"] is None
    assert (result.run_dir / "model" / "model.safetensors").is_file()


def test_sites_must_pack_images_alike(hospitals: Path) -> None:
    change_site(hospitals / "hospitals" / "site-3", cohort={"image-size": 48})
    with pytest.raises(SettingsError, match=r"different sizes \[32, 48\]: use one image-size"):
        run(hospitals)


def test_a_site_with_ct_windows_trains_beside_grey_ones(hospitals: Path) -> None:
    """Its radiographs have their grey in every channel, so every figure is what it is without windows."""
    changes: dict[str, Any] = {"share": {"part": "full"}, "training": {"rounds": 1}}
    grey = run_freely(hospitals, name="grey", **changes)
    change_site(hospitals / "hospitals" / "site-2", cohort={"ct-windows": [[-600, 1500], [40, 400]]})
    forget_memory()
    mixed = run_freely(hospitals, name="mixed", **changes)
    assert Site.open(hospitals / "hospitals" / "site-2").cohort().images.shape[1:] == (32, 32, 3)
    first, second = (load_file(each.run_dir / "model" / "model.safetensors") for each in (grey, mixed))
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_allclose(second[name], value, rtol=1e-4, atol=1e-6)
    assert mixed.summary["evaluation"] is not None


def test_a_file_without_sites_says_what_to_name(hospitals: Path) -> None:
    with pytest.raises(SettingsError, match=r"no \[simulation\] table: name its sites there"):
        run(hospitals, simulation=None)
    with pytest.raises(SettingsError, match=r"no site in .*nowhere: expected sub-folders with a site.toml"):
        run(hospitals, simulation={"sites": str(hospitals / "nowhere")})


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty patients of two clinics: images that are bright where the text says so."""
    folder = tmp_path_factory.mktemp("table")
    rng = np.random.default_rng(1)
    rows = []
    for patient in range(2 * PATIENTS):
        bright = patient % 2
        pixels = rng.integers(100 * bright, 100 * bright + 100, size=(40, 40), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{patient}.png")
        text = ("small left effusion", "clear lungs")[bright] + f" in patient {patient}"
        rows.append(
            [
                f"{patient}.png",
                text,
                f"p{patient}",
                str(1 - bright),
                ("North Clinic", "süd")[patient // PATIENTS],
            ]
        )
    write_csv(folder / "images.csv", [["image", "text", "patient_id", "effusion", "clinic"], *rows])
    return folder / "images.csv"


def cut(table: Path, **policy: Any) -> dict[str, Any]:
    policy = {"min-patients": 10, **policy}
    return {"table": str(table), "by": "clinic", "image-size": 32, "policy": policy, "sites": None}


@pytest.mark.parametrize("private", [True, False])
def test_one_table_is_cut_into_sites(private: bool, table: Path, hospitals: Path) -> None:
    changes: Mapping[str, Any] = {} if private else without_claim()
    asked = {"simulation": cut(table, **({} if private else {"require-dp": False}))}
    result = run(hospitals, **asked, **changes)
    assert [site["name"] for site in result.summary["sites"]] == ["North-Clinic", "s-d"]
    assert [site["rounds"] for site in result.summary["sites"]] == [ROUNDS, ROUNDS]
    assert result.summary["privacy"]["formal_guarantee"] is private
    assert result.summary["evaluation"]["zero_shot"]["per_class"].keys() == {"effusion"}
    sites = [Site.open(result.run_dir / "sites" / name) for name in ("North-Clinic", "s-d")]
    assert [site.settings.cohort.patients_declared for site in sites] == [PATIENTS, PATIENTS]
    assert all((site.folder / "ledger.sqlite").exists() is private for site in sites)
    resumed = simulate(federation(hospitals, **asked, **changes), runs=hospitals / "runs", resume=True)
    assert final(resumed) == final(result)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("north", ""), r"column 'clinic': '' cannot name a site, the name would be empty"),
        (("north", "***"), r"'\*\*\*' cannot name a site, the name would be empty"),
        (("a b", "a/b"), r"'a/b' cannot name a site, the name would be that of 'a b'"),
    ],
)
def test_values_that_cannot_name_sites_are_refused(
    names: tuple[str, str], message: str, hospitals: Path
) -> None:
    rows = [[f"{n}.png", "clear", f"p{n}", names[n % 2]] for n in range(4)]
    write_csv(hospitals / "images.csv", [["image", "text", "patient_id", "clinic"], *rows])
    with pytest.raises(SettingsError, match=message):
        run(hospitals, simulation=cut(hospitals / "images.csv"))
    assert not (hospitals / "runs" / "small" / "sites").exists()


def read_csv(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def write_csv(path: Path, rows: list[list[str]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
