"""A real Ray cluster on this machine; without the extra `ray` these tests are skipped."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

STORE_BYTES = 80 * 2**20


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def start_cluster(port: int, reconnect_s: int = 60) -> Any:
    """A head alone, which has no room for workers. Nodes outlive it for `reconnect_s`."""
    from ray.cluster_utils import Cluster

    head = {
        "_system_config": {"gcs_rpc_server_reconnect_timeout_s": reconnect_s},
        "gcs_server_port": port,
        "num_cpus": 0,
        "object_store_memory": STORE_BYTES,
        "include_dashboard": False,
    }
    return Cluster(initialize_head=True, head_node_args=head)


def add_node(cluster: Any, num_cpus: int = 4) -> Any:
    return cluster.add_node(num_cpus=num_cpus, object_store_memory=STORE_BYTES)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head and one node; its workers keep adapter files in a folder of the test."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    running = start_cluster(free_port())
    try:
        add_node(running)
        yield running
    finally:
        running.shutdown()
        del os.environ["XDG_CACHE_HOME"]
