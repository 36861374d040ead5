"""The OpenAPI document and the page made from it."""

from __future__ import annotations

import html
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mezzotint.server.api.documentation import WITH_BODY
from mezzotint.server.api.reference import operations
from tests.server.hosting import Host, endpoint, hosting, settings_for


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
    needed = re.findall(r'<(?:link|script|img)[^>]*(?:href|src)="([^"]*)"', answer.text)
    assert len(needed) == 4
    for address in needed:
        assert "://" not in address
        assert host.client.get(f"/{address}").status_code == 200, address
    assert '<a href="./">Playground</a>' in answer.text
    assert f"curl -sS {host.url}/dedicated/v1/images/generations" in answer.text


def test_the_page_has_types_defaults_and_limits(host: Host) -> None:
    text = host.client.get("/docs").text
    for name, kind, default, limits in (
        ("num_inference_steps", "integer", "required", "1 to 50"),
        ("guidance_scale", "number or null", "optional", "0 to 100"),
        ("seed", "integer or null", "optional", "0 to 2^63-1"),
        ("prompt", "text", "required", "1 to 10,000 characters"),
        ("num_inference_steps", "integer", "<code>20</code>", "1 to 50"),
        ("scale", "number", "<code>1.0</code>", "-10 to 10"),
    ):
        cells = "".join(f"<td>{cell}</td>" for cell in (f"<code>{name}</code>", kind, default, limits))
        assert cells in text, name
    assert "<code>data[].timings.queue_ms</code>" in text, "the fields of answers, those inside others too"


def test_every_command_that_draws_ends_in_a_picture_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    painted = endpoint("fake:size=128", id="emoji")
    with hosting(settings_for(tmp_path / "server", painted)) as painting:
        document = painting.client.get("/openapi.json").json()
        key = painting.client.headers["authorization"].removeprefix("Bearer ")
        monkeypatch.setenv("MEZZOTINT_API_KEY", key)
        drawn = {}
        for one in operations(document, painting.url):
            (text,) = re.findall(r"<pre><code[^>]*>(.*?)</code></pre>", one.body, re.DOTALL)
            line = html.unescape(text)
            files = [name for name in ("edited.png", "picture.png") if line.endswith(name)]
            if not files:
                continue
            done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 0, f"{line}: {done.stderr}"
            drawn[one.path] = Path(files[0]).read_bytes()
            assert drawn[one.path].startswith(b"\x89PNG"), f"{line}: {done.stderr}"
            if files == ["edited.png"]:
                Path(files[0]).unlink()
    assert set(drawn) == {
        "/dedicated/v1/images/generations", "/dedicated/v1/images/edits", "/v1/images/generations",
        "/v1/images/edits", "/sdapi/v1/txt2img", "/sdapi/v1/img2img",
    }  # fmt: skip
