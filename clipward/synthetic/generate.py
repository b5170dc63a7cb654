"""Write synthetic hospitals to disk: the same bytes for the same seed."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from clipward.synthetic.hospitals import PUBLIC_INDEX, Hospital, hospital, public_collection
from clipward.synthetic.patients import TABLES, Rows, write_patient

VERSION = 1
MANIFEST = "synthetic.json"
UNFINISHED = "synthetic.json.unfinished"
PATIENTS_PER_TASK = 10
IMAGE_SIZE_PIXELS = 128
MIN_PATIENTS = 20
EPSILON_MAX = 8.0


class SyntheticError(ValueError):
    """Synthetic hospitals cannot be written as asked."""


@dataclass(frozen=True, kw_only=True)
class _Parameters:
    """What decides every byte of a tree; stands in its manifest."""

    version: int = VERSION
    sites: int
    patients: int
    public_patients: int
    seed: int

    def __post_init__(self) -> None:
        for name, least in (("sites", 1), ("patients", 1), ("public_patients", 0), ("seed", 0)):
            if (value := getattr(self, name)) < least:
                raise SyntheticError(f"expected {name}={value} to be at least {least}")

    def manifest(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


@dataclass(frozen=True, kw_only=True)
class _Task:
    """A few patients of one hospital: what a process works on at a time."""

    out: Path
    index: int
    seed: int
    patients: range


def synthesize(
    out: Path,
    *,
    sites: int = 4,
    patients: int = 300,
    public_patients: int = 0,
    seed: int = 7,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write synthetic hospitals ``site-1`` to ``site-N``, and a public collection if asked.

    Guarantees:
        Equal ``sites``, ``patients``, ``public_patients`` and ``seed`` give byte-identical trees, whatever
        ``workers`` is. A finished tree with these parameters is left as it is; an unfinished one is started
        over. Only files of this function's making are replaced: what else a site folder holds stays.

    Args:
        out: Folder to write into; made if absent.
        sites: Number of hospitals.
        patients: Patients per hospital.
        public_patients: Patients of the public collection; 0 writes none.
        seed: Decides everything drawn.
        workers: Processes; every core by default. More than 1 are spawned, so a script that calls this needs
            the usual ``if __name__ == "__main__"``.
        on_progress: Called with the number of patients written so far and in all.

    Returns:
        The hospitals' folders, without the public one.

    Raises:
        SyntheticError: A number is out of range, or ``out`` holds something else already.
    """
    parameters = _Parameters(sites=sites, patients=patients, public_patients=public_patients, seed=seed)
    workers = (os.cpu_count() or 1) if workers is None else workers
    if workers < 1:
        raise SyntheticError(f"expected workers={workers} to be at least 1")
    cohorts = [(hospital(index), patients) for index in range(1, sites + 1)]
    if public_patients:
        cohorts.append((public_collection(), public_patients))
    folders = [out / place.name for place, _ in cohorts]
    if not _finished(out, parameters, folders):
        _start_over(out, parameters)
        _write_cohorts(out, cohorts, seed=seed, workers=workers, on_progress=on_progress)
        os.replace(out / UNFINISHED, out / MANIFEST)
    return folders[:sites]


def _finished(out: Path, parameters: _Parameters, folders: Sequence[Path]) -> bool:
    manifest = out / MANIFEST
    if manifest.exists():
        if manifest.read_text(encoding="utf-8") != parameters.manifest():
            raise SyntheticError(
                f"{out} holds synthetic hospitals of other parameters (see {MANIFEST} there): "
                "delete that folder, or choose another one"
            )
        return all(folder.is_dir() for folder in folders)
    strangers = [folder.name for folder in _cohort_folders(out) if folder.exists()]
    if strangers and not (out / UNFINISHED).exists():
        raise SyntheticError(f"{out} holds a {strangers[0]} that was not made here: choose another folder")
    return False


def _cohort_folders(out: Path) -> list[Path]:
    return [*out.glob("site-*"), out / "public"]


def _start_over(out: Path, parameters: _Parameters) -> None:
    """Remove what an earlier run left, and nothing else; from here on the folder counts as unfinished."""
    out.mkdir(parents=True, exist_ok=True)
    (out / UNFINISHED).write_text(parameters.manifest(), encoding="utf-8")
    (out / MANIFEST).unlink(missing_ok=True)
    for folder in _cohort_folders(out):
        shutil.rmtree(folder / "dicom", ignore_errors=True)
        for name in ("site.toml", *TABLES):
            (folder / name).unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _write_cohorts(
    out: Path,
    cohorts: Sequence[tuple[Hospital, int]],
    *,
    seed: int,
    workers: int,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    tasks = [
        _Task(
            out=out,
            index=place.index,
            seed=seed,
            patients=range(start, min(start + PATIENTS_PER_TASK, count + 1)),
        )
        for place, count in cohorts
        for start in range(1, count + 1, PATIENTS_PER_TASK)
    ]
    tables: dict[int, Rows] = {place.index: {name: [] for name in TABLES} for place, _ in cohorts}
    done, total = 0, sum(count for _, count in cohorts)
    for task, made in zip(tasks, _run(tasks, workers), strict=True):
        for name, rows in made.items():
            tables[task.index][name] += rows
        done += len(task.patients)
        if on_progress is not None:
            on_progress(done, total)
    for place, count in cohorts:
        folder = out / place.name
        for name, columns in TABLES.items():
            with (folder / name).open("w", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([columns, *tables[place.index][name]])
        if place.index != PUBLIC_INDEX:
            (folder / "site.toml").write_text(_site_toml(place.name, count), encoding="utf-8")


def _run(tasks: Sequence[_Task], workers: int) -> Iterator[Rows]:
    """Results in the order of the tasks."""
    if workers == 1:
        yield from map(_write_patients, tasks)
        return
    # Not forked: that would copy the locks of whatever threads the caller has.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=min(workers, len(tasks)), mp_context=spawn) as pool:
        yield from pool.map(_write_patients, tasks)


def _write_patients(task: _Task) -> Rows:
    place = hospital(task.index) if task.index != PUBLIC_INDEX else public_collection()
    made: Rows = {name: [] for name in TABLES}
    for patient in task.patients:
        for name, rows in write_patient(
            task.out / place.name, place, seed=task.seed, patient=patient
        ).items():
            made[name] += rows
    return made


def _site_toml(name: str, patients: int) -> str:
    # The largest power of ten that is no more than 1 / (10 * patients): well below one patient's share.
    delta = f"1e-{len(str(10 * patients - 1))}"
    return f"""\
# What this hospital brings to the federation, and what it allows. Stays here.
version = 1
name = "{name}"

[cohort]
dicom = "dicom"                    # folder, searched with its sub-folders
reports = "reports.csv"            # one report per study, matched by accession number
labels = "labels.csv"              # for evaluation; never trained on
patients-declared = {patients:<14} # leaves the hospital as it is: a round number of choice, not a count
image-size = {IMAGE_SIZE_PIXELS:<21} # pixels; images are packed at this size
{f'salt = "clipward/{name}"':<34} # so that runs repeat; a real hospital leaves it out and has a secret

[policy]
require-dp = true                  # nothing leaves without clipping and noise
epsilon-max = {EPSILON_MAX:<20} # for all runs together, add-or-remove-one patient
delta = {delta:<26} # below 1 / (10 * patients-declared)
min-patients = {min(MIN_PATIENTS, patients):<19} # of patients-declared; fewer are refused
"""
