"""What a worker process runs first: find the worker by its dotted name and hand it the pipe.

Only a string crosses from the server to the child, so the server never imports the engine.
"""

from __future__ import annotations

import importlib
import signal
from multiprocessing.connection import Connection


def run(target: str, connection: Connection, *arguments: str) -> None:
    """Imports `package.module:function` and calls it with the connection and the arguments.

    Ctrl-C reaches the whole process group; the server decides when its workers end, so they ignore it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    module, _, function = target.partition(":")
    getattr(importlib.import_module(module), function)(connection, *arguments)
