"""Which endpoint and adapter a request names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mezzotint.errors import InvalidRequestError, NotFoundError, PermissionDeniedError
from mezzotint.messages import AdapterFailed
from mezzotint.server.store.adapters import Adapter, Origin
from mezzotint.server.store.keys import Key
from mezzotint.server.work.registry import Registry
from mezzotint.server.work.resolve import Target, resolve, resolve_short, usable_endpoints
from tests.server.hosting import endpoint, hosting, settings_for

EVERYWHERE = Key("key_1", "everywhere")
ONLY_TWO = Key("key_2", "only two", endpoints=("two",))


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """Endpoints `one` (adapters glow, shared, broken) and `two` (adapter shared)."""
    folder = tmp_path_factory.mktemp("server")
    with hosting(settings_for(folder, endpoint(), endpoint(id="two"))) as host:
        for endpoint_id, route in (("one", "glow"), ("one", "shared"), ("one", "broken"), ("two", "shared")):
            record = Adapter(endpoint_id, route, "", Path("nowhere"), 1.0, "", 0.0, Origin.API, 0)
            if route == "broken":
                record = record.after(AdapterFailed(route, "nowhere", "invalid_adapter", "no LoRA"), None)
            host.endpoint(endpoint_id).adapters.publish(record)
        yield host.service.registry


def test_a_full_name_is_resolved_and_given_back(registry: Registry) -> None:
    for resolver in (resolve, resolve_short):
        for name in ("one", "one:glow", "two:shared"):
            assert resolver(registry, EVERYWHERE, name).model == name


def test_only_a_short_name_may_be_an_adapter_alone(registry: Registry) -> None:
    assert resolve_short(registry, EVERYWHERE, "glow").model == "one:glow"
    with pytest.raises(NotFoundError, match="there is no endpoint 'glow'"):
        resolve(registry, EVERYWHERE, "glow")


def test_an_adapter_alone_counts_where_the_key_may_use_it(registry: Registry) -> None:
    assert resolve_short(registry, ONLY_TWO, "shared").model == "two:shared"
    with pytest.raises(
        NotFoundError, match="2 endpoints have an adapter 'shared'; send one of one:shared, two"
    ):
        resolve_short(registry, EVERYWHERE, "shared")


def test_no_name_is_the_only_endpoint_of_the_key(registry: Registry) -> None:
    assert resolve_short(registry, ONLY_TWO, None).model == "two"
    assert usable_endpoints(registry, ONLY_TWO) == [resolve(registry, ONLY_TWO, "two").endpoint]
    with pytest.raises(InvalidRequestError, match="this key may use one, two"):
        resolve_short(registry, EVERYWHERE, None)


def test_an_adapter_that_the_workers_refused_is_refused_under_each_of_its_names(registry: Registry) -> None:
    one = Target(resolve(registry, EVERYWHERE, "one").endpoint)
    attempts: list[Callable[[], Target]] = [
        lambda: resolve(registry, EVERYWHERE, "one:broken"),
        lambda: resolve_short(registry, EVERYWHERE, "broken"),
        lambda: one.with_adapter("broken"),
    ]
    for attempt in attempts:
        with pytest.raises(InvalidRequestError, match="one:broken cannot be used: no LoRA") as refused:
            attempt()
        assert refused.value.code == "invalid_adapter"


def test_errors_give_the_nearest_name(registry: Registry) -> None:
    with pytest.raises(NotFoundError, match="did you mean one:glow"):
        resolve(registry, EVERYWHERE, "one:glwo")
    with pytest.raises(NotFoundError, match="its adapters are broken, glow, shared"):
        resolve(registry, EVERYWHERE, "one:zzzz")
    with pytest.raises(NotFoundError, match="this key may use "):
        resolve(registry, EVERYWHERE, "zzzz")
    for name in ("one", "zzzz"):  # a key with a scope is not told which of them exists
        with pytest.raises(PermissionDeniedError, match="it may use two"):
            resolve(registry, ONLY_TWO, name)
