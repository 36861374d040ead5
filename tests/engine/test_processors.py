"""`exact` with the kernels that oneDNN has for other processors than this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["AVX2", "AVX512_CORE", "AVX512_CORE_BF16", "DEFAULT"])
def test_requests_have_the_bytes_they_have_alone_whatever_the_processor(kernels: str) -> None:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    made = subprocess.run(
        [sys.executable, "-m", "tests.engine.processors"],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": kernels, "PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert made.returncode == 0, made.stderr[-2000:]
    assert json.loads(made.stdout.splitlines()[-1]) == {"differing": [], "wrong": []}
