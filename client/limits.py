"""What one hospital allows, whatever a coordinator asks: the ``[policy]`` table of its `site.toml`."""

import re
from dataclasses import dataclass
from datetime import datetime, time
from typing import Annotated, Any, Literal, Self, get_args
from zoneinfo import ZoneInfo

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from strategies.messages import Objective, Shared
from strategies.settings import Settings

# What a release may say beyond what an average and its books need. The rest of `ReleaseFacts` always leaves:
# who, which round, the declared size, steps, coarse seconds (an arrival time shows them anyway), the ledger's
# head (the anchor that keeps a site from shortening its books), a fixed noise seed, a replay.
Metric = Literal["epsilon", "epsilon-max", "delta", "noise-multiplier", "sample-rate", "max-grad-norm"]
METRICS: tuple[Metric, ...] = get_args(Metric)

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Pattern = Annotated[str, StringConstraints(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class QuietHours:
    """A part of every day, by the wall clock: from ``start`` up to, not including, ``end``.

    An end before the start is on the next day.
    """

    start: time
    end: time

    @classmethod
    def parse(cls, value: Any) -> Any:
        """Read ``"22:00-06:00"``; what is no string is left to the caller's checks.

        Raises:
            ValueError: it is not of this form, or both times are the same.
        """
        if not isinstance(value, str):
            return value
        if not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d", value):
            raise ValueError(f"expected two times of day such as '22:00-06:00', got {value!r}")
        start, end = map(time.fromisoformat, value.split("-"))
        if start == end:
            raise ValueError(f"{value!r} is either always or never: name two different times")
        return cls(start=start, end=end)

    def hold(self, moment: time) -> bool:
        """Whether ``moment`` lies in them."""
        if self.start < self.end:
            return self.start <= moment < self.end
        return moment >= self.start or moment < self.end

    def __str__(self) -> str:
        return f"{self.start:%H:%M}-{self.end:%H:%M}"


class Policy(Settings):
    """What the hospital allows.

    Every rule is decided by the request, by public constants of this file and by the clock, never by a
    patient: a refusal is seen outside, and must not tell what noise hides.

    Attributes:
        require_dp: Refuse a run without differential privacy.
        epsilon_max: Budget of the cohort for its lifetime, per patient, add/remove one patient.
        epsilon_run: Where a plan asks for a larger epsilon, noise is added as for this one.
        delta: Failure probability; by default 1 / (10 patients_declared), rounded down to a power of ten.
        min_patients: Refuse to train while fewer patients than this are *declared*. The true number decides
            nothing that can be seen under privacy, where it is private: if it is smaller, the site's own log
            says so, every round. (Without privacy there is no promise to break, and it refuses.)
        min_noise_multiplier: Refuse a plan that would add less noise.
        max_sample_rate: Refuse a plan that would draw a larger share of the patients in a step.
        max_rounds: Refuse a run of more rounds.
        max_steps: Refuse a round of more optimizer steps.
        parts: What may be trained and leave. Of ``prototypes`` the sums leave, and the trained model stays.
        objectives: Losses that may be trained with.
        prototypes: Whether noised mean directions of concepts may be released besides.
        runs: Names of runs that may be taken part in; ``*`` stands for anything, ``?`` for one character.
        code: Digests of this program's source that may answer at all (see `client.own_code`); empty: any.
        metrics: What a release may say about its mechanism and budget.
        max_release_bytes: Refuse a round whose release would hold more bytes of arrays.
        quiet_hours: Times of day at which no round is begun; one that has begun is ended.
        timezone: Whose clock ``quiet_hours`` go by.
    """

    require_dp: bool = True
    epsilon_max: float = Field(default=8.0, gt=0)
    epsilon_run: float | None = Field(default=None, gt=0)
    delta: float | None = Field(default=None, gt=0, lt=1)
    min_patients: int = Field(default=20, ge=2)
    min_noise_multiplier: float = Field(default=0.3, gt=0)
    max_sample_rate: float = Field(default=0.5, gt=0, le=1)
    max_rounds: int = Field(default=1000, ge=1)
    max_steps: int = Field(default=10_000, ge=1)
    parts: tuple[Shared, ...] = get_args(Shared)
    objectives: tuple[Objective, ...] = get_args(Objective)
    prototypes: bool = True
    runs: tuple[Pattern, ...] = ("*",)
    code: tuple[Digest, ...] = ()
    metrics: tuple[Metric, ...] = METRICS
    max_release_bytes: int = Field(default=2_000_000_000, ge=1)
    quiet_hours: Annotated[QuietHours, BeforeValidator(QuietHours.parse)] | None = None
    timezone: ZoneInfo | None = None

    @model_validator(mode="after")
    def _quiet_by_some_clock(self) -> Self:
        if (self.quiet_hours is None) != (self.timezone is None):
            raise ValueError(
                "quiet-hours and timezone belong together: say whose clock, as timezone = 'Europe/Berlin'"
            )
        return self

    def quiet_at(self, unix_seconds: float) -> bool:
        """Whether no round may begin at this moment."""
        if self.quiet_hours is None:
            return False
        return self.quiet_hours.hold(datetime.fromtimestamp(unix_seconds, self.timezone).time())
