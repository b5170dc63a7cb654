"""What was computed from patients and not yet noised reaches no message and no log, as the source is written.

Names that start with ``raw_`` and the results of the functions that read patients are followed through each
function; they may not come into a message, a log call, a warning, a metric or a print. What a mechanism
released is public. This reads the source and can be fooled; `tests/e2e/test_boundary.py` compares whole runs.
"""

import ast
import inspect
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path

import pytest
from pydantic import BaseModel

from strategies import messages

ROOT = Path(__file__).parents[1]
READS_PATIENTS = {"packed_cohort", "training_data", "clipped_sum", "poisson_sample", "rows_by_patient"}
RELEASES = {"train_privately", "release"}  # of a mechanism: clipped and noised
LOGS = {"debug", "info", "warning", "error", "exception", "critical", "log"}
METRICS = {"record", "observe", "inc", "add_metric"}
MESSAGES = {
    name
    for name, kind in vars(messages).items()
    if inspect.isclass(kind)
    and kind.__module__ == messages.__name__
    and (issubclass(kind, BaseModel) or is_dataclass(kind))
}
LEAVES = MESSAGES | LOGS | METRICS | {"encode", "model_copy", "print", "warn"}

# Without privacy nothing is claimed: there a site's own number of steps, plain update and sum may leave.
WITHOUT_CLAIM = {"_made_without_claim"}


def violations(source: str) -> list[str]:
    """Each call of something that leaves whose arguments hold something raw."""
    return [found for function in _functions(ast.parse(source)) for found in _Function(function).violations()]


def _functions(tree: ast.Module) -> Iterator[ast.AST]:
    """Each function on its own, and what a module does when it is imported."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    outermost = [node for node in tree.body if not isinstance(node, (*functions, ast.ClassDef))]
    yield ast.Module(body=outermost, type_ignores=[])
    yield from (
        node for node in ast.walk(tree) if isinstance(node, functions) and node.name not in WITHOUT_CLAIM
    )


class _Function:
    def __init__(self, function: ast.AST) -> None:
        self._function = function
        self._raw: set[str] = set()
        while self._follow():  # again, as long as a loop brings something new
            pass

    def violations(self) -> list[str]:
        calls = [node for node in ast.walk(self._function) if isinstance(node, ast.Call)]
        return [
            f"line {call.lineno}: {ast.unparse(call)}"
            for call in calls
            if _name(call.func) in LEAVES and any(map(self._is_raw, _arguments(call)))
        ]

    def _follow(self) -> bool:
        """Whether another name was found to hold something raw."""
        before = len(self._raw)
        for node in ast.walk(self._function):
            match node:
                case ast.Assign(targets=targets, value=value):
                    pass
                case ast.AnnAssign(target=target, value=ast.expr() as value):
                    targets = [target]
                case ast.AugAssign(target=target, value=value) | ast.NamedExpr(target=target, value=value):
                    targets = [target]
                case ast.For(target=target, iter=value) | ast.comprehension(target=target, iter=value):
                    targets = [target]
                case _:
                    continue
            if self._is_raw(value):
                self._raw |= {name for target in targets for name in _stored(target)}
        return len(self._raw) > before

    def _is_raw(self, expression: ast.AST) -> bool:
        match expression:
            case ast.Call(func=function) if _name(function) in RELEASES:
                return False
            case ast.Call(func=function) if _name(function) in READS_PATIENTS:
                return True
            case ast.Name(id=name) | ast.Attribute(attr=name) if name.startswith("raw_"):
                return True
            case ast.Name(id=name) if name in self._raw:
                return True
        return any(map(self._is_raw, ast.iter_child_nodes(expression)))


def _arguments(call: ast.Call) -> list[ast.expr]:
    return [*call.args, *(keyword.value for keyword in call.keywords)]


def _name(function: ast.AST) -> str:
    match function:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def _stored(target: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(target) if isinstance(node, ast.Name)}


def sources() -> list[Path]:
    return sorted(
        path for name in ("client", "privacy", "strategies") for path in (ROOT / name).rglob("*.py")
    )


def test_nothing_raw_is_put_into_what_leaves() -> None:
    found = {
        str(path.relative_to(ROOT)): mistakes
        for path in sources()
        if (mistakes := violations(path.read_text("utf-8")))
    }
    assert found == {}


def test_messages_know_no_raw_name() -> None:
    tree = ast.parse(Path(messages.__file__).read_text("utf-8"))
    names = {
        name
        for node in ast.walk(tree)
        for name in (getattr(node, key, None) for key in ("id", "attr", "arg", "name"))
        if isinstance(name, str)
    }
    assert not {name for name in names if name.startswith("raw_")}
    assert {"ReleaseFacts", "SiteFacts", "Refusal", "Release"} <= MESSAGES


def test_a_clipped_sum_without_noise_is_called_raw() -> None:
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Assign) and _name(getattr(node.value, "func", node)) == "clipped_sum":
                assert all(name.startswith("raw_") for target in node.targets for name in _stored(target)), (
                    f"{path.relative_to(ROOT)}, line {node.lineno}"
                )


def test_the_facts_of_a_release_are_a_closed_list() -> None:
    """Each is public or post-processing of what was released; another one is a decision about privacy."""
    assert set(messages.ReleaseFacts.model_fields) == {
        *("site", "server_round", "patients_declared", "steps", "seconds"),
        *("epsilon", "epsilon_max", "delta", "noise_multiplier", "sample_rate", "max_grad_norm"),
        *("anchor", "insecure_seed", "replayed"),
    }
    assert set(messages.SiteFacts.model_fields) == {"site", "patients_declared", "has_bundle"}
    assert set(messages.Refusal.model_fields) == {"site", "code", "incident"}


@pytest.mark.parametrize(
    "planted",
    [
        "def f(raw_loss):\n return ReleaseFacts(seconds=raw_loss)",
        "def f(site):\n count = len(packed_cohort(site.folder))\n return SiteFacts(patients_declared=count)",
        "def f(raw_sum):\n norm = raw_sum['a'].norm()\n logger.info('a step of norm %s', norm)",
        "def f(self):\n for step in range(3):\n  if step:\n   print(last)\n  last = self.raw_norm",
        "def f(facts, raw_steps):\n return facts.model_copy(update={'steps': raw_steps})",
        "def f(run, raw_x):\n run.record('site_replied', norm=float(raw_x))",
        "def f(raw_x):\n return encode(Release(facts=1, update={'a': raw_x}))",
        "def f(raw_x):\n warnings.warn(f'{raw_x}')",
        "def f():\n drawn = poisson_sample(1)\n sizes = [len(one) for one in drawn]\n logger.debug(sizes)",
        "class A:\n def f(self):\n  if (n := len(training_data(1))) > 3:\n   logger.warning('few: %d', n)",
    ],
)
def test_a_planted_mistake_is_found(planted: str) -> None:
    assert len(violations(planted)) >= 1


@pytest.mark.parametrize(
    "sound",
    [
        "def f(mechanism, raw_sum):\n return Release(facts=1, update=mechanism.release(raw_sum, 1))",
        "def f(data):\n update = train_privately(training_data(1))\n return Release(facts=1, update=update)",
        "def f(folder, raw_patients):\n write_note(folder, f'{raw_patients} patients')",
        "def f(raw_patients):\n raise Refused(1, f'{raw_patients} patients')",
        "def f(raw_x):\n logger.info('a step was taken')",
    ],
)
def test_what_is_noised_or_stays_inside_is_allowed(sound: str) -> None:
    assert violations(sound) == []
