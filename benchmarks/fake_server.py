"""The server process with workers that paint without a model, for what does not depend on one.

    python -m benchmarks.fake_server --config FILE

As `mezzotint serve`, but that the models it hosts are `fake:...` (see fake_worker.py).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mezzotint.cli import hosting
from mezzotint.config import load_settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    hosting.serve(load_settings(parser.parse_args().config), worker="mezzotint.fake_worker:run")


if __name__ == "__main__":
    main()
