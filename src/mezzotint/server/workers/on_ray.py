"""Workers on other machines: a process here, the relay, that stands for an actor of Ray.

To the server a relay is a worker like any other. It runs nothing but Ray's client, which may end its
process or wait for minutes; neither may happen to the server. The actor runs the worker's loop unchanged and
ends with its relay.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import queue
import threading
import traceback
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray.exceptions import RayError, RayTaskError

from mezzotint.messages import (
    EXIT_UNPLACED,
    AdapterAdded,
    AdapterFailed,
    AddAdapter,
    LoadFailed,
    Loading,
    LoadModel,
    Placed,
    Ready,
    decode,
    encode,
    kind,
)
from mezzotint.server.workers.adapter_cache import AdapterCache
from mezzotint.spec import RayPlace

_log = logging.getLogger(__name__)

CONNECT_S = 20.0
"""How long Ray may take to answer; its own client would wait for minutes."""
WAITING = "waiting for a place on Ray"
_REWRITTEN = {cls.__name__ for cls in (AdapterAdded, AdapterFailed, LoadFailed, Ready)}
"""The answers that a relay reads; all others pass through it as they are."""


def run(connection: Connection, address: str, target: str) -> None:
    """The relay's process: connects to Ray at `address` and runs `target` in an actor there."""
    _Relay(connection).run(address, target)


class _Relay:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._paths: dict[str, str] = {}
        """By an adapter file's path on the node, its path here."""
        self._node = ""
        self._ready = False

    def run(self, address: str, target: str) -> None:
        first = self._connection.recv_bytes()
        load = decode(first)
        assert isinstance(load, LoadModel), "the first message names the model"
        self._say(Loading(WAITING))
        threading.Thread(target=self._receive, name="relay-receive", daemon=True).start()
        self._connect(address)
        code = 1
        try:
            actor = ray.remote(**_options(load.place))(WorkerActor).remote(target)
            self._node = ray.get(actor.node.remote())
            self._say(Placed(self._node))
            ray.get(actor.send.remote([first]))
            threading.Thread(target=self._forward, args=(actor,), name="relay-forward", daemon=True).start()
            for reference in actor.frames.remote():
                item = ray.get(reference)
                if isinstance(item, int):
                    code = item
                else:
                    self._connection.send_bytes(self._translated(item))
        except (RayError, ValueError) as error:
            text = f"the worker on node {self._node or '(none yet)'} is lost: {_first_line(error)}"
            if not self._ready:
                self._say(LoadFailed("model_load_failed", text, False))
            _log.error(text)
        except OSError:
            pass  # the server is gone
        os._exit(code)  # the actor ends with this process

    def _connect(self, address: str) -> None:
        """Exits with EXIT_UNPLACED when Ray cannot be reached; the server then tries again."""

        def give_up(reason: str) -> None:
            text = (
                f"Ray at {address} cannot be used ({reason}); start it with `ray start --head`, with the "
                f"same versions of Ray and Python and the same token as here"
            )
            self._say(LoadFailed("workers_unavailable", text, False))
            os._exit(EXIT_UNPLACED)

        watch = threading.Timer(CONNECT_S, give_up, (f"no answer in {CONNECT_S:g} s",))
        watch.daemon = True
        watch.start()
        try:
            ray.init(address=address, namespace="mezzotint", logging_level="error", log_to_driver=False)
        except (Exception, SystemExit) as error:
            give_up(_first_line(error))
        watch.cancel()

    def _receive(self) -> None:
        """Ends the process as soon as the server lets go of it, whatever Ray is doing."""
        try:
            while True:
                self._inbox.put(self._connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)

    def _forward(self, actor: Any) -> None:
        """Sends in order: one call at a time, with all that has come meanwhile."""
        try:
            while True:
                frames = [self._inbox.get()]
                while not self._inbox.empty():
                    frames.append(self._inbox.get())
                kept = [self._with_file(actor, frame) for frame in frames]
                ray.get(actor.send.remote([frame for frame in kept if frame is not None]))
        except RayError:
            return  # the main thread reports the death

    def _with_file(self, actor: Any, frame: bytes) -> bytes | None:
        """An AddAdapter with the path of its file on the worker's node, which gets it if it lacks it.

        None when the node could not keep the file; the server has been told then.
        """
        if kind(frame) != AddAdapter.__name__:
            return frame
        message = decode(frame)
        assert isinstance(message, AddAdapter)
        here = message.adapter.path
        try:
            content = Path(here).read_bytes()
        except OSError:
            return frame  # the worker says that the file is missing
        checksum = message.adapter.checksum or hashlib.sha256(content).hexdigest()
        try:
            there = ray.get(actor.find_file.remote(checksum))
            if there is None:
                there = ray.get(actor.keep_file.remote(checksum, content))
        except RayTaskError as error:
            reason = f"node {self._node} cannot keep the file: {_first_line(error.cause)}"
            self._say(AdapterFailed(message.adapter.route, here, "adapter_load_failed", reason))
            return None
        self._paths[there] = here
        return encode(AddAdapter(replace(message.adapter, path=there)))

    def _translated(self, frame: bytes) -> bytes:
        if kind(frame) not in _REWRITTEN:
            return frame
        message = decode(frame)
        match message:
            case AdapterAdded() | AdapterFailed():
                return encode(replace(message, path=self._paths.get(message.path, message.path)))
            case LoadFailed():
                return encode(replace(message, message=f"on node {self._node}: {message.message}"))
            case Ready():
                self._ready = True
        return frame

    def _say(self, message: AdapterFailed | Loading | LoadFailed | Placed) -> None:
        self._connection.send_bytes(encode(message))


class WorkerActor:
    """Runs a worker's loop in a thread, between two ends of a pipe.

    Calls of one concurrency group run one after the other, in their order.
    """

    def __init__(self, target: str) -> None:
        self._pipe, theirs = Pipe()
        self._code = 1
        self._files = AdapterCache(_adapter_folder())
        self._loop = threading.Thread(target=self._run, args=(target, theirs), name="worker", daemon=True)
        self._loop.start()

    def node(self) -> str:
        return str(ray.util.get_node_ip_address())

    @ray.method(concurrency_group="in")  # type: ignore[untyped-decorator]
    def send(self, frames: list[bytes]) -> None:
        for frame in frames:
            try:
                self._pipe.send_bytes(frame)
            except OSError:
                return  # the loop has ended, and `frames` says so

    @ray.method(concurrency_group="in")  # type: ignore[untyped-decorator]
    def find_file(self, checksum: str) -> str | None:
        """The path of an adapter file that is on this node already."""
        file = self._files.find(checksum)
        return None if file is None else str(file)

    @ray.method(concurrency_group="in")  # type: ignore[untyped-decorator]
    def keep_file(self, checksum: str, content: bytes) -> str:
        return str(self._files.keep(checksum, content))

    @ray.method(concurrency_group="out", num_returns="streaming")  # type: ignore[untyped-decorator]
    def frames(self) -> Iterator[bytes | int]:
        """What the worker says, and last its exit code."""
        while True:
            try:
                frame = self._pipe.recv_bytes()
            except (EOFError, OSError):
                break
            yield frame
        self._loop.join()
        yield self._code

    def _run(self, target: str, connection: Connection) -> None:
        module, _, function = target.partition(":")
        try:
            getattr(importlib.import_module(module), function)(connection)
            self._code = 0
        except SystemExit as end:
            self._code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            connection.close()


def _options(place: RayPlace) -> Any:
    values: dict[str, Any] = {
        "num_cpus": place.num_cpus,
        "num_gpus": place.num_gpus,
        "resources": dict(place.resources),
        "scheduling_strategy": "SPREAD" if place.placement == "spread" else "DEFAULT",
        "concurrency_groups": {"in": 1, "out": 1},
        "max_restarts": 0,
    }
    if place.memory:
        values["memory"] = place.memory
    if place.accelerator_type is not None:
        values["accelerator_type"] = place.accelerator_type
    return values


def _adapter_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "mezzotint" / "adapters"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
