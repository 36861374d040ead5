"""The server process with workers that paint without a model, for what does not depend on one.

    python -m benchmarks.fake_server FOLDER

On a free port of 127.0.0.1, without keys; FOLDER is its data folder, and FOLDER/server.json has its address.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mezzotint.cli import hosting
from mezzotint.config import EndpointSettings, Settings


def main() -> None:
    settings = Settings(
        port=0,
        auth=False,
        data_dir=Path(sys.argv[1]),
        log_level="error",
        endpoints=(EndpointSettings(id="emoji", model="fake:step_s=0.0001,size=16"),),
    )
    hosting.serve(settings, worker="mezzotint.fake_worker:run")


if __name__ == "__main__":
    main()
