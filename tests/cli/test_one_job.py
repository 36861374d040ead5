from __future__ import annotations

from pathlib import Path

import pytest

from mezzotint.cli.hosting import address_file, hosted
from mezzotint.cli.reach import SERVER_FILE, running_server
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
    assert "starting one for this job" in alone.stderr

    settings = load_settings().model_copy(update={"port": 0})
    assert running_server(settings) is None
    with hosted(settings) as url, address_file(settings.data_dir / SERVER_FILE, url):
        served = run(*command, "served.png")
    assert served.returncode == 0, served.stderr
    assert "starting" not in served.stderr
    assert Path("served.png").read_bytes() == Path("alone.png").read_bytes()
