"""What secure aggregation costs a site and the coordinator, beside the same mean without it.

One attempt is run for every number of dropped-out sites, in this process, with all its messages. Times are of
the processor, so that what else the machine does stays out of them.
"""

import json
import statistics
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from reporting import write_rows
from strategies.secure_sum.coordinator import SecureSum
from strategies.secure_sum.messages import Participant, Terms
from strategies.secure_sum.site import SiteSession

Arrays = dict[str, NDArray[Any]]
OURS, PLAIN = "ours", "plain mean"
SMALL, SEND, TAKE, MEAN = (
    "site: all small messages",
    "site: update",
    "coordinator: take update",
    "coordinator: mean",
)
WEIGHT, VALUE_RANGE = 1000, 1.0


class Costs:
    """Processor seconds and peak bytes of what was done, by what it was."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.peaks: dict[str, int] = defaultdict(int)

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Measure what is done inside."""
        tracemalloc.reset_peak()
        held, begin = tracemalloc.get_traced_memory()[0], time.process_time()
        yield
        self.seconds[what].append(time.process_time() - begin)
        self.peaks[what] = max(self.peaks[what], tracemalloc.get_traced_memory()[1] - held)


class _Agreements(dict[str, str]):
    def first(self, subject: str, agreement: str) -> str:
        return self.setdefault(subject, agreement)


@dataclass(frozen=True, kw_only=True)
class Federation:
    """Sites with keys of their own, and what they agreed on."""

    terms: Terms
    keys: dict[str, Ed25519PrivateKey]

    @classmethod
    def of(cls, sites: int, threshold: int) -> "Federation":
        """So many sites of equal weight."""
        keys = {f"site-{number}": Ed25519PrivateKey.generate() for number in range(sites)}
        participants = tuple(
            Participant(site=name, weight=WEIGHT, public=key.public_key().public_bytes_raw().hex())
            for name, key in keys.items()
        )
        terms = Terms(
            run="bench",
            server_round=1,
            request="ab" * 32,
            attempt=1,
            participants=participants,
            threshold=threshold,
            value_range=VALUE_RANGE,
        )
        return cls(terms=terms, keys=keys)

    def session(self, site: str) -> SiteSession:
        """One site's part."""
        return SiteSession(
            self.terms,
            site=site,
            weight=WEIGHT,
            at_least=self.terms.threshold,
            pins={participant.site: participant.public for participant in self.terms.participants},
            sign=self.keys[site].sign,
            agreements=_Agreements(),
        )


def secure(update: Arrays, *, sites: int, threshold: int, dropped: int) -> tuple[Costs, int, float]:
    """An attempt in which ``dropped`` sites fall silent just before they send: the dearest moment.

    Returns:
        Its costs, the bytes of all small messages to and from one site, and the largest error of the mean.
    """
    federation, costs = Federation.of(sites, threshold), Costs()
    terms = federation.terms
    names, first = list(terms.names), terms.names[0]
    with costs.of("setup"):
        server = SecureSum(terms, update)
    with costs.of("offers"):
        parts = {name: federation.session(name) for name in names}
        for part in parts.values():
            server.take_offer(part.offer())
    offers = server.offers()
    with costs.of("deals"):
        for name, part in parts.items():
            server.take_shares(name, part.deal(offers))
    shares = server.shares()
    for name in names[: sites - dropped]:
        with costs.of(SEND):
            masked = dict(parts[name].mask(shares[name], update))
        with costs.of(TAKE):
            server.fold(name, masked)
        del masked
    survivors = server.survivors()
    with costs.of("consents"):
        for name in survivors:
            server.take_consent(parts[name].consent(survivors))
    consents = server.consents()
    with costs.of("reveals"):
        for name in survivors:
            server.take_reveal(parts[name].reveal(consents))
    small = ("offers", "deals", "consents", "reveals")
    costs.seconds[SMALL] = [sum(costs.seconds[step][0] for step in small) / sites]
    said: list[Any] = [terms, *offers, *shares[first], *parts[first].deal(offers), *consents]
    said += [parts[first].offer(), parts[first].consent(survivors), parts[first].reveal(consents)]
    traffic = sum(len(json.dumps(asdict(message))) for message in said)
    with costs.of(MEAN):
        means = server.mean()
    error = max(float(np.abs(means[name] - value).max()) for name, value in update.items())
    return costs, traffic, error


def plain(update: Arrays, *, sites: int) -> Costs:
    """The mean of the same updates in the open, streamed into float64."""
    costs = Costs()
    sums = {name: np.zeros(value.shape) for name, value in update.items()}
    for _ in range(sites):
        with costs.of(SEND):
            sent = {name: value.tobytes() for name, value in update.items()}
        with costs.of(TAKE):
            for name, total in sums.items():
                total += np.multiply(np.frombuffer(sent[name], np.float32), WEIGHT, dtype=np.float64)
        del sent
    with costs.of(MEAN):
        _ = {name: (total / (WEIGHT * sites)).astype(np.float32) for name, total in sums.items()}
    return costs


def model(parameters: int) -> Arrays:
    """An update of a model's tensors: a vocabulary with a quarter of all values, and layers."""
    rng = np.random.default_rng(0)
    sizes = [parameters // 4, *[parameters // 32] * 24]
    return {
        f"layer-{index}": rng.uniform(-VALUE_RANGE, VALUE_RANGE, size).astype(np.float32)
        for index, size in enumerate(sizes)
    }


def measure(parameters: int, sites: int, threshold: int, drop_outs: Sequence[int]) -> list[dict[str, Any]]:
    """Rows of the table."""
    update = model(parameters)
    bare = plain(update, sites=sites)
    rows = [
        _row(bare, what, PLAIN, dropped=0, bytes_sent=4 * parameters if what == SEND else None)
        for what in (SEND, TAKE, MEAN)
    ]
    for dropped in drop_outs:
        costs, traffic, error = secure(update, sites=sites, threshold=threshold, dropped=dropped)
        for what, sent in ((SMALL, traffic), (SEND, 4 * parameters), (TAKE, None), (MEAN, None)):
            row = _row(costs, what, OURS, dropped=dropped, bytes_sent=sent)
            if what in bare.seconds:
                ratio = row["seconds"] / statistics.median(bare.seconds[what])
                row |= {"ratio": ratio, "ratio_to": PLAIN}
            rows.append(row | ({"largest_error": error} if what == MEAN else {}))
    return [row | {"parameters": parameters, "sites": sites, "threshold": threshold} for row in rows]


def _row(costs: Costs, what: str, who: str, *, dropped: int, bytes_sent: int | None) -> dict[str, Any]:
    seconds = costs.seconds[what]
    return {
        "what": what,
        "who": who,
        "dropped": dropped,
        "seconds": statistics.median(seconds),
        "spread": max(seconds) - min(seconds),
        "peak_bytes": costs.peaks[what],
        "bytes_sent": bytes_sent,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| what | who | dropped | seconds | x plain | peak MiB | bytes |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        ratio = f"{row['ratio']:.1f}" if "ratio" in row else ""
        sent = "" if row["bytes_sent"] is None else f"{row['bytes_sent']:,}"
        lines.append(
            f"| {row['what']} | {row['who']} | {row['dropped']} | {row['seconds']:.3f} | {ratio} "
            f"| {row['peak_bytes'] / 2**20:,.0f} | {sent} |"
        )
    errors = [row["largest_error"] for row in rows if "largest_error" in row]
    return "\n".join([*lines, "", f"Largest difference from the exact mean: {max(errors):.2g}"])


app = typer.Typer(add_completion=False)


@app.command()
def main(
    parameters: Annotated[int, typer.Option(min=32, help="Values of an update.")] = 86_000_000,
    sites: Annotated[int, typer.Option(min=2, help="Sites that are asked.")] = 8,
    threshold: Annotated[int, typer.Option(min=2, help="Sites it takes; more than half.")] = 6,
    quick: Annotated[bool, typer.Option("--quick", help="A twentieth of the values.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Measure an attempt in which nobody drops out, and one in which as many do as may."""
    parameters = (parameters // 20 if quick else parameters) // 32 * 32
    tracemalloc.start()
    rows = measure(parameters, sites, threshold, sorted({0, 1, sites - threshold}))
    typer.echo(f"{parameters:,} values, {sites} sites, threshold {threshold}\n\n{table(rows)}")
    if json_file is not None:
        write_rows(json_file, "secure_sum", rows)


if __name__ == "__main__":
    app()
