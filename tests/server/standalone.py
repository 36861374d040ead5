"""A server in a process of its own, for tests that send it signals: its arguments are FOLDER and DRAIN_S.

Prints its address and the key that its first start made.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from mezzotint.server import logs
from mezzotint.server.app import create_app, serve
from tests.server.hosting import FAKE, endpoint, settings_for

if __name__ == "__main__":
    settings = settings_for(Path(sys.argv[1]), endpoint("fake:step_s=0.02"), drain_s=float(sys.argv[2]))
    logs.configure("info", "json")
    app = create_app(settings, worker=FAKE)

    def tell(url: str) -> None:
        print(url, app.state.service.first_key, flush=True)  # noqa: T201

    asyncio.run(serve(app, settings, on_started=tell))
