"""The life cycle: sleep, wake, update, restart, terminate, and what survives a restart of the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mezzotint.config import EndpointSettings
from mezzotint.errors import ConflictError, NotFoundError
from mezzotint.server.work.endpoints import Endpoint
from mezzotint.server.work.lifecycle import Command, State
from mezzotint.server.work.registry import Registry
from tests.attacks import attack
from tests.server.hosting import Host, endpoint, hosting, settings_for


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, server_database: str | None) -> Iterator[Host]:
    folder = tmp_path_factory.mktemp("server")
    with hosting(settings_for(folder, endpoint("fake:step_s=0.01"), database_url=server_database)) as running:
        yield running


def registry(host: Host) -> Registry:
    return host.service.registry


def update(host: Host, spec: EndpointSettings) -> int:
    return host.run(registry(host).update(host.endpoint(spec.id), to(spec), "test"))


def to(spec: EndpointSettings) -> Callable[[EndpointSettings], EndpointSettings]:
    """The change of an update that gives these settings."""
    return lambda _: spec


def test_a_sleeping_endpoint_has_no_worker_and_a_request_wakes_it(host: Host) -> None:
    host.command(Command.SLEEP)
    assert host.endpoint().state is State.SLEEPING
    assert host.endpoint().current.replicas[0].pid is None
    assert host.client.get("/readyz").status_code == 200, "it sleeps on purpose"
    assert host.post().status_code == 200
    assert host.endpoint().state is State.READY


def test_sleeping_lets_what_runs_and_waits_finish(host: Host) -> None:
    ids = [host.submit(f"job {number}", num_inference_steps=20) for number in range(12)]
    host.command(Command.SLEEP)
    assert [host.state(request_id)["status"] for request_id in ids] == ["done"] * 12
    assert host.endpoint().state is State.SLEEPING


def test_a_request_during_the_drain_keeps_the_endpoint_awake(host: Host) -> None:
    host.command(Command.START)
    host.wait_for(State.READY)
    first = host.submit("long", num_inference_steps=50)
    sleeping = host.pool.submit(host.command, Command.SLEEP)
    host.wait_for(State.DRAINING)
    assert host.post("late").status_code == 200
    host.wait_until(first, "done")
    sleeping.result()
    assert host.endpoint().state is State.READY


def test_of_two_updates_at_once_one_is_recorded_and_goes_live(host: Host) -> None:
    host.command(Command.START)
    host.wait_for(State.READY)
    specs = [endpoint("fake:step_s=0.005", default_guidance=value) for value in (3.0, 4.0)]

    async def both() -> list[int | BaseException]:
        updates = (registry(host).update(host.endpoint(), to(spec), "test") for spec in specs)
        return await asyncio.gather(*updates, return_exceptions=True)

    before = host.run(registry(host).history("one"))[0].version
    done, refused = host.run(both())
    assert done == before + 1
    assert isinstance(refused, ConflictError)
    assert host.run(registry(host).history("one"))[0].version == before + 1
    host.wait_for(State.READY)
    assert host.endpoint().spec == specs[0]


@attack("Two endpoints of one ID at once", outcome="one gets 409")
def test_of_two_endpoints_made_at_once_under_one_id_one_is_refused(host: Host) -> None:
    async def both() -> list[Endpoint | BaseException]:
        spec = endpoint(id="twin")
        return await asyncio.gather(
            *(registry(host).create(spec, "test") for _ in range(2)), return_exceptions=True
        )

    made, refused = host.run(both())
    assert isinstance(refused, ConflictError), refused
    assert made is host.endpoint("twin")
    host.run(registry(host).delete(host.endpoint("twin")))


def test_an_update_fails_no_request(host: Host) -> None:
    old = host.endpoint().current.replicas[0].pid
    version = host.endpoint().current.version
    pool = [host.post_soon(f"job {number}", num_inference_steps=20) for number in range(20)]
    assert update(host, endpoint("fake:step_s=0.005", default_guidance=9.0)) == version + 1
    pool += [host.post_soon(f"later job {number}", num_inference_steps=20) for number in range(20)]
    host.wait_for(State.READY)
    assert [one.result().status_code for one in pool] == [200] * 40
    assert host.endpoint().current.version == version + 1
    assert host.endpoint().spec.default_guidance == 9.0
    assert host.endpoint().current.replicas[0].pid not in (None, old)
    assert host.picture(seed=1) == host.picture(seed=1, guidance_scale=9.0)


def test_an_update_that_cannot_load_leaves_the_old_version_serving(host: Host) -> None:
    before = host.endpoint().current
    update(host, endpoint("fake:fail_load=permanent"))
    host.until(lambda: host.endpoint().update_failure)
    assert host.endpoint().current is before
    assert host.endpoint().update_failure == "the fake model cannot be loaded"
    assert host.post().status_code == 200
    update(host, endpoint("fake:step_s=0.01"))
    host.wait_for(State.READY)
    assert host.endpoint().update_failure == ""


def test_a_second_update_waits_for_the_first(host: Host) -> None:
    update(host, endpoint("fake:load_s=0.5"))
    with pytest.raises(ConflictError, match="being updated"):
        update(host, endpoint("fake"))
    host.wait_for(State.READY)


def test_an_update_in_the_middle_of_a_restart_takes_its_place(host: Host) -> None:
    host.command(Command.RESTART)
    version = update(host, endpoint("fake:step_s=0.01", default_guidance=2.0))
    host.wait_for(State.READY)
    assert (host.endpoint().current.version, host.endpoint().spec.default_guidance) == (version, 2.0)
    assert host.run(registry(host).history("one"))[0].version == version


@attack("Commands to an endpoint that is being deleted", outcome="404")
def test_a_command_to_an_endpoint_that_is_being_deleted_comes_too_late(host: Host) -> None:
    made = host.run(registry(host).create(endpoint(id="brief"), "test"))

    async def both() -> tuple[object, object]:
        changes = (registry(host).delete(made), registry(host).command(made, Command.RESTART))
        return await asyncio.gather(*changes, return_exceptions=True)

    deleted, refused = host.run(both())
    assert deleted is None
    assert isinstance(refused, NotFoundError)
    assert made.state is State.STOPPED
    assert made.current.replicas[0].pid is None


@attack("A refused command, then a restart", outcome="it left nothing in the database")
def test_a_command_that_is_refused_is_not_recorded(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path)) as host:
        key = host.first_key
        host.command(Command.TERMINATE)
        with pytest.raises(ConflictError, match="restart it first"):
            host.command(Command.SLEEP)
    with hosting(settings_for(tmp_path), ready=False, key=key) as host:
        assert host.endpoint().state is State.STOPPED


@attack("An update that cannot load, then a restart", outcome="the version that works is loaded")
def test_an_update_that_could_not_load_is_not_loaded_at_the_next_start(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path)) as host:
        key = host.first_key
        update(host, endpoint("fake:fail_load=permanent"))
        host.until(lambda: host.endpoint().update_failure)
    with hosting(settings_for(tmp_path), key=key) as host:
        assert host.endpoint().current.version == 1
        assert host.post().status_code == 200
        assert update(host, endpoint(default_steps=7)) == 3, "the history keeps the number that was used"
        host.wait_for(State.READY)
    with hosting(settings_for(tmp_path), key=key) as host:
        assert (host.endpoint().current.version, host.endpoint().spec.default_steps) == (3, 7)


def test_an_update_that_was_never_tried_is_tried_after_a_restart_of_the_server(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path)) as host:
        key = host.first_key
        host.command(Command.SLEEP)
        update(host, endpoint("fake:fail_load=permanent"))
        assert host.endpoint().spec.model == "fake:fail_load=permanent"
    with hosting(settings_for(tmp_path), ready=False, key=key) as host:
        assert host.endpoint().state is State.SLEEPING
        assert host.endpoint().current.version == 2
        assert host.post().status_code == 200, "the version before it serves"
        assert host.endpoint().update_failure == "the fake model cannot be loaded"
    with hosting(settings_for(tmp_path), ready=False, key=key) as host:
        assert host.endpoint().current.version == 1


def test_a_configuration_file_that_cannot_be_loaded_runs_no_older_version(
    tmp_path: Path,
) -> None:
    with hosting(settings_for(tmp_path)) as host:
        key = host.first_key
    changed = settings_for(tmp_path, endpoint("fake:fail_load=permanent"))
    with hosting(changed, ready=False, key=key) as host:
        host.wait_for(State.FAILED)


def test_restart_gives_new_workers_and_fails_no_request(host: Host) -> None:
    old = host.endpoint().current.replicas[0].pid
    pool = [host.post_soon(f"job {number}", num_inference_steps=20) for number in range(10)]
    host.command(Command.RESTART)
    host.command(Command.RESTART)  # new workers are coming already
    host.wait_for(State.READY)
    assert [one.result().status_code for one in pool] == [200] * 10
    assert host.endpoint().current.replicas[0].pid != old


def test_a_terminated_endpoint_refuses_until_it_is_restarted(host: Host) -> None:
    waiting = host.submit("long", num_inference_steps=50)
    assert host.command(Command.TERMINATE, drain_s=0.01) is State.STOPPED
    assert host.state(waiting)["status"] == "cancelled"
    answer = host.post()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "endpoint_stopped")
    host.command(Command.RESTART)
    assert host.post().status_code == 200


def test_an_idle_endpoint_falls_asleep(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, endpoint(idle_sleep_s=0.3))) as host:
        host.wait_for(State.SLEEPING)
        assert host.post().status_code == 200
        host.wait_for(State.SLEEPING)


def test_a_start_that_is_known_to_last_too_long_for_a_deadline_is_503(tmp_path: Path) -> None:
    spec = endpoint("fake:load_s=1")
    with hosting(settings_for(tmp_path, spec)) as host:
        host.command(Command.SLEEP)
        answer = host.post(headers={"x-request-timeout-s": "0.5"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "endpoint_starting")
        assert 1 <= int(answer.headers["retry-after"]) <= 2
        assert host.endpoint().state is State.STARTING, "the request woke it all the same"
        assert host.post().status_code == 200


def test_what_was_wanted_and_updated_survives_a_restart_of_the_server(
    tmp_path: Path, database_url: str
) -> None:
    settings = settings_for(tmp_path, endpoint(), endpoint(id="two"), database_url=database_url)
    with hosting(settings) as host:
        key = host.first_key
        host.run(registry(host).create(endpoint(id="made"), "test"))
        update(host, endpoint(default_steps=9))
        host.command(Command.SLEEP, endpoint_id="two")
        url = host.post(response_format="url").json()["data"][0]["url"]
        path = url.removeprefix(host.url)
    with hosting(settings, ready=False, key=key) as host:
        assert [one.id for one in registry(host)] == ["one", "two", "made"]
        host.wait_for(State.READY, endpoint_id="made")
        assert host.endpoint("two").state is State.SLEEPING
        assert (host.endpoint().spec.default_steps, host.endpoint().current.version) == (9, 2)
        assert host.client.get(path).status_code == 200, "a URL outlives the server that made it"
        history = host.run(registry(host).history("one"))
        assert [entry.version for entry in history] == [2, 1]
    changed = settings_for(tmp_path, endpoint(default_steps=3), database_url=database_url)
    with hosting(changed, key=key) as host:
        assert [one.id for one in registry(host)] == ["one", "made"], "what left the file is gone"
        assert (host.endpoint().spec.default_steps, host.endpoint().current.version) == (3, 3)


def test_jobs_that_came_before_the_model_was_known_are_checked_when_it_is(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, endpoint("fake:load_s=0.3")), ready=False) as host:
        answer = host.post(width=20, height=20)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, "width")
