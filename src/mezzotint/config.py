"""The settings table: every setting's name, type, default and help, in one place.

File (`mezzotint.toml`), environment (`MEZZOTINT_<NAME>`), flags and the documentation page all come from
these classes. Precedence: flag, environment, file, default. An unknown name or an unparsable value stops the
start with a sentence that names where it stands and what would be right.
"""

from __future__ import annotations

import ipaddress
import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo

from mezzotint.errors import ConfigError, echo, nearest
from mezzotint.spec import (
    ID_PATTERN,
    Bytes,
    ControlNetSettings,
    EngineSettings,
    RayPlace,
    Seconds,
    Table,
    between,
    refuse_twice,
)

BUILT_IN_MODEL = "emoji"
ENVIRONMENT_PREFIX = "MEZZOTINT_"
CONFIG_FILE = "mezzotint.toml"
MAX_PATH = 4096
"""Most characters of a path or a repository's name."""
NOT_SETTINGS = frozenset({"config", "api_key", "url", "base_url"})
"""Names under ENVIRONMENT_PREFIX that the command line and the SDK read themselves."""


class AdapterSettings(Table):
    """One LoRA adapter of an endpoint, as written in the configuration file."""

    route: str = Field(
        pattern=f"^{ID_PATTERN}$", description="The name after the colon: `ENDPOINT_ID:ROUTE`."
    )
    source: str = Field(
        min_length=1,
        max_length=MAX_PATH,
        description="A safetensors file, a folder, or a Hub repository (`owner/name[:file][@revision]`).",
    )
    scale: Annotated[float, between("adapter scale")] = Field(
        1.0, description="Strength of the adapter; 1 is as trained."
    )


class _Hosted(Table):
    id: str = Field(pattern=f"^{ID_PATTERN}$", description="What requests name in `model`.")
    model: str = Field(
        BUILT_IN_MODEL,
        min_length=1,
        max_length=MAX_PATH,
        description="Built-in name (`emoji`), diffusers folder, Hub repository id, or safetensors file.",
    )


class EndpointSettings(EngineSettings, _Hosted):
    """One dedicated endpoint: a model and how to run it."""

    max_pixels: int | None = Field(
        None,
        ge=64,
        description="Largest width x height of a request; four times the default size when unset.",
    )
    embed_parameters: bool = Field(
        True, description="Write the generation parameters into PNG and JPEG files."
    )
    deadline_s: float = Field(
        600.0, ge=0.1, description="A request not done after this long is ended with 504."
    )
    max_queue_s: Seconds = Field(
        300.0, description="Estimated seconds of queued work above which requests get 429."
    )
    replicas: int = Field(
        1,
        ge=1,
        le=64,
        description="Workers that host this endpoint: the fewest and the most, where those are unset.",
    )
    min_replicas: int | None = Field(
        None,
        ge=0,
        le=64,
        description="Fewest workers. With 0 it sleeps after `scale_down_delay_s` without a request (or "
        "`idle_sleep_s`, where that is set), and the next request wakes it.",
    )
    max_replicas: int | None = Field(
        None,
        ge=1,
        le=64,
        validate_default=True,
        description="Most workers; between the two, the waiting work decides.",
    )
    target_backlog_s: float = Field(
        5.0, gt=0, description="Outstanding work per worker, in seconds, above which another is started."
    )
    scale_up_delay_s: Seconds = Field(
        10.0, description="How long the work must be above the target before workers are added."
    )
    scale_down_delay_s: Seconds = Field(
        300.0, description="How long fewer workers must be enough before some are taken away."
    )
    idle_sleep_s: Seconds = Field(
        0.0,
        description="Sleep (free the memory) after this long idle; 0 is never, but for `min_replicas = 0`.",
    )
    aliases: tuple[Annotated[str, Field(pattern=f"^{ID_PATTERN}$")], ...] = Field(
        (), description="Other names that requests may use, such as `gpt-image-1` or `dall-e-3`."
    )
    ray: RayPlace = Field(
        RayPlace(),
        description="What each worker needs on Ray (`num_cpus`, `num_gpus`, `memory` in bytes, `resources` "
        "by name, `accelerator_type`), and whether workers are `packed` or `spread` over nodes "
        "(`placement`).",
    )
    adapters: tuple[AdapterSettings, ...] = Field((), description="Adapters registered at the start.")

    @property
    def engine(self) -> EngineSettings:
        """What a worker of this endpoint is told."""
        return EngineSettings(**{name: getattr(self, name) for name in EngineSettings.model_fields})

    @property
    def num_replicas(self) -> tuple[int, int]:
        """The fewest and the most workers while it is awake."""
        least, most = self.min_replicas, self.max_replicas
        return max(1, self.replicas if least is None else least), self.replicas if most is None else most

    @property
    def sleep_after_s(self) -> float | None:
        """Seconds without a request after which it sleeps; None is never."""
        if self.idle_sleep_s:
            return self.idle_sleep_s
        return self.scale_down_delay_s if self.min_replicas == 0 else None

    @field_validator("max_replicas")
    @classmethod
    def _most_is_not_below_least(cls, most: int | None, info: ValidationInfo) -> int | None:
        replicas, least = info.data.get("replicas", 1), info.data.get("min_replicas")
        low, high = replicas if least is None else least, replicas if most is None else most
        if low > high:
            names = ["min_replicas" if least is not None else "replicas (min_replicas is unset)"]
            names += ["max_replicas" if most is not None else "replicas (max_replicas is unset)"]
            raise ValueError(
                f"{names[0]} is {low}, more than {names[1]}, which is {high}; raise max_replicas"
            )
        return most

    @field_validator("idle_sleep_s")
    @classmethod
    def _sleeps_only_from_zero(cls, idle_sleep_s: float, info: ValidationInfo) -> float:
        least = info.data.get("min_replicas")
        if idle_sleep_s and least:
            raise ValueError(f"must be 0 where min_replicas is {least}; set min_replicas = 0 to let it sleep")
        return idle_sleep_s

    @field_validator("adapters")
    @classmethod
    def _routes_are_unique(cls, adapters: tuple[AdapterSettings, ...]) -> tuple[AdapterSettings, ...]:
        refuse_twice("adapter route", [adapter.route for adapter in adapters])
        return adapters


class Settings(Table):
    """The server's settings."""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    data_dir: Path = Field(Path("mezzotint-data"), description="Keys, database and pictures live here.")
    database_url: str | None = Field(
        None, description="SQLAlchemy URL; SQLite in the data folder when unset."
    )
    gateway_url: str | None = Field(
        None,
        pattern=r"^https?://[^/\s@]+$",
        description="Where the other servers on the same Postgres database reach this one; the address that "
        "it listens on when unset, or this machine's own where that is every address.",
    )
    storage: str | None = Field(
        None,
        description="Where pictures are kept: `s3://BUCKET` or `s3://BUCKET/PREFIX`; the data folder when "
        "unset. Credentials come from the environment.",
    )
    storage_endpoint: str | None = Field(
        None,
        pattern=r"^https?://[^/\s@]+/?$",
        description="Address of an S3-compatible store, such as `http://127.0.0.1:9000`; AWS's when unset.",
    )
    storage_timeout_s: Seconds = Field(
        10.0, description="How long one request to the store may take; a picture's upload is one."
    )
    storage_held_bytes: Bytes = Field(
        2**30,
        description="Most bytes of pictures that wait in the data folder while the store does not answer.",
    )
    public_url: str | None = Field(
        None,
        pattern=r"^https?://[^/\s]+(/[^\s]*)?$",
        description="Base of the picture URLs behind a proxy; the request's own host when unset.",
    )
    auth: bool = Field(True, description="Ask for API keys. May be false only on a loopback address.")
    url_ttl_s: Seconds = Field(3600.0, description="Life of a picture URL.")
    max_stored_bytes: Bytes = Field(
        20 * 2**30, description="Most that the stored pictures of one key may take on disk."
    )
    gallery_size: int = Field(
        100,
        ge=0,
        description="Newest stored pictures of each key that outlive their URLs, for the playground's "
        "gallery; 0 keeps none.",
    )
    max_starred: int = Field(
        1000, ge=0, description="Most stored pictures that each key may star; they are kept besides."
    )
    max_body_bytes: Bytes = Field(2**20, description="Largest request body.")
    max_image_body_bytes: Bytes = Field(
        32 * 2**20, description="Largest request body on the routes where it holds pictures."
    )
    allow_image_urls: bool = Field(
        False,
        description="Fetch input pictures that a request names by http(s) URL, from public addresses only.",
    )
    body_timeout_s: float = Field(
        30.0,
        ge=0.1,
        description="A body that has not arrived after this long is refused (408). A connection without "
        "a request ends after as long.",
    )
    attach_window_s: Seconds = Field(
        10.0, description="How long the job of a vanished client waits for the same request to come back."
    )
    idempotency_ttl_s: Seconds = Field(
        600.0, description="How long an Idempotency-Key finds its finished answer."
    )
    max_watchers: int = Field(
        256,
        ge=1,
        description="Most connections of one key that follow its requests: readers of events and results, "
        "and those that wait for a request that another connection waits for already.",
    )
    worker_start: Literal["forkserver", "spawn"] = Field(
        "forkserver", description="How worker processes start; forkserver restarts in hundredths of a second."
    )
    ray: str | None = Field(
        None,
        min_length=1,
        description="Address of a Ray cluster that runs the workers: `HOST:PORT`, or `auto` for the one that "
        "this machine belongs to; unset, they are processes of this machine.",
    )
    heartbeat_s: float = Field(
        30.0,
        ge=0.1,
        description="A worker that has said nothing for this long while it should is killed and restarted, "
        "and so is one that is busy with one forward for 20 times as long.",
    )
    load_timeout_s: float = Field(
        1800.0, ge=0.05, description="A model that has not loaded after this long has failed."
    )
    max_restarts: int = Field(
        5,
        ge=0,
        description="Restarts in a row, without a picture between them, before an endpoint is failed.",
    )
    send_timeout_s: float = Field(
        60.0, ge=1, le=3600, description="A client that takes no byte of its answer for this long is dropped."
    )
    drain_s: Seconds = Field(30.0, description="How long SIGTERM waits for running requests.")
    encode_threads: int = Field(2, ge=1, le=64, description="Threads that turn pixels into PNG and JPEG.")
    foreign_values: Literal["nearest", "refuse"] = Field(
        "nearest",
        description="What becomes of a size or a number of steps that an endpoint cannot do, on OpenAI's and "
        "AUTOMATIC1111's routes: the nearest that it can, with a warning, or a refusal.",
    )
    cors_origins: tuple[str, ...] = Field(
        (), description="Origins that browsers may call from; none by default."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe log line shown."
    )
    log_format: Literal["console", "json"] = Field("console", description="Form of the log lines.")
    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://[^\s@]+$",
        description="Address of an OpenTelemetry collector (OTLP over HTTP), such as "
        "`http://127.0.0.1:4318`, that gets a trace of each request for pictures. OpenTelemetry's own "
        "variables are read, too; nothing is sent when neither is set.",
    )
    endpoints: tuple[EndpointSettings, ...] = Field(
        (EndpointSettings(id=BUILT_IN_MODEL, model=BUILT_IN_MODEL),),
        description="The endpoints; the built-in model as `emoji` when none is named.",
    )

    @field_validator("data_dir")
    @classmethod
    def _home_is_expanded(cls, folder: Path) -> Path:
        return folder.expanduser()

    @field_validator("public_url")
    @classmethod
    def _public_url_is_one(cls, url: str | None) -> str | None:
        try:
            parts = urlsplit(url or "")
            found = url is None or (parts.hostname and (parts.port is None or parts.port))
        except ValueError:
            found = False
        if not found:
            raise ValueError("is no URL of a server; write https://HOST or https://HOST:PORT/PATH")
        return url

    @field_validator("endpoints")
    @classmethod
    def _ids_are_unique(cls, endpoints: tuple[EndpointSettings, ...]) -> tuple[EndpointSettings, ...]:
        refuse_twice("endpoint id", [name for each in endpoints for name in (each.id, *each.aliases)])
        return endpoints

    @field_validator("auth")
    @classmethod
    def _open_only_on_loopback(cls, auth: bool, info: ValidationInfo) -> bool:
        host = info.data.get("host", "127.0.0.1")
        if not auth and not is_loopback(host):
            raise ValueError(
                f"may be off only on a loopback address, and host is {host}; use 127.0.0.1 or leave auth on"
            )
        return auth


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load_settings(
    file: Path | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Settings:
    """The settings in force; ConfigError names the file, variable or flag and the key that stop the start.

    The file has `[server]` (the fields of Settings) and any number of `[[endpoints]]` (EndpointSettings),
    each with `[[endpoints.adapters]]` and `[[endpoints.controlnets]]`. `file` None reads `mezzotint.toml` in
    the working folder if there is one. A flag whose value is None was not given.
    """
    values: dict[str, Any] = {}
    where: dict[str, str] = {}
    if file is None and Path(CONFIG_FILE).is_file():
        file = Path(CONFIG_FILE)
    if file is not None:
        for name, value in _read_file(file).items():
            values[name], where[name] = value, str(file)
    for name, value in _read_environment(os.environ if environment is None else environment):
        values[name], where[name] = value, f"environment variable {ENVIRONMENT_PREFIX}{name.upper()}"
    for name, value in (flags or {}).items():
        if value is not None:
            values[name], where[name] = value, _flag(name, value)
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_sentence(error, where, values)) from None


def _flag(name: str, value: object) -> str:
    if name == "endpoints":
        return "flags --model and --id"
    return f"flag --{'no-' if value is False else ''}{name.replace('_', '-')}"


def as_toml(settings: Settings, *, comments: bool = True) -> str:
    """`settings` as a configuration file that loads to the same settings; unset ones stand as comments."""
    lines = ["[server]", *_toml_lines(settings, comments)]
    for endpoint in settings.endpoints:
        lines += ["", "[[endpoints]]", *_toml_lines(endpoint, comments)]
        for name in ("adapters", "controlnets"):
            for table in getattr(endpoint, name):
                lines += ["", f"[[endpoints.{name}]]", *_toml_lines(table, comments)]
        comments = False  # once is enough
    return "\n".join(lines) + "\n"


def default_text(field: FieldInfo) -> str:
    """A field's default as the file would have it; `unset` for None, `required` where there is none."""
    if field.is_required():
        return "required"
    return "unset" if field.default is None else _toml_value(field.default)


def _toml_lines(table: Table, comments: bool) -> Iterator[str]:
    for name, field in type(table).model_fields.items():
        if name in _TABLES:  # tables of their own
            continue
        if comments:
            yield f"# {field.description}"
        value = getattr(table, name)
        yield f"# {name} =" if value is None else f"{name} = {_toml_value(value)}"


def _toml_value(value: object) -> str:
    if isinstance(value, Table):
        value = value.model_dump(exclude_none=True)
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, dict):
        pairs = ", ".join(f"{json.dumps(key)} = {_toml_value(entry)}" for key, entry in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    # JSON's strings, numbers and booleans are TOML's, but for U+007F.
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False).replace(
        "\x7f", "\\u007f"
    )


def _read_file(file: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be read ({error.strerror}); give a readable file with --config"
        ) from None
    except ValueError as error:  # no TOML, no UTF-8, or a number of thousands of digits
        raise ConfigError(f"{file}: not valid TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{file}: not valid TOML: it is nested too deeply") from None
    unknown = sorted(set(table) - {"server", "endpoints"})
    if unknown:
        raise ConfigError(f"{file}: unknown table [{unknown[0]}]; known are [server] and [[endpoints]]")
    server = table.get("server", {})
    if not isinstance(server, dict):
        raise ConfigError(f"{file}: server must be a table, written [server]")
    if "endpoints" in server:
        raise ConfigError(f"{file}: endpoints do not belong in [server]; write each as [[endpoints]]")
    values = dict(server)
    if "endpoints" in table:
        values["endpoints"] = table["endpoints"]
    try:  # strictly: "8000" in quotes is no port, and a bad value is told even where a flag overrides it
        Settings.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(_sentence(error, dict.fromkeys(values, str(file)), values)) from None
    return values


def _read_environment(environment: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    for variable, text in environment.items():
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if not variable.startswith(ENVIRONMENT_PREFIX) or name in NOT_SETTINGS:
            continue
        known = [name for name in Settings.model_fields if name != "endpoints"]
        if name not in known:
            names = [f"{ENVIRONMENT_PREFIX}{field.upper()}" for field in known]
            raise ConfigError(
                f"environment variable {variable} is not a setting; {_nearest(variable, names)}"
            )
        if text:  # an empty variable is an unset one
            yield name, [part.strip() for part in text.split(",")] if name == "cors_origins" else text


def _nearest(name: str, known: list[str]) -> str:
    hint = nearest(name, known)
    return f"did you mean {hint}?" if hint else f"known are {', '.join(known)}"


def _sentence(error: ValidationError, where: Mapping[str, str], values: Mapping[str, Any]) -> str:
    """The first fault of `error` in one sentence: where it stands, the key, what is wrong, what is right."""
    first = error.errors(include_url=False)[0]
    path = list(first["loc"])
    place = where.get(str(path[0]), "settings")
    table, key = _locate(path, values)
    if first["type"] == "extra_forbidden":
        return f"{place}: unknown key {key}; {_nearest(str(path[-1]), list(table.model_fields))}"
    if first["type"] == "missing":
        return f"{place}: {key} is missing; {table.model_fields[str(path[-1])].description}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {key}: {message[0].lower()}{message[1:]} (got {echo(first['input'])})"


def _locate(path: list[str | int], values: Mapping[str, Any]) -> tuple[type[Table], str]:
    """The table that a faulty key belongs to, and the key as people say it: `endpoints.emoji.dtype`."""
    table: type[Table] = Settings
    here: Any = values
    words: list[str] = []
    for part in path:
        try:
            here = here[part]
        except (LookupError, TypeError):
            here = None
        if isinstance(part, str):
            words.append(part)
        else:
            table = _TABLES.get(words[-1], table)
            name = here.get("id") or here.get("route") if isinstance(here, dict) else None
            words.append(name if isinstance(name, str) else f"number {part + 1}")
    return table, ".".join(words)


_TABLES: Mapping[str, type[Table]] = {
    "endpoints": EndpointSettings,
    "adapters": AdapterSettings,
    "controlnets": ControlNetSettings,
}
