"""The OpenAPI document and the page made from it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mezzotint.server.api.documentation import WITH_BODY
from tests.server.hosting import GENERATE, Host, hosting, settings_for


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with hosting(settings_for(tmp_path_factory.mktemp("server"))) as running:
        yield running


def test_every_error_in_the_document_has_the_one_body(host: Host) -> None:
    document = host.client.get("/openapi.json").json()
    assert "HTTPValidationError" not in str(document)
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            statuses = operation["responses"]
            if method in WITH_BODY:
                refusal = "400" if path.startswith("/v1/") else "422"
                assert {"408", "413", "415", refusal} <= set(statuses), path
            if "401" in statuses:
                assert operation["security"] == [{"key": []}], path
            for status, answer in statuses.items():
                if int(status) >= 400 and path != "/readyz" and status != "416":  # a file's own, without JSON
                    schema = answer["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/ErrorBody"}, (path, status)


def test_the_page_names_every_address_and_needs_nothing_from_elsewhere(host: Host) -> None:
    answer = host.client.get("/docs")
    assert answer.headers["content-type"].startswith("text/html")
    for path in host.client.get("/openapi.json").json()["paths"]:
        assert f" {path}</code>" in answer.text
    assert "num_inference_steps" in answer.text
    for foreign in ("<script", "http://", "https://", "<link"):
        assert foreign not in answer.text.replace("https://errors.pydantic.dev", "")
    assert GENERATE in answer.text
