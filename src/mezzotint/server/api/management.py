"""The life cycle of endpoints over HTTP, in the shapes of the Friendli endpoint API; admin keys only.

What that API has no word for stands beside it: `settings` in a body takes any field of EndpointSettings, and
`mezzotint` in a spec shows all there is to know.
"""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from mezzotint.config import EndpointSettings
from mezzotint.errors import ConfigError, ConflictError, InvalidRequestError, echo
from mezzotint.messages import DOWNLOADING
from mezzotint.server.api.answers import ERRORS
from mezzotint.server.api.context import AdminKey, CurrentContext, admin_of
from mezzotint.server.api.strict import StrictRoute
from mezzotint.server.work.endpoints import Endpoint
from mezzotint.server.work.lifecycle import Command, Desired, State
from mezzotint.server.work.registry import Version

Status = Literal[
    "INITIALIZING",
    "RUNNING",
    "UPDATING",
    "SLEEPING",
    "AWAKING",
    "FAILED",
    "STOPPING",
    "TERMINATING",
    "TERMINATED",
]
Phase = Literal["DOWNLOADING_MODEL", "ENGINE_INITIALIZING"]
MAX_COOLDOWN_S = 10**9
OWNER = "default"
"""Project and team of everything: this server knows neither."""
OPERATOR_ONLY = ("allow_remote_code",)
"""Settings that only the configuration file may change: they let a repository run code on the server.

They are for the model that the file names, so they end where another model is named."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", alias_generator=to_camel, populate_by_name=True)


class _Answer(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)


class Advanced(BaseModel):
    """Of these only `max_batch_size` has a meaning for images; the others are accepted and not used."""

    model_config = ConfigDict(extra="ignore")
    max_batch_size: int | None = None


class Simplescale(_Body):
    replicas: int = Field(ge=1, le=64)


class AutoscalingPolicy(_Body):
    """Workers by the load; `minReplica` 0 lets it sleep after `cooldownPeriod` seconds without a request."""

    min_replica: int | None = Field(0, ge=0)
    max_replica: int | None = Field(1, ge=1, le=64)
    cooldown_period: int | None = Field(300, ge=0, le=MAX_COOLDOWN_S)


class EndpointUpdate(_Body):
    """Changes to an endpoint; what is left out or null stays as it is."""

    name: str | None = None
    hf_model_repo: str | None = Field(None, description="Hub repository id of the model.")
    hf_model_repo_revision: str | None = None
    uploaded_model_id: str | None = Field(None, description="Not supported: this server keeps no uploads.")
    advanced: Advanced | None = None
    simplescale: Simplescale | None = None
    autoscaling_policy: AutoscalingPolicy | None = None
    instance_option_id: str | None = Field(None, description="Accepted and not used.")
    new_version_comment: str | None = Field(None, max_length=1000)
    settings: dict[str, Any] | None = Field(None, description="Any settings of `[[endpoints]]` but `id`.")


class EndpointCreate(EndpointUpdate):
    """A new endpoint, whose id is its `name`; it runs the built-in model unless the body names another."""

    name: str
    project_id: str | None = Field(None, description="Accepted and not used.")
    initial_version_comment: str | None = Field(None, max_length=1000)


class EndpointStatus(_Answer):
    id: str
    status: Status
    phase: Phase | None = None
    error_code: str | None = None
    message: str | None = Field(None, description="Why it has failed, or why its last update was given up.")
    created_at: datetime
    updated_at: datetime


class EndpointList(_Answer):
    data: dict[str, EndpointStatus]
    next_cursor: str | None = None


class EndpointSpec(_Answer):
    name: str
    gpu_type: str
    num_gpu: int
    project_id: str = OWNER
    creator_id: str
    team_id: str = OWNER
    autoscaling_min: int
    autoscaling_max: int
    autoscaling_cooldown: int
    max_batch_size: int
    tokenizer_skip_special_tokens: bool = False
    tokenizer_add_special_tokens: bool = True
    max_input_length: int | None = None
    curr_replica_cnt: int | None = None
    desired_replica_cnt: int | None = None
    mezzotint: dict[str, Any]


class SpecList(_Answer):
    data: dict[str, EndpointSpec]
    next_cursor: str | None = None


def endpoint_of_path(endpoint_id: str, context: CurrentContext, admin: AdminKey) -> Endpoint:
    """Dependency: the endpoint that the path names."""
    return context.registry.find(endpoint_id, admin)


PathEndpoint = Annotated[Endpoint, Depends(endpoint_of_path)]
_SOME: dict[int | str, dict[str, Any]] = {status: ERRORS[status] for status in (401, 403, 404, 422, 503)}
router = APIRouter(
    prefix="/dedicated/beta/endpoint",
    tags=["Endpoints"],
    dependencies=[Depends(admin_of)],
    responses={**_SOME, 409: ERRORS[409]},
    route_class=StrictRoute,
)


# ---------------------------------------------------------------- routes


@router.post("", summary="Create an endpoint", response_model=EndpointStatus)
async def create(body: EndpointCreate, context: CurrentContext, admin: AdminKey) -> EndpointStatus:
    spec = _changed(EndpointSettings.model_construct(id=body.name), body)
    endpoint = await context.registry.create(spec, admin.name, body.initial_version_comment or "")
    try:
        await context.adapters.adopt(endpoint)
    except ConfigError as error:  # nothing may be stored that would stop the next start
        await context.registry.delete(endpoint)
        raise InvalidRequestError(error.message, param="settings.adapters") from None
    return status_of(endpoint)


@router.get("", summary="List endpoints", response_model=EndpointList)
async def list_endpoints(context: CurrentContext) -> EndpointList:
    return EndpointList(data={endpoint.id: status_of(endpoint) for endpoint in context.registry})


@router.get("/{endpoint_id}", summary="Read an endpoint's spec", response_model=EndpointSpec)
async def get_spec(endpoint: PathEndpoint, context: CurrentContext) -> EndpointSpec:
    history = await context.registry.history(endpoint.id)
    newest = next((entry for entry in history if entry.version == endpoint.current.version), history[0])
    return _live_spec(endpoint, newest)


@router.put("/{endpoint_id}", summary="Update an endpoint", response_model=EndpointSpec)
async def update(
    endpoint: PathEndpoint, body: EndpointUpdate, context: CurrentContext, admin: AdminKey
) -> EndpointSpec:
    """Starts workers with the new settings and retires the old when those are ready: no request fails."""
    if "adapters" in (body.settings or {}):
        raise InvalidRequestError(
            f"settings.adapters cannot be changed here; add and remove them at .../{endpoint.id}/adapters",
            code="not_supported",
            param="settings.adapters",
        )
    comment = body.new_version_comment or ""
    await context.registry.update(endpoint, lambda spec: _changed(spec, body), admin.name, comment)
    history = await context.registry.history(endpoint.id)
    return _live_spec(endpoint, history[0])


@router.delete("/{endpoint_id}", summary="Delete an endpoint")
async def delete(endpoint: PathEndpoint, context: CurrentContext) -> dict[str, str]:
    """Ends its requests, stops its workers and forgets it."""
    if context.registry.is_from_file(endpoint.id):
        raise ConflictError(
            f"endpoint {endpoint.id} stands in the configuration file; take it out there, or terminate it"
        )
    await context.registry.delete(endpoint)
    return {"id": endpoint.id, "status": "DELETED"}


@router.get("/{endpoint_id}/version", summary="Read an endpoint's history", response_model=SpecList)
async def get_version_history(endpoint: PathEndpoint, context: CurrentContext) -> SpecList:
    history = await context.registry.history(endpoint.id)
    return SpecList(data={str(entry.version): _spec(entry) for entry in history})


@router.get("/{endpoint_id}/status", summary="Read an endpoint's status", response_model=EndpointStatus)
async def get_status(endpoint: PathEndpoint) -> EndpointStatus:
    return status_of(endpoint)


@router.put("/{endpoint_id}/sleep", summary="Put an endpoint to sleep", response_model=EndpointStatus)
async def sleep(endpoint: PathEndpoint, context: CurrentContext) -> EndpointStatus:
    """Lets running requests finish and gives the memory back; the next request wakes it."""
    await context.registry.command(endpoint, Command.SLEEP)
    return status_of(endpoint)


@router.put("/{endpoint_id}/wake", summary="Wake an endpoint", response_model=EndpointStatus)
async def wake(endpoint: PathEndpoint, context: CurrentContext) -> EndpointStatus:
    await context.registry.command(endpoint, Command.START)
    return status_of(endpoint)


@router.put("/{endpoint_id}/restart", summary="Restart an endpoint", response_model=EndpointStatus)
async def restart(endpoint: PathEndpoint, context: CurrentContext) -> EndpointStatus:
    """New workers; also the way out of FAILED and TERMINATED. Where a worker runs, no request fails."""
    await context.registry.command(endpoint, Command.RESTART)
    return status_of(endpoint)


@router.put("/{endpoint_id}/calibrate", summary="Measure an endpoint anew", response_model=EndpointStatus)
async def calibrate(endpoint: PathEndpoint, context: CurrentContext) -> EndpointStatus:
    """New workers choose R, the rows of a merged forward, again. Where R changes, so do a seed's bytes."""
    await context.registry.calibrate(endpoint)
    return status_of(endpoint)


@router.put("/{endpoint_id}/terminate", summary="Terminate an endpoint", response_model=EndpointStatus)
async def terminate(endpoint: PathEndpoint, context: CurrentContext) -> EndpointStatus:
    """Takes no new request, gives the running ones the server's `drain_s`, then ends the workers."""
    await context.registry.command(endpoint, Command.TERMINATE, context.settings.drain_s)
    return status_of(endpoint)


# ---------------------------------------------------------------- shapes


def status_of(endpoint: Endpoint) -> EndpointStatus:
    """The status in the official words."""
    status = _status(endpoint)
    loading = endpoint.current.replicas[0].loading
    phase: Phase | None = None
    if status in ("INITIALIZING", "AWAKING"):
        phase = "DOWNLOADING_MODEL" if loading and loading.stage == DOWNLOADING else "ENGINE_INITIALIZING"
    return EndpointStatus(
        id=endpoint.id,
        status=status,
        phase=phase,
        error_code="INFERENCE_ENGINE_UNKNOWN_ERROR" if status == "FAILED" else None,
        message=endpoint.failure or endpoint.update_failure or None,
        created_at=_time(endpoint.created),
        updated_at=_time(endpoint.updated),
    )


_ENDING: dict[Desired, Status] = {
    Desired.RUNNING: "INITIALIZING",
    Desired.SLEEPING: "STOPPING",
    Desired.TERMINATED: "TERMINATING",
}


def _status(endpoint: Endpoint) -> Status:
    if endpoint.state is State.READY and endpoint.next is not None:
        return "UPDATING"
    if endpoint.state is State.STARTING and endpoint.awaking:
        return "AWAKING"
    if endpoint.state in (State.DRAINING, State.STOPPING):
        return _ENDING[endpoint.desired]
    words: dict[State, Status] = {
        State.CREATED: "INITIALIZING",
        State.STARTING: "INITIALIZING",
        State.READY: "RUNNING",
        State.SLEEPING: "SLEEPING",
        State.STOPPED: "TERMINATED",
        State.FAILED: "FAILED",
    }
    return words[endpoint.state]


def _spec(version: Version) -> EndpointSpec:
    settings = version.spec
    scaled = EndpointSettings.model_construct(**settings)  # of an older program, too
    least, most = scaled.num_replicas
    after_s = scaled.sleep_after_s
    device = str(settings["device"])
    return EndpointSpec(
        name=settings["id"],
        gpu_type=device,
        num_gpu=int(device.startswith("cuda")),
        creator_id=version.created_by,
        autoscaling_min=least if after_s is None else 0,
        autoscaling_max=most,
        autoscaling_cooldown=int(scaled.scale_down_delay_s if after_s is None else after_s),
        max_batch_size=settings["max_rows"],
        mezzotint={
            "version": version.version,
            "comment": version.comment,
            "created": version.created,
            "settings": settings,
        },
    )


def _live_spec(endpoint: Endpoint, version: Version) -> EndpointSpec:
    info = endpoint.info
    queue = endpoint.dispatcher.queue
    live = {
        "state": str(endpoint.state),
        "not_ready_because": endpoint.not_ready_because or None,
        "failure": endpoint.failure or None,
        "update_failure": endpoint.update_failure or None,
        "info": dataclasses.asdict(info) if info else None,
        "queue": {
            "jobs": len(queue),
            "running": endpoint.dispatcher.num_running(),
            "backlog_s": round(queue.backlog_s(), 3),
            "speed": round(endpoint.dispatcher.speed, 3),
        },
        "text_cache": {
            "hits": endpoint.dispatcher.text_hits,
            "misses": endpoint.dispatcher.text_misses,
            "bytes": endpoint.dispatcher.text_bytes,
        },
        "replicas": [
            {
                "name": replica.name,
                "state": str(replica.state),
                "pid": replica.pid,
                "node": replica.node,
            }
            | {"stage": replica.loading.stage if replica.loading else ""}
            | {"restarts": replica.num_restarts, "load_s": round(replica.load_s, 3)}
            for replica in endpoint.current.replicas
        ],
        "scaling": [dataclasses.asdict(event) for event in endpoint.scalings],
        "adapters": sorted(endpoint.adapters),
    }
    shown = _spec(version)
    device = info.device if info else shown.gpu_type
    return shown.model_copy(
        update={
            "gpu_type": device,
            "num_gpu": int(device.startswith("cuda")),
            "max_input_length": info.max_prompt_tokens if info else None,
            "curr_replica_cnt": len(endpoint.current.ready),
            "desired_replica_cnt": endpoint.num_wanted,
            "mezzotint": shown.mezzotint | live,
        }
    )


def _changed(spec: EndpointSettings, body: EndpointUpdate) -> EndpointSettings:
    """The settings after this body's changes; InvalidRequestError names the field that does not fit."""
    if body.uploaded_model_id is not None:
        raise InvalidRequestError(
            "uploadedModelId is not supported: this server keeps no uploads; name a model in hfModelRepo",
            code="not_supported",
            param="uploadedModelId",
        )
    if body.name is not None and body.name != spec.id:
        raise InvalidRequestError(
            f"an endpoint cannot be renamed (it is {spec.id}, got {echo(body.name)}); create another one",
            code="not_supported",
            param="name",
        )
    values = spec.model_dump(mode="json") | _official(body)
    for name, value in (body.settings or {}).items():
        if name == "id" or name in OPERATOR_ONLY:
            raise InvalidRequestError(
                f"settings.{name} can be changed in the configuration file only",
                code="not_supported",
                param=f"settings.{name}",
            )
        values[name] = value
    if (values["model"], values["revision"]) != (spec.model, spec.revision):
        values |= dict.fromkeys(OPERATOR_ONLY)
    try:
        return EndpointSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        unknown = first["type"] == "extra_forbidden"
        param = "name" if name == "id" else f"settings.{name}"
        raise InvalidRequestError(
            f"{param}: {'no such setting' if unknown else first['msg']} (got {echo(first['input'])})",
            code="unknown_field" if unknown else "invalid_value",
            param=param,
        ) from None


def _official(body: EndpointUpdate) -> dict[str, Any]:
    """What the official API's fields mean in our settings."""
    values: dict[str, Any] = {}
    if body.hf_model_repo is not None:
        values |= {"model": body.hf_model_repo, "revision": None}
    if body.hf_model_repo_revision is not None:
        values["revision"] = body.hf_model_repo_revision
    if body.advanced is not None and body.advanced.max_batch_size is not None:
        values["max_rows"] = body.advanced.max_batch_size
    if body.autoscaling_policy is not None:
        policy = body.autoscaling_policy
        least, most = policy.min_replica, policy.max_replica
        values |= {"min_replicas": 1 if least is None else least, "max_replicas": most or 1}
        values |= {"scale_down_delay_s": float(policy.cooldown_period or 0), "idle_sleep_s": 0.0}
    if body.simplescale is not None:
        values |= {"replicas": body.simplescale.replicas, "min_replicas": None, "max_replicas": None}
    return values


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def install(app: FastAPI) -> None:
    """Adds these routes to the app."""
    app.include_router(router)
