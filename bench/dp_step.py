"""Time and memory of one clipped gradient, engine by engine, beside the same step without privacy.

Measured is what makes a step private: the loss forward and backward, and the sum of clipped gradients. The
noise, the optimizer and the accountant are the same for every engine and left out.
"""

import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal, get_args

import torch
import typer
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from encoders.clip import ClipEncoder, build
from encoders.objectives import anchored_loss
from encoders.parts import HeadsPart, TrainablePart, trainable_part
from encoders.preprocessing import Preprocessing
from encoders.tokenizer import TextTokenizer
from privacy.bookkeeping import BookKeepingEngine
from privacy.engine import Batch, ClippingEngine, PatientLosses
from privacy.hooks import repaired_copy
from privacy.vmap import VmapEngine
from reporting import Table, cell, over

Model = Literal["tiny", "vit-b-16"]
Part = Literal["full", "lora", "heads"]
Step = Callable[[], None]

PLAIN, OURS, HOOKS, GHOST, VMAP = "non-private", "ours", "opacus-hooks", "opacus-ghost", "vmap"
MAX_GRAD_NORM, ANCHORS, SCALE, LORA_RANK, VMAP_CHUNK = 1.0, 256, 10.0, 8, 8
# (model, part) to the largest allowed (time, memory) as a multiple of the step without privacy.
GOALS: dict[tuple[str, str], tuple[float, float]] = {
    ("tiny", "full"): (1.10, 1.15),
    ("vit-b-16", "full"): (1.25, float("inf")),
}
FULL_GOAL = 1.00  # LoRA, as a multiple of the time of the full step without privacy


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One training step to be taken: a module, its loss and a batch, one study a patient."""

    module: nn.Module
    losses: PatientLosses
    batch: Batch

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters with a gradient."""
        return [value for value in self.module.parameters() if value.requires_grad]

    @property
    def patients(self) -> int:
        """Rows of the batch."""
        return len(self.batch["images"])


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One line of the table.

    Attributes:
        seconds: Least time of a step over the repetitions: of the processor's, or of the GPU's.
        peak_bytes: Most bytes of tensors that a step held beyond those that were there before it.
        reason: Why there is no figure.
    """

    model: str
    part: str
    batch: int
    variant: str
    seconds: float | None = None
    peak_bytes: int | None = None
    reason: str | None = None


# --- the steps ----------------------------------------------------------------------------------------------


def non_private(work: Workload) -> Step:
    """Forward and backward of the mean loss."""

    def step() -> None:
        torch.autograd.backward(work.losses(work.module, work.batch).mean())
        for value in work.trained:
            value.grad = None

    return step


def _clipped_by(engine: ClippingEngine, work: Workload) -> Step:
    return lambda: void(engine.clipped_sum(work.batch, max_grad_norm=MAX_GRAD_NORM))


def void(_: object) -> None:
    """Drop a result."""


def ours(work: Workload) -> Step:
    """Book-keeping: one forward, one backward, one weighted product a layer."""
    return _clipped_by(BookKeepingEngine(work.module, work.losses), work)


def vmap(work: Workload) -> Step:
    """The whole model differentiated per patient, a few patients at a time."""
    return _clipped_by(VmapEngine(work.module, work.losses, chunk=VMAP_CHUNK), work)


def opacus_hooks(work: Workload) -> Step:
    """Opacus' default: every patient's gradient of every layer at once."""
    copied, parameters = repaired_copy(work.module)
    hooked = GradSampleModule(copied)
    optimizer = DPOptimizer(torch.optim.SGD(parameters.values()), **_opacus_settings(work))

    def step() -> None:
        torch.autograd.backward(work.losses(hooked, work.batch).mean())
        optimizer.clip_and_accumulate()
        optimizer.zero_grad(set_to_none=True)

    return step


def opacus_ghost(work: Workload) -> Step:
    """Opacus' ghost clipping: norms in a first backward pass, the weighted loss in a second."""
    copied, parameters = repaired_copy(work.module)
    hooked = GradSampleModuleFastGradientClipping(copied, max_grad_norm=MAX_GRAD_NORM)
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(parameters.values()), **_opacus_settings(work)
    )

    def step() -> None:
        losses = work.losses(hooked, work.batch)
        DPTensorFastGradientClipping(hooked, optimizer, losses).backward()
        optimizer.zero_grad(set_to_none=True)

    return step


def _opacus_settings(work: Workload) -> dict[str, Any]:
    return {
        "noise_multiplier": 0.0,
        "max_grad_norm": MAX_GRAD_NORM,
        "expected_batch_size": work.patients,
    }


VARIANTS: dict[str, Callable[[Workload], Step]] = {
    PLAIN: non_private,
    OURS: ours,
    HOOKS: opacus_hooks,
    GHOST: opacus_ghost,
    VMAP: vmap,
}


ENGINES = [variant for variant in VARIANTS if variant != PLAIN]


# --- what they work on --------------------------------------------------------------------------------------


def encoder_of(model: Model, *, seed: int = 0) -> ClipEncoder:
    """``tiny`` as configs/cxr-multisite.toml has it; ViT-B/16 with a text tower of BERT-base's size."""
    if model == "tiny":
        return build("tiny", image_size=64, max_tokens=48, seed=seed, inverse_temperature=SCALE)
    tokenizer, size = TextTokenizer.shipped(max_tokens=77), 224
    tower = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 512,
    }
    text = {
        **tower,
        "vocab_size": 30522,  # BERT-base, Devlin et al. (2019), section 3
        "max_position_embeddings": tokenizer.max_tokens,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    config = CLIPConfig(
        text_config=text,
        vision_config={**tower, "image_size": size, "patch_size": 16},
        projection_dim=512,
    )
    clip = CLIPModel._from_config(config, attn_implementation="eager").eval()
    return ClipEncoder(model=clip, tokenizer=tokenizer, preprocessing=Preprocessing(image_size=size))


def workload_of(model: Model, part: Part, *, batch: int, device: torch.device) -> Workload:
    """Random images, texts and anchors: what is in them costs nothing."""
    generator = torch.Generator().manual_seed(0)
    trainable = trainable_part(encoder_of(model), part, lora_rank=LORA_RANK)
    images, texts = _inputs(trainable, batch, generator)
    width = trainable.encoder.model.config.projection_dim
    rows = torch.randn(2, ANCHORS, width, generator=generator)
    text_anchors, image_anchors = F.normalize(rows, dim=-1).to(device)
    masked = torch.rand(batch, ANCHORS, generator=generator) < 0.05

    def losses(call: Callable[..., tuple[Tensor, Tensor]], records: Batch) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            image_embeddings, text_embeddings = call(records["images"], records["texts"])
        return anchored_loss(
            image_embeddings.float(),
            text_embeddings.float(),
            text_anchors=text_anchors,
            image_anchors=image_anchors,
            masked=records["masked"],
            inverse_temperature=SCALE,
        )

    rows_of = {"images": images, "texts": texts, "masked": masked}
    return Workload(
        module=trainable.module.to(device),
        losses=losses,
        batch={name: value.to(device) for name, value in rows_of.items()},
    )


def _inputs(part: TrainablePart, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    config = part.encoder.model.config
    if isinstance(part, HeadsPart):
        widths = config.vision_config.hidden_size, config.text_config.hidden_size
        images, texts = (torch.randn(rows, width, generator=generator) for width in widths)
        return images, texts
    side, tokens = config.vision_config.image_size, config.text_config.max_position_embeddings
    images = torch.randint(256, (rows, side, side), generator=generator, dtype=torch.uint8)
    end = part.encoder.tokenizer.eos_token_id
    texts = torch.randint(min(1000, end), (rows, tokens), generator=generator)
    texts[:, -1] = end
    return images, texts


# --- measuring ----------------------------------------------------------------------------------------------


def measure(
    model: Model,
    parts: Sequence[Part],
    engines: Sequence[str],
    *,
    batch: int,
    repeats: int,
    device: torch.device,
) -> list[Measurement]:
    """The step without privacy and each engine, for every part, their repetitions interleaved."""
    steps: dict[tuple[str, str], Step] = {}
    found: list[Measurement] = []
    for part in parts:
        typer.echo(f"{model} {part} {batch}: building", err=True)
        work = workload_of(model, part, batch=batch, device=device)
        for variant in (PLAIN, *engines):
            line = Measurement(model=model, part=part, batch=batch, variant=variant)
            typer.echo(f"{model} {part} {batch}: memory of {variant}", err=True)
            try:
                _refuse_too_large(variant, work, device)
                step = VARIANTS[variant](work)
                step()  # memory of a first step includes what libraries keep for good
                peak = _peak_bytes(step, device)
            except Exception as error:  # what an engine cannot do is a line of the table
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                found.append(replace(line, reason=reason))
            else:
                steps[part, variant] = step
                found.append(replace(line, peak_bytes=peak))
    least = dict.fromkeys(steps, float("inf"))
    for repeat in range(repeats):
        typer.echo(f"{model} {batch}: repetition {repeat + 1} of {repeats}", err=True)
        for key, step in steps.items():
            least[key] = min(least[key], _seconds(step, device))
    return [replace(each, seconds=least.get((each.part, each.variant))) for each in found]


def _seconds(step: Step, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.process_time()
        step()
        return time.process_time() - start
    before = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    after = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    before.record()
    step()
    after.record()
    torch.cuda.synchronize()
    return float(before.elapsed_time(after)) / 1e3


def _peak_bytes(step: Step, device: torch.device) -> int:
    """The allocator's own book: exact, and the same each time, which resident memory is not."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with (
        _silent_stderr(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profiler,
    ):
        step()
    recorded = profiler.profiler.kineto_results.events()
    level = peak = 0
    for event in sorted((each for each in recorded if each.name() == "[memory]"), key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler's start and stop lines, which it writes past Python."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _refuse_too_large(variant: str, work: Workload, device: torch.device) -> None:
    """Per-patient gradients that would not fit end the process, and the other lines with it."""
    patients = {HOOKS: work.patients, VMAP: min(VMAP_CHUNK, work.patients)}.get(variant, 0)
    needed = 4 * patients * sum(value.numel() for value in work.trained)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info()
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > 0.7 * free:
        raise MemoryError(f"per-patient gradients of {needed / 1e9:.1f} GB, with {free / 1e9:.1f} GB free")


# --- reporting ----------------------------------------------------------------------------------------------


def ratios(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Each measurement with its time and memory over the step without privacy of its part, and its goal."""
    plain = {(each.model, each.part, each.batch): each for each in measurements if each.variant == PLAIN}
    rows = []
    for each in measurements:
        own = plain[each.model, each.part, each.batch]
        full = plain.get((each.model, "full", each.batch))
        row: dict[str, Any] = {
            **asdict(each),
            "time_ratio": over(each.seconds, own.seconds),
            "memory_ratio": over(each.peak_bytes, own.peak_bytes),
            "time_over_full": over(each.seconds, full.seconds if full else None),
        }
        rows.append({**row, "goals": _goals(row) if each.variant == OURS else {}})
    return rows


def _goals(row: Mapping[str, Any]) -> dict[str, float]:
    """The largest allowed value of each ratio."""
    if row["part"] == "lora":
        return {"time_over_full": FULL_GOAL}
    allowed_time, allowed_memory = GOALS.get((row["model"], row["part"]), (float("inf"), float("inf")))
    goals = {"time_ratio": allowed_time, "memory_ratio": allowed_memory}
    return {name: value for name, value in goals.items() if value < float("inf")}


def table(rows: Sequence[Mapping[str, Any]], *, images_per_second: bool) -> str:
    """The rows as a Markdown table, with a footnote for each figure that is missing."""
    header = ["model", "part", "batch", "engine", "ms", "time x", "time x full", "MB", "memory x", "goal"]
    header += ["images/s"] if images_per_second else []
    made = Table(header)
    for row in rows:
        missing = row["reason"] and f"{row['model']} {row['part']}, {row['variant']}: {row['reason']}"
        cells = [row["model"], row["part"], str(row["batch"]), row["variant"] + made.mark(missing)]
        cells += [cell(row["seconds"], 1e3), cell(row["time_ratio"], digits=2)]
        cells += [cell(row["time_over_full"], digits=2), cell(row["peak_bytes"], 1e-6)]
        cells += [cell(row["memory_ratio"], digits=2), _goal_cell(row)]
        if images_per_second:
            cells.append(cell(over(row["batch"], row["seconds"]), digits=0))
        made.add(cells)
    return str(made)


def _goal_cell(row: Mapping[str, Any]) -> str:
    words = {"time_ratio": "time", "memory_ratio": "memory", "time_over_full": "time x full"}
    cells = []
    for name, allowed in row["goals"].items():
        met = row[name] is not None and row[name] <= allowed
        cells.append(f"{words[name]} ≤ {allowed:.2f}: {'met' if met else 'missed'}")
    return ", ".join(cells)


# --- the command --------------------------------------------------------------------------------------------


def _list_of(allowed: Sequence[str]) -> Callable[[str], str]:
    def check(value: str) -> str:
        for each in value.split(","):
            if each not in allowed:
                raise typer.BadParameter(f"{each!r} is none of {', '.join(allowed)}")
        return value

    return check


def _positive_numbers(value: str) -> str:
    if not all(each.isdecimal() and int(each) > 0 for each in value.split(",")):
        raise typer.BadParameter(f"expected whole numbers > 0 with commas between, got {value!r}")
    return value


def _present(device: str) -> str:
    if device not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"{device!r} is none of auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no GPU here: use cpu")
    return device


app = typer.Typer(add_completion=False)


@app.command()
def main(
    models: Annotated[
        str, typer.Option(callback=_list_of(get_args(Model)), help="tiny, vit-b-16, or both with a comma.")
    ] = "tiny",
    parts: Annotated[
        str, typer.Option(callback=_list_of(get_args(Part)), help="Any of full, lora, heads, with commas.")
    ] = "full,lora,heads",
    batch: Annotated[
        str, typer.Option(callback=_positive_numbers, help="Patients in a batch; several with commas.")
    ] = "32",
    engines: Annotated[
        str, typer.Option(callback=_list_of(ENGINES), help="Any of " + ", ".join(ENGINES) + ", with commas.")
    ] = ",".join(ENGINES),
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch on the CPU.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repetitions; the least time counts.")] = 5,
    device: Annotated[
        str,
        typer.Option(callback=_present, help="cpu, cuda, or auto: a GPU where there is one, in bfloat16."),
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Compare a step of the book-keeping engine, Opacus and vmap with the step without privacy.

    One run, one process: repetitions are interleaved and the least time of each counts, so that other work on
    the machine disturbs the ratios little. Progress goes to stderr, the result to stdout.
    """
    torch.set_num_threads(threads)
    logging.getLogger("opacus").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    wanted: list[Part] = [part for part in get_args(Part) if part in parts.split(",")]
    if "lora" in wanted and "full" not in wanted:
        raise typer.BadParameter("lora is compared with the full step: add full", param_hint="--parts")
    found = [
        each
        for model in get_args(Model)
        if model in models.split(",")
        for size in batch.split(",")
        for each in measure(
            model, wanted, engines.split(","), batch=int(size), repeats=repeats, device=torch.device(chosen)
        )
    ]
    rows = ratios(found)
    if as_json:
        settings = {"device": chosen, "threads": threads, "repeats": repeats, "torch": torch.__version__}
        typer.echo(json.dumps({"settings": settings, "rows": rows}, indent=2))
    else:
        typer.echo(table(rows, images_per_second=chosen == "cuda"))


if __name__ == "__main__":
    app()
