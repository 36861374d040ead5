"""One trace per request with OpenTelemetry, from its HTTP request to its stored pictures.

FastAPI makes the span of the HTTP request and takes the `traceparent` of its sender. Everything below it is
made here, in the server: workers report how long their phases took, and know nothing of traces. The rest of
the server holds None instead of these objects where tracing is off or a request is not sampled.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import structlog
from opentelemetry import context as contexts
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, StatusCode, Tracer

import mezzotint
from mezzotint.errors import ConfigError, MezzotintError
from mezzotint.messages import Done
from mezzotint.server.threads import Threads

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"
FLUSH_S = 3.0
"""How long the end of the server waits for a collector."""

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
log = structlog.get_logger(__name__)


def open_tracing(endpoint: str | None) -> Tracing | None:
    """Sends traces to the collector at `endpoint`, or where OpenTelemetry's variables say; None: to nobody.

    ConfigError if `endpoint` is given and the extra `otel` is not installed. Variables alone never stop the
    start, because they are often meant for all programs of a machine.
    """
    if _variable("OTEL_SDK_DISABLED") == "true" or (endpoint is None and not _asked_by_variables()):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        text = "traces need OpenTelemetry's SDK; pip install 'mezzotint[server,otel]'"
        if endpoint is not None:
            raise ConfigError(f"otlp_endpoint: {text}", code="not_installed") from None
        log.warning("no traces are sent", reason=text)
        return None
    own = Resource.create({"service.name": "mezzotint", "service.version": mezzotint.__version__})
    provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
    address = None if endpoint is None else f"{endpoint.rstrip('/')}/v1/traces"
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=address)))
    return Tracing(provider)


def _variable(*names: str) -> str:
    """The first of these that is set, in lower case."""
    return next((os.environ[name].strip().lower() for name in names if os.environ.get(name)), "")


def _asked_by_variables() -> bool:
    exporter, protocol = _variable("OTEL_TRACES_EXPORTER"), _variable(*PROTOCOLS) or PROTOCOL
    if exporter == "none" or not (exporter or _variable(*ENDPOINTS)):
        return False
    if exporter in ("", "otlp") and protocol == PROTOCOL:
        return True
    log.warning("no traces are sent", reason=f"only OTLP over {PROTOCOL} is known, not {exporter} {protocol}")
    return False


class Tracing:
    """The traces of one server."""

    def __init__(self, provider: TracerProvider) -> None:
        self.provider = provider
        self._tracer = provider.get_tracer("mezzotint", mezzotint.__version__)
        self._ending = Threads("collector of traces", 1, FLUSH_S)

    def begin(self, request_id: str, endpoint_id: str, num_images: int) -> RequestTrace | None:
        """The span of a request that was let in, below the current one; None if it is not sampled."""
        attributes: dict[str, str | int] = {
            "mezzotint.request_id": request_id,
            "mezzotint.endpoint": endpoint_id,
            "mezzotint.num_images": num_images,
        }
        span = self._tracer.start_span("request", attributes=attributes)
        return RequestTrace(self._tracer, span) if span.is_recording() else None

    def joined(self, request_id: str, earlier: RequestTrace | None) -> None:
        """The current HTTP request waits for an earlier request, which has a trace of its own."""
        current = trace.get_current_span()
        current.set_attribute("mezzotint.joined", request_id)
        if earlier is not None:
            current.add_link(earlier.span.get_span_context())

    def headers(self) -> dict[str, str]:
        """What hands the current trace on to another server, such as `traceparent`."""
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        return carrier

    @contextlib.contextmanager
    def continued(self, headers: Mapping[str, str]) -> Iterator[None]:
        """Goes on with the trace that `headers` name."""
        token = contexts.attach(propagate.extract(headers, Context()))
        try:
            yield
        finally:
            contexts.detach(token)

    async def close(self) -> None:
        """Sends what has not been sent, for FLUSH_S at most."""
        with contextlib.suppress(MezzotintError):
            await self._ending.run(self.provider.shutdown)


class RequestTrace:
    """The span of one request, which outlives its connection where nobody waits, and those below it."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self.span = span
        self._tracer = tracer
        self._context = trace.set_span_in_context(span, Context())

    def job(self, job_id: str) -> JobTrace:
        """The spans of one image, which waits from now on."""
        return JobTrace(self._tracer, self._context, job_id)

    def encoding(self, work: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        """The function that makes the answer, with a span around it."""
        return self._within("encode", work, self._context)

    def storing(self, work: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        """A function that stores a picture while the answer is made, with a span around it."""
        return self._within("store", work, None)

    def end(self, status: str, error: MezzotintError | None) -> None:
        self.span.set_attribute("mezzotint.status", status)
        _end(self.span, error)

    def _within(
        self, name: str, work: Callable[Parameters, Result], context: Context | None
    ) -> Callable[Parameters, Result]:
        @functools.wraps(work)
        def spanned(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            with self._tracer.start_as_current_span(name, context):
                return work(*args, **kwargs)

        return spanned


class JobTrace:
    """The spans of one image: it waits in the queue, then a worker has it; after a death both come again."""

    def __init__(self, tracer: Tracer, context: Context, job_id: str) -> None:
        self._tracer = tracer
        self._context = context
        self._job_id = job_id
        self._attempt = 0
        self._began = 0
        """When the worker got it, in nanoseconds of the clock; `handed_over` sets it."""
        self._span = self._wait()

    def handed_over(self, replica: str, node: str | None, pid: int | None) -> None:
        """A worker has it now. `node` is None on this machine."""
        self._span.end()
        self._attempt += 1
        self._began = time.time_ns()
        attributes: dict[str, str | int] = {
            "mezzotint.job_id": self._job_id,
            "mezzotint.attempt": self._attempt,
            "mezzotint.replica": replica,
        }
        if node is not None:
            attributes["mezzotint.node"] = node
        if pid is not None:
            attributes["mezzotint.worker_pid"] = pid
        self._span = self._start("generate", self._context, attributes)

    def came_back(self, step: int, crashed: bool) -> None:
        """Its worker has ended, and it waits again."""
        self._span.set_attribute("mezzotint.steps_done", step)
        if crashed:
            self._span.set_status(StatusCode.ERROR, "the worker died")
        self._span.end()
        self._span = self._wait()

    def end(self, outcome: Done | MezzotintError) -> None:
        """The image is done, or it never will be."""
        if isinstance(outcome, Done):
            self._tell_phases(outcome)
            self._span.end()
        else:
            _end(self._span, outcome)

    def _tell_phases(self, done: Done) -> None:
        """Spans of what the worker did, by its own stopwatch and, for the end, by the clock of the server."""
        end = time.time_ns()
        start = max(self._began, end - _nanoseconds(done.generate_s))
        if not done.steps_s:
            return
        prepared = min(end, start + _nanoseconds(done.prepare_s))
        denoised = min(end, prepared + _nanoseconds(done.steps_s))
        within = trace.set_span_in_context(self._span, Context())
        for name, since, until in (
            ("text encoding", start, prepared),
            ("steps", prepared, denoised),
            ("decode", denoised, end),
        ):
            self._tracer.start_span(name, within, start_time=since).end(until)

    def _wait(self) -> Span:
        return self._start("queue", self._context, {"mezzotint.job_id": self._job_id})

    def _start(self, name: str, context: Context, attributes: Mapping[str, str | int]) -> Span:
        return self._tracer.start_span(name, context, attributes=attributes)


def _end(span: Span, error: MezzotintError | None) -> None:
    if error is not None:
        span.set_attribute("error.type", error.code)
        span.set_status(StatusCode.ERROR)
    span.end()


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
