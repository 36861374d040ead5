"""Wiring: settings in, an ASGI app out."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import sqlalchemy as sa
import structlog
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.telemetry import TelemetryConfig
from sqlalchemy.exc import DataError, SQLAlchemyError
from starlette.datastructures import State
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import Scope

import mezzotint
from mezzotint.config import Settings
from mezzotint.errors import (
    ConfigError,
    InvalidRequestError,
    MethodNotAllowedError,
    MezzotintError,
    NotFoundError,
    UnavailableError,
    echo,
)
from mezzotint.server.api import (
    a1111,
    adapters,
    dedicated,
    documentation,
    keys,
    management,
    openai,
    openai_edits,
    operations,
    pictures,
    playground,
)
from mezzotint.server.api.connections import MAX_HEAD_BYTES, Connections, max_connections
from mezzotint.server.api.context import Context, caller_of
from mezzotint.server.api.gateways import PICTURE_PATHS, Forwarding, Gateways
from mezzotint.server.api.middleware import BodyReader, Envelope, HostAndOriginGuard, Refusals, error_response
from mezzotint.server.api.picture_urls import PictureFetcher
from mezzotint.server.metrics import Metrics
from mezzotint.server.store import database
from mezzotint.server.store.durable import owned
from mezzotint.server.store.folder import Folder, Storage
from mezzotint.server.store.migrations import Upgrade
from mezzotint.server.store.pictures import Pictures
from mezzotint.server.store.quotas import Quotas
from mezzotint.server.store.shared import share_signer
from mezzotint.server.store.signing import load_signer
from mezzotint.server.threads import DATABASE, UPKEEP, Threads
from mezzotint.server.tracing import Tracing, open_tracing
from mezzotint.server.work.adapters import AdapterRegistry
from mezzotint.server.work.admission import Admission
from mezzotint.server.work.registry import Registry
from mezzotint.server.workers.process import ENGINE_WORKER, WorkerSettings

CLEAN_EVERY_S = 60.0
WRITE_HELD_EVERY_S = 2.0
COUNT_EVERY_S = 1.0
"""How often servers on one database tell each other what their keys have used."""
BACKLOG = 2048
"""Connections that may wait to be accepted."""
LAST_WORDS_S = 5
"""How long answers may take to go out once the draining is over."""
FINISH_LIMIT_S = 120.0
"""How long turning pixels into an answer may take, its turn and the disk included."""
ERROR_EVERY_S = 60.0
"""How often the event loop's complaint that there are no descriptors is logged."""
UNMATCHED = "unmatched"
"""Route label of requests for no known path, which anyone could make up."""

log = structlog.get_logger(__name__)


def create_app(settings: Settings, *, worker: str = ENGINE_WORKER, only: str | None = None) -> FastAPI:
    """The server. `worker` is the dotted name of a module-level function that takes a Connection.

    `only` names the one endpoint to serve; what is remembered of the others stays untouched.

    Opens the data folder and the database, and finds the adapters; `serve` starts the workers.
    `app.state.context` is the Context. ConfigError stops the start.
    """
    context = _context(settings, worker)
    try:
        with owned(settings.data_dir, shared=only is not None):
            context.registry.load(settings.endpoints, only)
            context.adapters.load(context.registry)
    except BaseException:
        context.engine.dispose()
        raise
    app = FastAPI(
        title="Mezzotint",
        version=mezzotint.__version__,
        summary="Image-generation models as dedicated endpoints.",
        lifespan=_lifespan(context),
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        telemetry=_telemetry(context.tracing),
    )
    app.state.context = context
    app.state.only = only
    for dialect in (
        dedicated,
        pictures,
        operations,
        management,
        adapters,
        keys,
        openai,
        openai_edits,
        a1111,
        playground,
    ):
        dialect.install(app)
    documentation.install(app)
    app.state.gateways = None
    if context.engine.dialect.name != "sqlite":
        app.state.gateways = Gateways(app, context, share_signer(context.engine, context.signer))
        app.add_middleware(Forwarding, gateways=app.state.gateways)
    app.add_middleware(
        BodyReader,
        max_bytes=settings.max_body_bytes,
        max_image_bytes=max(settings.max_body_bytes, settings.max_image_body_bytes),
        timeout_s=settings.body_timeout_s,
        has_controls=lambda: any(endpoint.spec.controlnets for endpoint in context.registry),
        identify=caller_of,
    )
    if not settings.auth:
        app.add_middleware(HostAndOriginGuard, settings=settings)
    app.add_middleware(Refusals, on_error=_count_error(context.metrics))
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=[
                "authorization",
                "content-type",
                "idempotency-key",
                "prefer",
                "x-request-timeout-s",
            ],
            expose_headers=["x-request-id", "retry-after", "server-timing", "x-warnings"],
        )
    app.add_middleware(Envelope, on_answer=_count(context.metrics))
    app.add_exception_handler(MezzotintError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    app.add_exception_handler(SQLAlchemyError, _answer_database)
    return app


class _LoopErrors:
    """What the event loop complains of, in our log. It may say thousands of times that descriptors lack."""

    def __init__(self) -> None:
        self._said_at = -ERROR_EVERY_S

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            if loop.time() - self._said_at < ERROR_EVERY_S:
                return
            self._said_at = loop.time()
        log.error("defect in the event loop", text=context.get("message"), exc_info=error)


class _Server(uvicorn.Server):
    """uvicorn, but what is not done `drain_s` after the signal is answered instead of cut off."""

    def __init__(self, config: uvicorn.Config, state: State) -> None:
        """`state` is the app's; the end of its lifespan reads from it until when requests may go on."""
        super().__init__(config)
        self._state = state
        self._context: Context = state.context

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        drain_s = self._context.settings.drain_s
        self._state.drain_until = loop.time() + drain_s
        ending = loop.call_later(drain_s, _drop_requests, self._context)
        await super().shutdown(sockets)
        ending.cancel()


async def serve(
    app: FastAPI, settings: Settings, *, on_started: Callable[[str], None] = lambda url: None
) -> None:
    """Serves the app until SIGTERM, SIGINT or `app.state.server.should_exit`; tells `on_started` its address.

    On the signal no new connection is taken and running requests have `drain_s` to end.
    """
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=cast(Any, Connections(settings.body_timeout_s, max_connections())),
        ws="none",
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        log_config=None,
        log_level="error",  # anyone can send what it warns of
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=round(settings.drain_s) + LAST_WORDS_S,
        lifespan="on",
    )
    asyncio.get_running_loop().set_exception_handler(_LoopErrors())
    try:
        with owned(settings.data_dir, shared=app.state.only is not None):
            listener = _listen(settings)
            host, port = listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            app.state.gateway_url = settings.gateway_url or f"http://{_reachable(host)}:{port}"
            app.state.on_listening = lambda: on_started(f"http://{shown}:{port}")
            app.state.server = _Server(config, app.state)
            await app.state.server.serve(sockets=[listener])
    finally:
        app.state.context.engine.dispose()  # of a start that failed, too


def _context(settings: Settings, worker: str) -> Context:
    folder = settings.data_dir / "images"
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.mkdir(exist_ok=True, mode=0o700)
        signer = load_signer(settings.data_dir)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data_dir: {echo(str(settings.data_dir))} cannot be used "
            f"({error.strerror if isinstance(error, OSError) else error}); "
            "give a folder that this user may write to"
        ) from None
    engine = database.open_database(
        database.database_url(settings.data_dir, settings.database_url), _log_upgrade
    )
    metrics = Metrics()
    storage = _storage(settings, engine, Folder(folder), metrics)
    quotas = Quotas(engine)
    making = Threads("making of answers", settings.encode_threads, FINISH_LIMIT_S)
    tracing = open_tracing(settings.otlp_endpoint)
    pictures = Pictures(
        engine,
        storage,
        share_signer(engine, signer),
        settings.url_ttl_s,
        settings.gallery_size,
        settings.max_starred,
        settings.max_stored_bytes,
    )
    return Context(
        settings=settings,
        engine=engine,
        registry=Registry(engine, WorkerSettings.of(settings, worker), metrics),
        adapters=AdapterRegistry(engine, settings.data_dir / "adapters"),
        admission=Admission(settings, metrics, quotas, making, tracing, pictures.listed),
        signer=signer,
        pictures=pictures,
        metrics=metrics,
        quotas=quotas,
        fetcher=PictureFetcher(settings.max_image_body_bytes) if settings.allow_image_urls else None,
        tracing=tracing,
    )


def _telemetry(tracing: Tracing | None) -> TelemetryConfig:
    """FastAPI makes the span of an HTTP request for pictures, and nothing else of what it could."""
    return {
        "tracing": tracing is not None,
        "tracer_provider": None if tracing is None else tracing.provider,
        "exclude": lambda scope: scope["path"] not in PICTURE_PATHS,
        "operation_spans": False,
        "metrics": False,
        "logs": False,
        "auto_configure": False,
    }


def _storage(settings: Settings, engine: sa.Engine, folder: Folder, metrics: Metrics) -> Storage:
    if settings.storage is None:
        return folder
    try:
        from mezzotint.server.store.aws import open_bucket
        from mezzotint.server.store.objects import ObjectStorage
    except ImportError:
        raise ConfigError(
            "storage: object storage needs obstore; pip install 'mezzotint[s3]'", code="not_installed"
        ) from None
    bucket = open_bucket(settings.storage, settings.storage_endpoint, settings.storage_timeout_s)
    storage = ObjectStorage(engine, bucket, folder, settings.storage_held_bytes, metrics.held_bytes.set)
    storage.check()
    return storage


def _log_upgrade(done: Upgrade) -> None:
    log.info("database upgraded", before=done.before, after=done.after, backup=str(done.backup))


def _lifespan(
    context: Context,
) -> Callable[[FastAPI], contextlib.AbstractAsyncContextManager[None]]:
    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        context.registry.start()
        upkeep = [asyncio.create_task(_clean(context)), asyncio.create_task(_write_held(context))]
        if context.quotas.shared:
            upkeep.append(asyncio.create_task(_count_use(context)))
        on_listening = getattr(app.state, "on_listening", None)
        gateways: Gateways | None = app.state.gateways
        others = contextlib.AsyncExitStack()
        url: str | None = getattr(app.state, "gateway_url", None)  # `serve` sets it
        if gateways is not None and url is not None:
            await others.enter_async_context(gateways.living(url))
        if on_listening:
            on_listening()
        try:
            yield
        finally:
            for task in upkeep:
                task.cancel()
            await context.admission.drained(getattr(app.state, "drain_until", 0.0))
            _drop_requests(context)
            await others.aclose()
            await context.admission.wait_for_answers()
            await context.registry.stop()
            for leave in (context.pictures.enter, context.quotas.store):
                with contextlib.suppress(SQLAlchemyError, UnavailableError):
                    await DATABASE.run(leave)
            context.engine.dispose()
            if context.tracing is not None:
                await context.tracing.close()

    return lifespan


def _drop_requests(context: Context) -> None:
    dropped = context.admission.end_all()
    if dropped:
        log.warning("requests dropped, the server stops", num=len(dropped), ids=dropped[:20])


async def _clean(context: Context) -> None:
    """Removes expired pictures and writes down what was used, now and then."""
    while True:
        try:
            gone, left = await UPKEEP.run(context.pictures.clean)
            context.metrics.stored_bytes.set(left)
            context.admission.sweep()
            await DATABASE.run(context.quotas.store)
            if gone:
                log.info("expired pictures removed", num=gone)
        except (OSError, SQLAlchemyError, UnavailableError) as error:
            log.error("cleaning up failed; the next try is in a minute", error=str(error))
        await asyncio.sleep(CLEAN_EVERY_S)


async def _count_use(context: Context) -> None:
    """Writes down what was used, for the other servers on the database."""
    while True:
        await asyncio.sleep(COUNT_EVERY_S)
        try:
            await DATABASE.run(context.quotas.store)
        except (SQLAlchemyError, UnavailableError) as error:
            log.error("use cannot be written down; the next try is soon", error=str(error))


async def _write_held(context: Context) -> None:
    """Writes pictures that wait on disk to the storage as soon as it answers."""
    while True:
        try:
            await UPKEEP.run(context.pictures.storage.write_held)
        except OSError as error:
            log.error("held pictures cannot be read; the next try is soon", error=str(error))
        await asyncio.sleep(WRITE_HELD_EVERY_S)


def _listen(settings: Settings) -> socket.socket:
    """The listening socket; bound first, so that a taken port is a sentence and port 0 becomes known."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # Named as TCP, or asyncio would not set TCP_NODELAY and each answer's second packet would wait 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Connections inherit it. Only Linux has it, and uvicorn has no limit of its own.
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        milliseconds = round(settings.send_timeout_s * 1000)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(BACKLOG)  # from now on a connection waits instead of being refused
    except (OSError, OverflowError, ValueError, TypeError) as error:  # the last two: no name of a host at all
        listener.close()
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"host/port: cannot listen on {settings.host}:{settings.port} ({reason}); give another --port"
        ) from None
    return listener


def _reachable(host: str) -> str:
    """The address at which other machines reach a server that listens on `host`."""
    if host in ("0.0.0.0", "::"):
        with contextlib.suppress(OSError):
            host = socket.gethostbyname(socket.gethostname())
    return f"[{host}]" if ":" in host else host


def _count(metrics: Metrics) -> Callable[[Scope, int], None]:
    def count(scope: Scope, status: int) -> None:
        route = scope.get("route")
        metrics.http.labels(getattr(route, "path", UNMATCHED), str(status)).inc()

    return count


def _count_error(metrics: Metrics) -> Callable[[MezzotintError], None]:
    return lambda error: metrics.error_answers.labels(error.code).inc()


def _refusal(request: Request, error: MezzotintError) -> Response:
    _count_error(request.app.state.context.metrics)(error)
    request_id = getattr(request.state, "request_id", None)
    if error.status == InvalidRequestError.status and request.url.path.startswith(openai.PREFIX):
        return error_response(error, request_id, openai.REFUSAL_STATUS)
    return error_response(error, request_id)


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, MezzotintError)
    return _refusal(request, error)


async def _answer_http(request: Request, error: Exception) -> Response:
    """What the framework itself refuses, in the one body."""
    assert isinstance(error, HTTPException)
    known: dict[int, Callable[[], MezzotintError]] = {
        404: lambda: NotFoundError("there is nothing at this address; see /docs for what there is"),
        405: lambda: MethodNotAllowedError(
            f"this address does not take {request.method}; see /docs for what it takes"
        ),
    }
    make = known.get(error.status_code, lambda: InvalidRequestError(str(error.detail)))
    response = _refusal(request, make())
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


async def _answer_database(request: Request, error: Exception) -> Response:
    assert isinstance(error, SQLAlchemyError)
    if isinstance(error, DataError):
        text = "a text in the request has characters that the database cannot keep (NUL); leave them out"
        return _refusal(request, InvalidRequestError(text))
    log.error("database does not answer", error=str(error).splitlines()[0])
    return _refusal(request, database.unavailable(error))


async def _answer_validation(request: Request, error: Exception) -> Response:
    """A path, query or header value that its type refuses."""
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = error.errors()[0]
    name = str(first["loc"][-1]) if first["loc"] else None
    code = {"missing": "missing_field", "extra_forbidden": "unknown_field", "json_invalid": "invalid_json"}
    refused = InvalidRequestError(f"{name}: {first['msg']}", code=code.get(first["type"]), param=name)
    return _refusal(request, refused)
