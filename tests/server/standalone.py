"""A server in a process of its own: its arguments are FOLDER, DRAIN_S and any number of ID=MODEL.

With models it has real workers, which its forkserver makes quickly; without, one endpoint with a fake worker.
The environment's MEZZOTINT_TEST_DATABASE_URL, where it is set, is its database.
Prints its address and the key that its first start made.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from mezzotint.server import logs
from mezzotint.server.app import create_app, serve
from mezzotint.server.store.keys import create_first_key
from mezzotint.server.workers.process import ENGINE_WORKER
from tests.server.hosting import FAKE, endpoint, settings_for

if __name__ == "__main__":
    models = [text.partition("=")[::2] for text in sys.argv[3:]]
    endpoints = [
        endpoint(model, id=name, dtype="bf16", num_threads=1, batching="off", performance="reference")
        for name, model in models
    ] or [endpoint("fake:step_s=0.02")]
    database_url = os.environ.get("MEZZOTINT_TEST_DATABASE_URL")
    settings = settings_for(
        Path(sys.argv[1]), *endpoints, drain_s=float(sys.argv[2]), database_url=database_url
    )
    logs.configure("info", "json")
    app = create_app(settings, worker=ENGINE_WORKER if models else FAKE)
    made = create_first_key(app.state.context.engine)

    def tell(url: str) -> None:
        print(url, made[1] if made else None, flush=True)  # noqa: T201

    asyncio.run(serve(app, settings, on_started=tell))
