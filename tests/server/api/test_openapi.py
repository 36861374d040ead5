"""The OpenAPI document against the running server: whatever schemathesis makes of it is answered as it says.

No 5xx, no undocumented status, content type or shape. Management works on the endpoint `spare`, so that `one`
stays up for those who make pictures. MEZZOTINT_OPENAPI_EXAMPLES sets how many requests each operation gets.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.attacks import attack
from tests.engine import fake_hub
from tests.server.hosting import PATIENCE_S, Host, endpoint, hosting, settings_for

CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
EXAMPLES = int(os.environ.get("MEZZOTINT_OPENAPI_EXAMPLES", "4"))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """The server, and a Hub without a single repository."""
    folder = tmp_path_factory.mktemp("server")
    settings = settings_for(folder, endpoint(), endpoint(id="spare"))
    constants = "huggingface_hub.constants"
    with pytest.MonkeyPatch.context() as patch, fake_hub.serve() as hub:
        patch.setattr(f"{constants}.ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(f"{constants}.HF_HUB_CACHE", str(folder / "cache"))
        with hosting(settings) as running:
            yield running


def operations(host: Host) -> dict[str, Any]:
    """The operations of the server's own document by name; what deletes comes last."""
    schema = schemathesis.openapi.from_dict(host.client.get("/openapi.json").json())
    found = [result.ok() for result in schema.get_all_operations() if isinstance(result, Ok)]
    assert len(found) == sum(len(methods) for methods in schema.raw_schema["paths"].values())
    found.sort(key=lambda operation: operation.method.upper() == "DELETE")
    return {operation.label: operation for operation in found}


def ids(host: Host, operation: Any) -> dict[str, str]:
    """Names that exist, for the parts of the path that take some."""
    named = {parameter.name for parameter in operation.path_parameters}
    real = {"endpoint_id": "spare", "request_id": host.submit()}
    return {name: value for name, value in real.items() if name in named}


def try_out(host: Host, operation: Any, mode: GenerationMode, path: dict[str, str] | None) -> set[int]:
    """Sends what schemathesis makes of one operation; the statuses that came back, all documented."""
    statuses: set[int] = set()
    headers = {"authorization": host.client.headers["authorization"]}

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(mode, path_parameters=path))
    def send(case: Case[Any]) -> None:
        response = case.call(base_url=host.url, session=session, headers=headers, timeout=PATIENCE_S)
        statuses.add(response.status_code)
        case.validate_response(response, checks=CHECKS)

    with requests.Session() as session:
        send()
    return statuses


@attack("Whatever schemathesis makes of each operation", outcome="a documented status, never 5xx")
@pytest.mark.parametrize("mode", list(GenerationMode), ids=str)
def test_every_operation_answers_as_documented(host: Host, mode: GenerationMode) -> None:
    seen: dict[str, set[int]] = {}
    wrong = []
    for label, operation in operations(host).items():
        real = ids(host, operation)
        for path in (None, real) if real else (None,):
            try:
                seen.setdefault(label, set()).update(try_out(host, operation, mode, path))
            except Unsatisfiable:
                assert mode is GenerationMode.NEGATIVE, label
                assert not operation.body, "only what takes nothing cannot be asked wrongly"
            except FailureGroup as found:
                wrong.append(f"{label}: {'; '.join(str(failure) for failure in found.exceptions)}")
            except Exception as error:
                wrong.append(f"{label}: {type(error).__name__} {error}"[:3000])
    assert not wrong, "\n\n".join(wrong)
    beyond = {GenerationMode.POSITIVE: {200, 404}, GenerationMode.NEGATIVE: {404, 422}}
    assert set().union(*seen.values()) & beyond[mode] == beyond[mode], "it reaches beyond the first check"
