"""docs/sdk.md is true: its code runs, block after block, against the real server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

PAGE = Path(__file__).parents[2] / "docs" / "sdk.md"


def test_the_code_of_the_page_runs(
    server: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, key = server
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEZZOTINT_BASE_URL", url)
    monkeypatch.setenv("MEZZOTINT_API_KEY", key)
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL))
    assert "http://127.0.0.1:8000" in code
    assert "YOUR_KEY" in code
    code = code.replace('model="emoji", prompt="an owl"', 'model="slow", prompt="an owl"')  # to see previews
    assert '"slow"' in code
    scope: dict[str, object] = {}
    exec(code.replace("http://127.0.0.1:8000", url).replace("YOUR_KEY", key), scope)
    files = sorted(path.name for path in tmp_path.iterdir())
    previews = [name for name in files if name.startswith("owl-after-")]
    assert len(previews) == 2
    assert set(files) - set(previews) == {"apple.png", "green.png", "owl.png", "rocket.png", "tree.png"}
    for name in files:
        with Image.open(name) as image:
            assert image.size == (16, 16)
    assert len(scope["results"]) == 3  # type: ignore[arg-type]
    assert "did you mean emoji? endpoint_not_found model req_" in capsys.readouterr().out
    scope["client"].close()  # type: ignore[attr-defined]
