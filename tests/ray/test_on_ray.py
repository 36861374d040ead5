"""Workers on a real Ray: the same bytes, and every death is one that the server knows already."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx2
import pytest

pytest.importorskip("ray", reason="Ray is not installed; pip install 'mezzotint[ray]'")

import mezzotint
from mezzotint.config import AdapterSettings
from mezzotint.server.work.lifecycle import State
from mezzotint.server.workers.process import ENGINE_WORKER
from tests.ray.conftest import add_node, free_port, start_cluster
from tests.server import hosting
from tests.server.hosting import Host, endpoint, settings_for

pytestmark = pytest.mark.filterwarnings("default")

BUILT_IN = Path(mezzotint.__file__).parent / "models" / "emoji" / "adapters"
PATIENCE_S = 120.0


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor's start imports this package in a fresh interpreter."""
    monkeypatch.setattr(hosting, "PATIENCE_S", PATIENCE_S)


def waiting_for(gate: Path) -> str:
    return f"a cat !wait@2:{gate}"


def held_at(gate: Path, host: Host) -> Future[httpx2.Response]:
    """A request that a worker has in hand and that cannot end before `gate` is there."""
    answer = host.post_soon(waiting_for(gate), seed=7)
    host.until(lambda: host.endpoint().dispatcher.num_running() == 1)
    return answer


def test_pictures_have_the_same_bytes_and_their_worker_a_node(cluster: Any, tmp_path: Path) -> None:
    with hosting.hosting(settings_for(tmp_path / "local")) as host:
        expected = host.picture(seed=7)
    with hosting.hosting(settings_for(tmp_path / "ray", ray=cluster.address)) as host:
        assert host.picture(seed=7) == expected
        spec = host.client.get("/dedicated/beta/endpoint/one").json()
        nodes = [each["node"] for each in spec["mezzotint"]["replicas"]]
        assert nodes == [cluster.list_all_nodes()[-1].node_ip_address]


def test_a_request_survives_the_death_of_its_actor(cluster: Any, tmp_path: Path) -> None:
    flag = tmp_path / "died"
    with hosting.hosting(settings_for(tmp_path, ray=cluster.address)) as host:
        prompt = f"a cat !die-once@2:{flag}"
        first = host.picture(prompt, seed=7)
        assert flag.exists()
        assert host.endpoint().current.replicas[0].num_restarts == 1
        assert host.picture(prompt, seed=7) == first


def test_a_request_survives_the_death_of_its_relay(cluster: Any, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with hosting.hosting(settings_for(tmp_path, ray=cluster.address)) as host:
        answer, replica = held_at(gate, host), host.endpoint().current.replicas[0]
        assert replica.pid is not None
        os.kill(replica.pid, signal.SIGKILL)
        host.until(lambda: replica.num_restarts == 1)
        gate.touch()
        again = answer.result(PATIENCE_S)
        assert again.status_code == 200, again.text
        assert again.json()["data"][0]["b64_json"] == host.picture(waiting_for(gate), seed=7)
        assert replica.num_restarts == 1


def test_a_cancelled_request_leaves_its_worker_free(cluster: Any, tmp_path: Path) -> None:
    slow = endpoint("fake:step_s=0.5")
    with hosting.hosting(settings_for(tmp_path, slow, ray=cluster.address)) as host:
        request = host.submit(num_inference_steps=50)
        host.wait_until(request, "running")
        assert host.client.delete(f"/dedicated/v1/requests/{request}").status_code == 200
        host.until(lambda: host.endpoint().dispatcher.idle)
        assert host.state(request)["status"] == "cancelled"
        assert host.endpoint().current.replicas[0].num_restarts == 0


def test_without_ray_requests_get_503_until_it_is_back(tmp_path: Path) -> None:
    port = free_port()
    settings = settings_for(tmp_path, ray=f"127.0.0.1:{port}")
    with hosting.hosting(settings, ready=False) as host:
        replica = host.endpoint().current.replicas[0]
        host.until(lambda: replica.unplaced)
        refused = host.post()
        assert refused.status_code == 503, refused.text
        assert refused.json()["error"]["code"] == "workers_unavailable"
        assert f"127.0.0.1:{port}" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) > 0
        running = start_cluster(port)
        try:
            add_node(running)
            host.wait_for(State.READY)
            assert host.picture()
        finally:
            running.shutdown()


def test_the_death_of_a_node_moves_its_work_to_another(tmp_path: Path) -> None:
    running = start_cluster(free_port())
    try:
        doomed, gate = add_node(running), tmp_path / "gate"
        with hosting.hosting(settings_for(tmp_path, ray=running.address)) as host:
            answer, replica = held_at(gate, host), host.endpoint().current.replicas[0]
            add_node(running)
            running.remove_node(doomed, allow_graceful=False)
            host.until(lambda: replica.num_restarts >= 1)
            gate.touch()
            again = answer.result(PATIENCE_S)
            assert again.status_code == 200, again.text
            assert again.json()["data"][0]["b64_json"] == host.picture(waiting_for(gate), seed=7)
    finally:
        running.shutdown()


def picture_of(answer: httpx2.Response) -> str:
    assert answer.status_code == 200, answer.text
    data: str = answer.json()["data"][0]["b64_json"]
    return data


def test_the_death_of_the_head_costs_no_request_and_heals_by_itself(tmp_path: Path) -> None:
    port, seeds, num_long = free_port(), range(8), 2
    running = start_cluster(port, reconnect_s=5)
    try:
        add_node(running)
        slow = endpoint("fake:step_s=0.25", deadline_s=2 * PATIENCE_S, max_queue_s=2 * PATIENCE_S)
        with hosting.hosting(settings_for(tmp_path, slow, ray=f"127.0.0.1:{port}")) as host:
            expected = {seed: host.picture(seed=seed) for seed in seeds}
            long = [host.post_soon(seed=1, num_inference_steps=40) for _ in range(num_long)]
            answers = {seed: host.post_soon(seed=seed) for seed in seeds}
            host.until(lambda: not host.endpoint().dispatcher.idle)
            running.remove_node(running.head_node, allow_graceful=False)
            replica = host.endpoint().current.replicas[0]
            host.until(lambda: replica.unplaced)
            refused = host.post(seed=1)
            assert refused.status_code == 503, refused.text
            assert refused.json()["error"]["code"] == "workers_unavailable"
            assert int(refused.headers["retry-after"]) > 0
            running.shutdown()
            running = start_cluster(port)
            add_node(running)
            host.wait_for(State.READY)
            pictures = [picture_of(answer.result(PATIENCE_S)) for answer in long]
            assert len(set(pictures)) == 1
            assert host.picture(seed=1, num_inference_steps=40) == pictures[0]
            assert {
                seed: picture_of(answer.result(PATIENCE_S)) for seed, answer in answers.items()
            } == expected
            done = 'mezzotint_requests_total{endpoint="one",outcome="done"}'
            lines = host.client.get("/metrics").text.splitlines()
            assert f"{done} {float(2 * len(seeds) + num_long + 1)}" in lines, "each ended once"
    finally:
        running.shutdown()


def test_a_model_that_the_node_lacks_is_told_with_the_node(cluster: Any, tmp_path: Path) -> None:
    missing = endpoint(str(tmp_path / "no-such-model"))
    settings = settings_for(tmp_path, missing, ray=cluster.address)
    with hosting.hosting(settings, ready=False, worker=ENGINE_WORKER) as host:
        host.wait_for(State.FAILED)
        failure = host.endpoint().failure
        assert failure.startswith("on node ")
        assert "no-such-model" in failure


def test_the_built_in_model_paints_the_same_with_an_adapter_from_the_gateway(
    cluster: Any, tmp_path: Path
) -> None:
    file = tmp_path / "flat.safetensors"
    shutil.copy(BUILT_IN / "flat.safetensors", file)
    emoji = endpoint("emoji", adapters=(AdapterSettings(route="flat2", source=str(file)),))
    pictures = []
    for name, ray in (("local", None), ("ray", cluster.address)):
        folder = tmp_path / name
        with hosting.hosting(settings_for(folder, emoji, ray=ray), worker=ENGINE_WORKER) as host:
            pictures.append(host.picture("a red apple", model="one:flat2", seed=7, num_inference_steps=2))
            if ray is None:
                base = host.picture("a red apple", seed=7, num_inference_steps=2)
    assert pictures[0] == pictures[1] != base
    kept = Path(os.environ["XDG_CACHE_HOME"]) / "mezzotint" / "adapters"
    name = f"{hashlib.sha256(file.read_bytes()).hexdigest()}.safetensors"
    assert (kept / name).read_bytes() == file.read_bytes()


def test_a_node_that_cannot_keep_an_adapter_is_named(cluster: Any, tmp_path: Path) -> None:
    file = tmp_path / "flat.safetensors"
    shutil.copy(BUILT_IN / "flat.safetensors", file)
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "mezzotint"
    shutil.rmtree(folder, ignore_errors=True)
    folder.touch()  # a folder cannot be made where a file is
    try:
        with hosting.hosting(settings_for(tmp_path, ray=cluster.address)) as host:
            refused = host.client.post(
                "/dedicated/beta/endpoint/one/adapters", json={"route": "new", "source": str(file)}
            )
            assert refused.status_code >= 400, refused.text
            assert f"node {cluster.list_all_nodes()[-1].node_ip_address} cannot keep" in refused.text
            assert host.picture(seed=7)
    finally:
        folder.unlink()
