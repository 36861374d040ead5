from __future__ import annotations

from pathlib import Path

import pytest

from mezzotint.cli.hosting import hosted
from mezzotint.cli.running import announced, running_on
from mezzotint.config import load_settings
from tests.cli.conftest import Run
from tests.engine.tiny import save


def test_generate_gives_the_same_bytes_with_and_without_a_server(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save("flux", Path("model"), sizes=[(32, 32)])
    Path("mezzotint.toml").write_text('[[endpoints]]\nid = "tiny"\nmodel = "model"\nnum_threads = 1\n')
    command = ("generate", "a red apple", "--steps", "3", "--seed", "7", "--no-show", "--out")

    alone = run(*command, "alone.png")
    assert (alone.returncode, alone.stdout) == (0, "alone.png\n"), alone.stderr
    assert "starts one for this job" in alone.stderr
    assert "mezzotint serve" in alone.stderr, "how to keep one running"

    settings = load_settings().model_copy(update={"port": 0})
    assert running_on(settings.data_dir) is None
    with hosted(settings) as url, announced(settings, url, Path("mezzotint.toml")):
        served = run(*command, "served.png")
    assert served.returncode == 0, served.stderr
    assert "starts one" not in served.stderr
    assert Path("served.png").read_bytes() == Path("alone.png").read_bytes()
