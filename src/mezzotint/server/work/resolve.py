"""The endpoint and the adapter that a request names: decided here, once, for every dialect."""

from __future__ import annotations

from dataclasses import dataclass

from mezzotint.errors import InvalidRequestError, NotFoundError, echo, nearest
from mezzotint.schemas import shown, split_model
from mezzotint.server.store.adapters import AdapterState
from mezzotint.server.store.keys import Key
from mezzotint.server.work.endpoints import Endpoint
from mezzotint.server.work.registry import Registry
from mezzotint.spec import ImageSpec

MAX_NAMES = 10
"""Most names that an error lists."""


@dataclass(frozen=True, slots=True)
class Target:
    """One endpoint, and one of its adapters or none."""

    endpoint: Endpoint
    route: str | None = None

    @property
    def model(self) -> str:
        """The `model` of a request that names this target in full."""
        return f"{self.endpoint.id}:{self.route}" if self.route else self.endpoint.id

    def with_adapter(self, route: str) -> Target:
        """The same endpoint with another of its adapters."""
        _require_adapter(self.endpoint, route)
        return Target(self.endpoint, route)


def resolve(registry: Registry, key: Key, model: str) -> Target:
    """The target that `ENDPOINT_ID` or `ENDPOINT_ID:ADAPTER_ROUTE` names.

    NotFoundError gives the nearest name that this key may use. PermissionDeniedError means that the endpoint
    exists and this key may not use it. InvalidRequestError means that the workers refused the adapter.
    """
    endpoint_id, route = split_model(model)
    target = Target(registry.find(endpoint_id, key))
    return target if route is None else target.with_adapter(route)


def resolve_short(registry: Registry, key: Key, model: object) -> Target:
    """As `resolve`, for dialects whose clients may leave out what is clear without it.

    `None` is the only endpoint that this key may use. An adapter route alone is the endpoint that has it.
    """
    usable = usable_endpoints(registry, key)
    if model is None:
        if len(usable) == 1:
            return Target(usable[0])
        text = f"model is required: this key may use {_listed([endpoint.id for endpoint in usable])}"
        raise InvalidRequestError(text, code="missing_field", param="model")
    if not isinstance(model, str):
        text = f"model must be a string (got {shown(model)})"
        raise InvalidRequestError(text, code="invalid_type", param="model")
    having = [endpoint for endpoint in usable if model in endpoint.adapters]
    if not having or any(model in (endpoint.id, *endpoint.spec.aliases) for endpoint in usable):
        return resolve(registry, key, model)
    if len(having) > 1:
        names = [Target(endpoint, model).model for endpoint in having]
        text = f"{len(having)} endpoints have an adapter {echo(model)}; send one of {_listed(names)}"
        raise NotFoundError(text, code="adapter_not_found", param="model")
    return Target(having[0]).with_adapter(model)


def usable_endpoints(registry: Registry, key: Key) -> list[Endpoint]:
    """The endpoints that this key may use."""
    return [endpoint for endpoint in registry if key.may_use(endpoint.id)]


def require_adapters(endpoint: Endpoint, spec: ImageSpec) -> None:
    """NotFoundError or InvalidRequestError unless the endpoint has all adapters that the request uses."""
    for route in spec.routes:
        _require_adapter(endpoint, route, "adapters")


def _require_adapter(endpoint: Endpoint, route: str, param: str = "model") -> None:
    if route not in endpoint.adapters:
        hint = nearest(route, endpoint.adapters)
        known = _listed(sorted(endpoint.adapters))
        nearby = f"did you mean {endpoint.id}:{hint}?" if hint else f"its adapters are {known}"
        raise NotFoundError(
            f"endpoint {endpoint.id} has no adapter {echo(route)}; {nearby}",
            code="adapter_not_found",
            param=param,
        )
    adapter = endpoint.adapters[route]
    if adapter.state is AdapterState.REFUSED:
        text = f"adapter {endpoint.id}:{route} cannot be used: {adapter.failure}"
        raise InvalidRequestError(text, code=adapter.failure_code, param=param)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:MAX_NAMES]) or "none"
