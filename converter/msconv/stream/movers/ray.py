"""A Ray cluster's nodes: an actor on each is a worker.  Only this file imports Ray.

Ray moves values of our own, pickled, between machines that trust each other; nothing of a checkpoint or artifact
is unpickled.  Who can reach a cluster's ports can run code on it: that is Ray's design.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, redirect_stdout, suppress
from importlib.util import find_spec
from typing import Any

from msconv_runtime.errors import EnvironmentProblem, UsageError

from ..task import Unit
from .node import Answer, Job, Look, NodeWorker, Seen
from .workers import Cluster, Worker, WorkerLost

LOCAL = "local"
ACTOR_BYTES = 64 << 20  # that Ray takes in a worker's process: measured
STORE_BYTES = 96 << 20  # of Ray's object store on this machine, for `local`: the plan goes through it
ANSWERS_WITHIN_S = 5.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CAUSE_CHARS = 300


def refuse_address(address: str) -> None:
    """Raises EnvironmentProblem if Ray is not installed, UsageError if this is no address that can work."""
    if find_spec("ray") is None:
        raise EnvironmentProblem("--ray: Ray is not installed.", 'Install it: pip install "msconv[ray]".')
    if address in (LOCAL, "auto"):
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UsageError(
            f"--ray {address[:200]}: is neither {LOCAL} nor auto nor HOST:PORT.",
            "Run msconv on a machine of the cluster and give --ray auto, or what `ray start` printed; "
            "Ray's client (ray://) will not do: this machine must see the storage too.",
        )


@contextmanager
def connected(address: str, jobs: int) -> Iterator[RayCluster]:
    """The cluster at HOST:PORT, the one that this machine is in (`auto`), or one of this machine alone that ends
    with this (`local`).  Raises MsconvError."""
    refuse_address(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    options: dict[str, object] = {}
    if address == LOCAL:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # listens at 127.0.0.1 only, here too
        os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(32)
        options = {"num_cpus": jobs, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    else:
        _refuse_silent(address)
    with _own_signals():
        import ray

        try:
            ray.init(address, log_to_driver=False, logging_level="ERROR", namespace="msconv", **options)
        except (KeyboardInterrupt, SystemExit):  # the latter is Ray's own answer to SIGTERM
            ray.shutdown()
            raise KeyboardInterrupt from None
        except Exception as e:  # ConnectionError, RuntimeError, ValueError: as the reason may be
            raise _no_cluster(address, e) from None
    with redirect_stdout(sys.stderr):  # Ray would say there, amid an answer, what becomes of its workers
        try:
            yield RayCluster(ray)
        finally:
            _shut_down(ray)


def _no_cluster(address: str, error: Exception) -> EnvironmentProblem:
    from ray.exceptions import AuthenticationError

    reason: BaseException | None = error
    while reason is not None:
        if isinstance(reason, AuthenticationError):
            return EnvironmentProblem(
                f"--ray {address}: the cluster wants its token, and has not got it.",
                "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token as on the machine where "
                "`ray start --head` ran.",
            )
        reason = reason.__cause__ or reason.__context__
    return EnvironmentProblem(
        f"--ray {address}: no cluster answers as it should: {_cause(error)}.",
        "This machine must be a node of the cluster (`ray start --address=HOST:PORT`), with the same versions of "
        "Ray and Python; `ray status` says what there is.",
    )


def _refuse_silent(address: str) -> None:
    """Ray itself waits for a minute."""
    host, _, port = address.rpartition(":")
    if not host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWERS_WITHIN_S).close()
    except OSError as e:
        raise EnvironmentProblem(
            f"--ray {address}: nothing answers there: {e.strerror or e}.",
            "`ray start --head` on one machine prints the address; --ray local needs none.",
        ) from None


def _shut_down(ray: Any) -> None:
    """A signal that comes meanwhile is obeyed afterwards: Ray, in the middle of this, would end the process in its
    own way, with another exit code.  (For a moment it has SIGTERM end it at once; nothing is lost by that.)"""
    came: list[int] = []
    with _own_signals():
        with suppress(ValueError):  # not in the main thread, to which signals come
            for number in SIGNALS:
                signal.signal(number, lambda number, frame: came.append(number))
        ray.shutdown()
    if came:
        raise KeyboardInterrupt


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray puts its own handler of SIGTERM, which leaves without a word: ours stay."""
    before = {n: signal.getsignal(n) for n in SIGNALS}
    try:
        yield
    finally:
        with suppress(ValueError):  # not in the main thread: Ray did not either
            for number, handler in before.items():
                signal.signal(number, handler)


class RayCluster(Cluster):
    """Nodes that have processors.  `ray`: the module, connected."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._processors: dict[str, float] = {}
        self._jobs: dict[int, tuple[Job, Any]] = {}  # put once, for all nodes

    def nodes(self) -> dict[str, str]:
        found = {}
        for node in self._ray.nodes():
            processors = node["Resources"].get("CPU", 0.0)
            if node["Alive"] and processors > 0:
                name, self._processors[node["NodeID"]] = node["NodeManagerAddress"], processors
                found[node["NodeID"]] = f"{node['NodeManagerHostname']} ({name}, node {node['NodeID'][:8]})"
        return found

    def start(self, node: str, jobs: int) -> Worker:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        made = self._ray.remote(NodeWorker).options(
            num_cpus=min(float(jobs), self._processors[node]),
            max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        return _Actor(self, made.remote(jobs))

    def share(self, job: Job) -> Any:
        """A reference to a job, which is sent to each node once."""
        if id(job) not in self._jobs:
            self._jobs[id(job)] = job, self._ray.put(job)
        return self._jobs[id(job)][1]


class _Actor(Worker):
    def __init__(self, cluster: RayCluster, handle: Any) -> None:
        self._cluster, self._handle = cluster, handle

    def look(self, look: Look) -> Future[Seen]:
        return _answer(self._handle.look.remote(look))

    def begin(self, job: Job) -> Future[None]:
        return _answer(self._handle.begin.remote(self._cluster.share(job)))

    def work(self, units: Sequence[Unit]) -> Future[Answer]:
        return _answer(self._handle.work.remote(list(units)))

    def end(self) -> None:
        self._cluster._ray.kill(self._handle, no_restart=True)


def _answer(reference: Any) -> Future[Any]:
    """What a call returns.  Ray's errors become WorkerLost, with what was raised there, if anything was."""
    from ray.exceptions import RayError, RayTaskError

    answer: Future[Any] = Future()

    def take(done: Future[Any]) -> None:
        try:
            answer.set_result(done.result())
        except RayTaskError as e:
            answer.set_exception(WorkerLost(f"{type(e.cause).__name__}: {_cause(e.cause)}"))
        except RayError as e:
            answer.set_exception(WorkerLost(_cause(e)))
        except BaseException as e:
            answer.set_exception(e)

    reference.future().add_done_callback(take)
    return answer


def _cause(error: BaseException) -> str:
    """What Ray says, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = "; ".join(lines) or type(error).__name__
    return (text[:CAUSE_CHARS] + " ..." if len(text) > CAUSE_CHARS else text).rstrip(".")
