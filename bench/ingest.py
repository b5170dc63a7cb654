"""From a DICOM file to the packed image: time, memory and grey levels beside pydicom's own functions.

The textbook is what pydicom's documentation leads to: decode, `apply_modality_lut`, `apply_voi_lut`, minimum
and maximum to 8 bit, resize. Ours is what packs a cohort. Both start from a file that has been read before.
"""

import importlib
import importlib.util
import os
import statistics
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import gdcm
import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import (
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from client.cohort import Cohort, CohortSettings, build_cohort
from client.cohort.dicom_folder import DicomFolder, read_header
from client.cohort.outcomes import Rendered
from client.cohort.workers import Workers
from reporting import Table, cell, over, write_rows

Picture = NDArray[np.uint8]
Reader = Callable[[Path, int], Picture]

TEXTBOOK, OURS, MONAI = "textbook", "ours", "monai"
JPEG_LOSSLESS = "jpeg-lossless"
PACKED = "packed cohort"
ROWS, COLUMNS = 3056, 2544
RATIO = 10  # of lossy JPEG 2000
GOALS = {
    "explicit": 5.0,
    "implicit": 5.0,
    "jpeg2000-lossless": 5.0,
    "jpeg2000-lossy": 5.0,
}  # times the textbook
CACHE_GOAL = 50_000  # samples a second
COHORT, BATCH, READS = 64, 32, 200  # pairs of the cohort that is read from; rows and repetitions of a read
REPEATS, FILES = 7, 256
QUICK_REPEATS, QUICK_FILES = 3, 64


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One line of the table.

    Attributes:
        what: How the image is stored.
        who: Reader.
        file_bytes: Size of the file.
        seconds: Processor time of one image, by repetition.
        peak_bytes: Most bytes that Python and numpy held for one image, the file's mapping not among them.
        mean_difference: Mean distance to the textbook's image, in grey levels of 255.
        most_difference: Largest one.
        reason: Why there is no figure.
    """

    what: str
    who: str
    file_bytes: int | None = None
    seconds: tuple[float, ...] = ()
    peak_bytes: int | None = None
    mean_difference: float | None = None
    most_difference: int | None = None
    reason: str | None = None


# --- the files ----------------------------------------------------------------------------------------------


def radiograph(rows: int, columns: int, *, seed: int = 0) -> Dataset:
    """Large shapes and detector noise, 12 bit, MONOCHROME1, with a window that cuts both ends."""
    rng = np.random.default_rng(seed)
    shapes = Image.fromarray(rng.uniform(100, 4000, (10, 8)).astype(np.float32))
    smooth = np.asarray(shapes.resize((columns, rows), Image.Resampling.BICUBIC))
    values = np.clip(smooth + 12 * rng.standard_normal((rows, columns), dtype=np.float32), 0, 4095)
    dataset = Dataset()
    dataset.SOPClassUID = DigitalXRayImageStorageForPresentation
    dataset.SOPInstanceUID, dataset.StudyInstanceUID = generate_uid(), generate_uid()
    dataset.PatientID, dataset.AccessionNumber = f"patient-{seed}", f"accession-{seed}"
    dataset.ViewPosition, dataset.BurnedInAnnotation = "PA", "NO"
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = rows, columns, 1
    dataset.PhotometricInterpretation, dataset.PresentationLUTShape = "MONOCHROME1", "INVERSE"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0
    dataset.WindowCenter, dataset.WindowWidth = 2048, 3000
    dataset.PixelData = values.astype("<u2").tobytes()
    dataset["PixelData"].VR = "OW"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return dataset


def _as_it_is(path: Path, dataset: Dataset) -> None:
    dataset.save_as(path, enforce_file_format=True)


def _in(syntax: str) -> Callable[[Path, Dataset], None]:
    def write(path: Path, dataset: Dataset) -> None:
        dataset.file_meta.TransferSyntaxUID = syntax
        _as_it_is(path, dataset)

    return write


def _compressed(syntax: str, **options: Any) -> Callable[[Path, Dataset], None]:
    def write(path: Path, dataset: Dataset) -> None:
        dataset.compress(syntax, generate_instance_uid=False, **options)
        _as_it_is(path, dataset)

    return write


def _jpeg_lossless(path: Path, dataset: Dataset) -> None:
    """Process 14, selection value 1: GDCM has the one encoder there is."""
    _as_it_is(path, dataset)
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(path))
    reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    change.SetInput(reader.GetImage())
    if not change.Change():
        raise RuntimeError("GDCM encodes no lossless JPEG here")
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(path))
    writer.Write()


WRITERS: dict[str, Callable[[Path, Dataset], None]] = {
    "explicit": _as_it_is,
    "implicit": _in(ImplicitVRLittleEndian),
    "deflated": _in(DeflatedExplicitVRLittleEndian),
    "rle": _compressed(RLELossless),
    JPEG_LOSSLESS: _jpeg_lossless,
    "jpeg-ls": _compressed(JPEGLSLossless),
    "jpeg2000-lossless": _compressed(JPEG2000Lossless),
    "jpeg2000-lossy": _compressed(JPEG2000, j2k_cr=[RATIO]),
}


# --- the readers --------------------------------------------------------------------------------------------


def textbook(path: Path, size: int) -> Picture:
    """Show an image as pydicom's documentation does."""
    dataset = dcmread(path)
    shown = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset)
    grey = _stretched(shown)
    return _square(255 - grey if dataset.PhotometricInterpretation == "MONOCHROME1" else grey, size)


def ours(path: Path, size: int) -> Picture:
    """What packs a cohort."""
    outcome = DicomFolder.render(path, size)
    if not isinstance(outcome, Rendered):
        raise RuntimeError(f"not shown: {outcome.code.meaning}")
    return outcome.pixels


def monai(path: Path, size: int) -> Picture:
    """MONAI's loader of two-dimensional images, which knows neither windows nor MONOCHROME1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a radiograph has no place in space
        values = np.asarray(_monais_loader()(path))
    return _square(_stretched(values.squeeze().T), size)  # it gives columns first


@cache
def _monais_loader() -> Callable[[Path], Any]:
    loader: Callable[[Path], Any] = importlib.import_module("monai.transforms").LoadImage(
        reader="PydicomReader", image_only=True
    )
    return loader


def _stretched(values: NDArray[Any]) -> Picture:
    low, high = values.min(), values.max()
    return np.asarray(np.rint((values - low) / (high - low) * 255), dtype=np.uint8)


def _square(grey: Picture, size: int) -> Picture:
    scale = size / max(grey.shape)
    height, width = (round(length * scale) for length in grey.shape)
    square = np.zeros((size, size), dtype=np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    resized = Image.fromarray(grey).resize((width, height), Image.Resampling.BOX)
    square[top : top + height, left : left + width] = np.asarray(resized)
    return square


READERS: dict[str, Reader] = {TEXTBOOK: textbook, OURS: ours, MONAI: monai}


# --- measuring ----------------------------------------------------------------------------------------------


def measure(
    folder: Path, syntaxes: Sequence[str], *, rows: int, columns: int, size: int, repeats: int
) -> list[Measurement]:
    """Every reader on one file of every syntax, their repetitions interleaved."""
    found: list[Measurement] = []
    for syntax in syntaxes:
        typer.echo(f"{syntax}: writing {rows} x {columns}", err=True)
        path = folder / f"{syntax}.dcm"
        try:
            WRITERS[syntax](path, radiograph(rows, columns))
        except Exception as error:  # an encoder that is not there is a line of the table
            found.extend(Measurement(what=syntax, who=name, reason=str(error)) for name in READERS)
            continue
        found.extend(_measured(syntax, path, size=size, repeats=repeats))
    return found


def _measured(syntax: str, path: Path, *, size: int, repeats: int) -> list[Measurement]:
    lines: dict[str, Measurement] = {}
    reference = textbook(path, size).astype(int)
    for name, reader in READERS.items():
        line = Measurement(what=syntax, who=name, file_bytes=path.stat().st_size)
        if name == MONAI and importlib.util.find_spec("monai") is None:
            lines[name] = replace(line, reason="MONAI is not installed")
            continue
        distance = np.abs(reader(path, size) - reference)  # also loads what a first image loads
        lines[name] = replace(
            line,
            peak_bytes=_peak_bytes(partial(reader, path, size)),
            mean_difference=float(distance.mean()),
            most_difference=int(distance.max()),
        )
    for repeat in range(repeats):
        typer.echo(f"{syntax}: repetition {repeat + 1} of {repeats}", err=True)
        for name, line in lines.items():
            if line.reason is None:
                seconds = _processor_time(partial(READERS[name], path, size))
                lines[name] = replace(line, seconds=(*line.seconds, seconds))
    return list(lines.values())


def _processor_time(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def _peak_bytes(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def scan_rows(
    folder: Path,
    syntax: str,
    *,
    files: int,
    workers: Sequence[int],
    rows: int,
    columns: int,
    size: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """Wall time of a header and of an image, over links to one file, with each number of processes."""
    path = folder / f"{syntax}-many.dcm"
    WRITERS[syntax](path, radiograph(rows, columns))
    links = [folder / f"{syntax}-{number}.dcm" for number in range(files)]
    for link in links:
        os.link(path, link)
    calls: dict[str, Callable[[Path], object]] = {
        "headers": read_header,
        "images": partial(DicomFolder.render, size=size),
    }
    found = []
    for count in workers:
        with Workers(count, items=files) as pool:
            for name, function in calls.items():
                typer.echo(f"{syntax}: {name} of {files} files with {count} processes", err=True)
                list(pool.map(function, links))  # every process has loaded its libraries now
                seconds = []
                for _ in range(repeats):
                    start = time.perf_counter()
                    list(pool.map(function, links))
                    seconds.append((time.perf_counter() - start) / files)
                found.append(_row(f"{syntax} {name}", OURS, seconds) | {"workers": count, "files": files})
    return found


def cache_row(folder: Path, *, size: int, repeats: int) -> dict[str, Any]:
    """Processor time of a sample that is read from a packed cohort, in random batches."""
    typer.echo(f"reading from a cohort of {COHORT} pairs", err=True)
    images = _cohort(folder, size).images
    rng = np.random.default_rng(0)
    batches = [np.sort(rng.choice(COHORT, BATCH, replace=False)) for _ in range(READS)]

    def read() -> None:
        for batch in batches:
            images[batch]

    read()
    return _row(PACKED, OURS, [_processor_time(read) / (READS * BATCH) for _ in range(repeats)])


def _cohort(folder: Path, size: int) -> Cohort:
    (folder / "export").mkdir()
    lines = ["accession_number,report"]
    for number in range(COHORT):
        dataset = radiograph(256, 256, seed=number)
        _as_it_is(folder / "export" / f"{number}.dcm", dataset)
        lines.append(f"{dataset.AccessionNumber},IMPRESSION: case {number}")
    (folder / "reports.csv").write_text("\n".join(lines))
    settings = CohortSettings(
        dicom=folder / "export", reports=folder / "reports.csv", image_size=size, salt="bench"
    )
    return build_cohort(settings, folder / "cohort", workers=1)


# --- reporting ----------------------------------------------------------------------------------------------


def rows_of(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Each measurement as a row, with what it takes as a multiple of the textbook."""
    base = {each.what: each for each in measurements if each.who == TEXTBOOK}
    return [
        {
            **_row(each.what, each.who, each.seconds),
            "file_bytes": each.file_bytes,
            "peak_bytes": each.peak_bytes,
            "peak_ratio": over(each.peak_bytes, base[each.what].peak_bytes),
            "ratio": over(_median(each.seconds), _median(base[each.what].seconds)),
            "ratio_to": f"{each.what} {TEXTBOOK}",
            "mean_difference": each.mean_difference,
            "most_difference": each.most_difference,
            "reason": each.reason,
        }
        for each in measurements
    ]


def _row(what: str, who: str, seconds: Sequence[float]) -> dict[str, Any]:
    spread = max(seconds) - min(seconds) if seconds else None
    return {"what": what, "who": who, "seconds": _median(seconds), "spread": spread}


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table, with a footnote for each reason why a figure is missing."""
    header = ["stored as", "MB", "reader", "ms", "spread", "images/s", "times faster", "peak MB"]
    header += ["times smaller", "mean / max difference", "goal"]
    made = Table(header)
    for row in rows:
        faster = over(1, row["ratio"])
        cells = [row["what"], cell(row["file_bytes"], 1e-6), row["who"] + made.mark(row["reason"])]
        cells += [cell(row["seconds"], 1e3), cell(row["spread"], 1e3), cell(over(1, row["seconds"]))]
        cells += [cell(faster), cell(row["peak_bytes"], 1e-6), cell(over(1, row["peak_ratio"]))]
        cells.append(f"{cell(row['mean_difference'], digits=2)} / {cell(row['most_difference'], digits=0)}")
        goal = GOALS.get(row["what"]) if row["who"] == OURS else None
        made.add([*cells, _goal_cell(faster, goal)])
    return str(made)


def sentences(scans: Sequence[Mapping[str, Any]], packed: Mapping[str, Any]) -> str:
    """What the table does not hold."""
    lines = [f"{each['what']}, {each['workers']} processes: {1 / each['seconds']:.1f}/s" for each in scans]
    samples = 1 / packed["seconds"]
    return "\n".join([*lines, f"{PACKED}: {samples:.0f} samples/s ({_goal_cell(samples, CACHE_GOAL)})"])


def _goal_cell(value: float | None, goal: float | None) -> str:
    if goal is None:
        return ""
    return f"≥ {goal:g}: {'met' if value is not None and value >= goal else 'missed'}"


# --- the command --------------------------------------------------------------------------------------------


def _known_syntaxes(value: str) -> str:
    for each in value.split(","):
        if each not in WRITERS:
            raise typer.BadParameter(f"{each!r} is none of {', '.join(WRITERS)}")
    return value


app = typer.Typer(add_completion=False)


@app.command()
def main(
    syntaxes: Annotated[
        str, typer.Option(callback=_known_syntaxes, help="Any of " + ", ".join(WRITERS) + ", with commas.")
    ] = ",".join(WRITERS),
    rows: Annotated[int, typer.Option(min=16, help="Rows of the files.")] = ROWS,
    columns: Annotated[int, typer.Option(min=16, help="Columns of the files.")] = COLUMNS,
    size: Annotated[int, typer.Option(min=16, help="Side of the packed image, in pixels.")] = 224,
    repeats: Annotated[
        int | None, typer.Option(min=1, help=f"Timed repetitions, whose median counts; {REPEATS} by default.")
    ] = None,
    files: Annotated[
        int | None, typer.Option(min=2, help=f"Files of the scan, links to one; {FILES} by default.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Most processes of the scan;")] = len(
        os.sched_getaffinity(0)
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help=f"{QUICK_REPEATS} repetitions, {QUICK_FILES} files.")
    ] = False,
    as_json: Annotated[Path | None, typer.Option("--json", help="File for the rows.")] = None,
) -> None:
    """Compare packing an image with pydicom's own functions, by transfer syntax, and with MONAI's loader.

    One run, one process: repetitions are interleaved and processor time counts, so that other work on the
    machine disturbs the ratios little. Progress goes to stderr, the table to stdout. MONAI takes part where
    Python finds it.
    """
    chosen = [syntax for syntax in WRITERS if syntax in syntaxes.split(",")]
    repeats = repeats or (QUICK_REPEATS if quick else REPEATS)
    files = files or (QUICK_FILES if quick else FILES)
    sides = {"rows": rows, "columns": columns, "size": size, "repeats": repeats}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = rows_of(measure(folder, chosen, **sides))
        scans = scan_rows(folder, chosen[0], files=files, workers=sorted({1, workers}), **sides)
        packed = cache_row(folder, size=size, repeats=repeats)
    if as_json is not None:
        packages = ("torch", "pydicom", "monai")
        write_rows(as_json, "ingest", [*found, *scans, packed], packages=packages)
    typer.echo(table(found) + "\n\n" + sentences(scans, packed))


if __name__ == "__main__":
    app()
