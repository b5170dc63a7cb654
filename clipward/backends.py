"""Two engines for a simulated federation: this process, or Ray. Both run the same ServerApp and ClientApp."""

import contextlib
import importlib.util
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence

from flwr.app import Context, Message, RecordDict, UserConfigValue
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from strategies.flower_compat import stay_offline
from strategies.in_process import InProcessGrid, answer
from strategies.messages import CONSENT, DEAL, HELLO, INSTALL, MASK, REVEAL
from strategies.offline import OFFLINE

Config = Mapping[str, UserConfigValue]


class BackendError(RuntimeError):
    """An engine cannot run the federation; the text names the remedy."""


def run_in_process(
    server_app: ServerApp, client_app: ClientApp, *, node_configs: Sequence[Config], run_config: Config
) -> None:
    """Run the federation in this process, one site after the other.

    Args:
        server_app: The coordinator.
        client_app: Every site.
        node_configs: One per site.
        run_config: The app's settings, the same for coordinator and sites.

    Raises:
        Exception: whatever the ServerApp raises.
    """
    stay_offline()
    server_app(InProcessGrid(client_app, node_configs, run_config), _coordinator_context(run_config))


def run_on_ray(
    server_app: ServerApp,
    client_app: ClientApp,
    *,
    node_configs: Sequence[Config],
    run_config: Config,
    cpus: int = 2,
    gpus_per_site: float = 0.0,
    object_store_bytes: int = 512 * 2**20,
) -> None:
    """Run the federation on Flower's simulation engine, as many sites at once as there are processors.

    Guarantees:
        Returns only when the ServerApp came to its end. Nothing is written to the user's home, nothing
        leaves the machine, and Ray's own files are gone afterwards. As in this process, a site's exception
        becomes an error reply with a constant text.

    Args:
        server_app: The coordinator; it stays in this process.
        client_app: Every site; it is sent to Ray's worker processes.
        node_configs: One per site.
        run_config: The app's settings, the same for coordinator and sites.
        cpus: How many sites work at once, each on one processor.
        gpus_per_site: Share of a graphics processor each site takes.
        object_store_bytes: Ray's shared memory; what does not fit is kept on disk.

    Raises:
        BackendError: Ray is not installed, a Ray is already running here, or there is no such processor.
        Exception: whatever the ServerApp raises.
    """
    if importlib.util.find_spec("ray") is None:
        raise BackendError('ray is not installed: pip install "flwr[simulation]", or run in this process')
    from flwr.simulation import run_simulation

    outcome: list[BaseException | None] = []
    with _ray(cpus, object_store_bytes) as gpus, _errors_only("flwr"):
        if gpus_per_site > gpus:
            raise BackendError(f"expected {gpus_per_site=} at most {gpus}, the graphics processors Ray sees")
        run_simulation(
            server_app=_configured_server(server_app, run_config, outcome),
            client_app=_configured_client(client_app, node_configs, run_config),
            num_supernodes=len(node_configs),
            backend_config={"client_resources": {"num_cpus": 1, "num_gpus": gpus_per_site}},
        )
    if not outcome:
        raise BackendError("the simulation ended before its ServerApp did: see the log above")
    if outcome[0] is not None:
        raise outcome[0]


@contextlib.contextmanager
def _ray(cpus: int, object_store_bytes: int) -> Iterator[float]:
    """A Ray runtime that leaves nothing behind; yields how many graphics processors it has.

    Started here and not by Flower: were it to fail there, the ServerApp would wait for its sites in vain.
    """
    stay_offline()
    import ray

    if ray.is_initialized():
        raise BackendError("a Ray runtime is already running in this process: call ray.shutdown() first")
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        with warnings.catch_warnings():  # its advice about graphics processors is not for our users
            warnings.simplefilter("ignore", FutureWarning)
            ray.init(
                num_cpus=cpus,
                object_store_memory=object_store_bytes,
                include_dashboard=False,
                runtime_env={"env_vars": {**OFFLINE, "PYTHONPATH": path}},
                logging_level="WARNING",
                _temp_dir=folder,
            )
        try:
            yield ray.cluster_resources().get("GPU", 0.0)
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _errors_only(name: str) -> Iterator[None]:
    """Silence a library that tells users of a deprecation which the pinned version bears."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _coordinator_context(run_config: Config) -> Context:
    return Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=dict(run_config))


def _configured_server(
    server_app: ServerApp, run_config: Config, outcome: list[BaseException | None]
) -> ServerApp:
    """The ServerApp with its settings, which Flower's engine leaves empty; its end goes to ``outcome``."""
    configured = ServerApp()

    @configured.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        context.run_config = dict(run_config)
        try:
            server_app(grid, context)
        except BaseException as error:  # this is Flower's thread: SystemExit too would vanish in it
            outcome.append(error)
        else:
            outcome.append(None)

    return configured


def _configured_client(
    client_app: ClientApp, node_configs: Sequence[Config], run_config: Config
) -> ClientApp:
    """The ClientApp with the settings of its node, of which Flower's engine knows only the partition."""
    configured = ClientApp()
    configs = [dict(config) for config in node_configs]
    settings = dict(run_config)

    def handle(message: Message, context: Context) -> Message:
        inner = Context(
            run_id=context.run_id,
            node_id=context.node_id,
            node_config=configs[int(context.node_config["partition-id"])],
            state=context.state,
            run_config=dict(settings),
        )
        reply = answer(client_app, message, inner)
        context.state = inner.state
        return reply

    for action in (HELLO, INSTALL, DEAL, MASK, CONSENT, REVEAL):
        configured.query(action.removeprefix("query."))(handle)
    configured.train()(handle)
    return configured
