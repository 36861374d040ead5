"""Prometheus metrics in a registry of their own; labels are endpoints, routes, codes and a few shapes."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mezzotint.messages import Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
MAX_SHAPES = 32
"""Most sizes that get a label of their own per endpoint; the rest share `other`."""


class Metrics:
    """Everything the server counts; one object per app."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry, endpoint = self.registry, ["endpoint"]
        self.http = Counter(
            "mezzotint_http_requests_total",
            "HTTP answers by route and status.",
            ["route", "status"],
            registry=registry,
        )
        self.requests = Counter(
            "mezzotint_requests_total",
            "Generation requests by how they ended: done, failed or cancelled.",
            ["endpoint", "outcome"],
            registry=registry,
        )
        self.failures = Counter(
            "mezzotint_failures_total",
            "Requests refused or failed, by error code.",
            ["endpoint", "code"],
            registry=registry,
        )
        self.error_answers = Counter(
            "mezzotint_error_answers_total", "Error answers by code.", ["code"], registry=registry
        )
        self.joined = Counter(
            "mezzotint_joined_total",
            "Requests that joined one already running or done.",
            endpoint,
            registry=registry,
        )
        self.queue_seconds = Histogram(
            "mezzotint_queue_seconds",
            "Seconds a job waited for a worker.",
            endpoint,
            buckets=_SECONDS,
            registry=registry,
        )
        self.generate_seconds = Histogram(
            "mezzotint_generate_seconds", "Seconds a job ran.", endpoint, buckets=_SECONDS, registry=registry
        )
        self.queue_depth = Gauge(
            "mezzotint_queue_jobs", "Jobs waiting for a worker.", endpoint, registry=registry
        )
        self.running = Gauge("mezzotint_running_jobs", "Jobs in workers.", endpoint, registry=registry)
        self.backlog = Gauge(
            "mezzotint_backlog_seconds",
            "Work waiting or running, in lone step-seconds.",
            endpoint,
            registry=registry,
        )
        self.speed = Gauge(
            "mezzotint_speed_ratio", "Lone step-seconds of work done per second.", endpoint, registry=registry
        )
        self.ready_replicas = Gauge(
            "mezzotint_ready_replicas", "Workers ready for jobs.", endpoint, registry=registry
        )
        self.wanted_replicas = Gauge(
            "mezzotint_wanted_replicas", "Workers that there should be.", endpoint, registry=registry
        )
        self.node_replicas = Gauge(
            "mezzotint_node_replicas",
            "Workers on other machines, by the address of the machine.",
            ["endpoint", "node"],
            registry=registry,
        )
        self.scalings = Counter(
            "mezzotint_scalings_total",
            "Changes of the number of workers by the load.",
            ["endpoint", "direction"],
            registry=registry,
        )
        self.worker_exits = Counter(
            "mezzotint_worker_exits_total",
            "Workers that ended, for whatever reason.",
            endpoint,
            registry=registry,
        )
        self.load_seconds = Gauge(
            "mezzotint_load_seconds", "Seconds the last load of the model took.", endpoint, registry=registry
        )
        self.steps = Counter(
            "mezzotint_steps_total", "Denoising steps run, rows counted.", endpoint, registry=registry
        )
        self.forwards = Counter("mezzotint_forwards_total", "Denoiser forwards.", endpoint, registry=registry)
        self.padded_rows = Counter(
            "mezzotint_padded_rows_total", "Rows of forwards that were padding.", endpoint, registry=registry
        )
        self.busy_seconds = Counter(
            "mezzotint_worker_busy_seconds_total",
            "Seconds workers spent computing.",
            endpoint,
            registry=registry,
        )
        self.step_seconds = Gauge(
            "mezzotint_step_seconds",
            "Measured seconds per forward.",
            ["endpoint", "shape"],
            registry=registry,
        )
        self.adapters_resident = Gauge(
            "mezzotint_adapters_resident", "Adapters in memory.", endpoint, registry=registry
        )
        self.adapter_hits = Counter(
            "mezzotint_adapter_hits_total", "Jobs whose adapter was in memory.", endpoint, registry=registry
        )
        self.adapter_loads = Counter(
            "mezzotint_adapter_loads_total", "Adapters loaded.", endpoint, registry=registry
        )
        self.adapter_evictions = Counter(
            "mezzotint_adapter_evictions_total",
            "Adapters dropped to make room for others.",
            endpoint,
            registry=registry,
        )
        self.adapter_bytes = Gauge(
            "mezzotint_adapter_bytes", "Memory that adapters take in workers.", endpoint, registry=registry
        )
        self.text_hits = Counter(
            "mezzotint_text_hits_total",
            "Calls of text encoders whose result was remembered.",
            endpoint,
            registry=registry,
        )
        self.text_misses = Counter(
            "mezzotint_text_misses_total",
            "Calls of text encoders that could be remembered and ran.",
            endpoint,
            registry=registry,
        )
        self.text_bytes = Gauge(
            "mezzotint_text_bytes",
            "Memory of the worker that reported last for remembered results of text encoders.",
            endpoint,
            registry=registry,
        )
        self.stored_bytes = Gauge(
            "mezzotint_stored_bytes", "Bytes of pictures in storage.", registry=registry
        )
        self.stored = Counter(
            "mezzotint_picture_bytes_written_total", "Bytes of pictures ever stored.", registry=registry
        )
        self.held_bytes = Gauge(
            "mezzotint_held_bytes", "Bytes of pictures that wait for object storage.", registry=registry
        )
        self._shapes: dict[str, set[str]] = {}

    def stats(self, endpoint_id: str, stats: Stats) -> None:
        """Books what a worker reported since its last report."""
        self.steps.labels(endpoint_id).inc(stats.rows)
        self.forwards.labels(endpoint_id).inc(stats.forwards)
        self.padded_rows.labels(endpoint_id).inc(stats.padded_rows)
        self.busy_seconds.labels(endpoint_id).inc(stats.busy_s)
        self.adapters_resident.labels(endpoint_id).set(stats.adapters_resident)
        self.adapter_hits.labels(endpoint_id).inc(stats.adapter_hits)
        self.adapter_loads.labels(endpoint_id).inc(stats.adapter_loads)
        self.adapter_evictions.labels(endpoint_id).inc(stats.adapter_evictions)
        self.adapter_bytes.labels(endpoint_id).set(stats.adapter_bytes)
        self.text_hits.labels(endpoint_id).inc(stats.text_hits)
        self.text_misses.labels(endpoint_id).inc(stats.text_misses)
        self.text_bytes.labels(endpoint_id).set(stats.text_bytes)
        known = self._shapes.setdefault(endpoint_id, set())
        for shape, seconds in stats.step_s.items():
            if len(known) < MAX_SHAPES:
                known.add(shape)
            self.step_seconds.labels(endpoint_id, shape if shape in known else "other").set(seconds)

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)
