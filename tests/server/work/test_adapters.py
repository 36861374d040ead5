"""The adapter registry, its files and its admin API, over real HTTP with workers that take any file."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mezzotint.config import AdapterSettings
from mezzotint.errors import ConfigError, InvalidRequestError
from mezzotint.messages import AdapterAdded
from mezzotint.server.app import create_app
from mezzotint.server.store.adapter_files import AdapterFile, copy_source, remove_unused
from mezzotint.server.store.adapters import AdapterState, AdapterTable, Origin
from mezzotint.server.store.database import open_database
from mezzotint.server.work import adapters as registry
from mezzotint.server.work.lifecycle import State
from tests.attacks import attack
from tests.engine import fake_hub
from tests.server.hosting import FAKE, PATIENCE_S, Host, endpoint, hosting, settings_for

ADAPTERS = "/dedicated/beta/endpoint/one/adapters"
MAX_BYTES = 100_000


def write(file: Path, rank: int = 4, text: str = "a") -> Path:
    """A safetensors file as a trainer would write it, as far as the server looks."""
    data = text.encode() * (rank * 16)
    shape = {"dtype": "F32", "shape": [rank, 4], "data_offsets": [0, len(data)]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "transformer.a.lora_A.weight": shape}).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return file


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with hosting(settings_for(tmp_path_factory.mktemp("server"))) as running:
        yield running


@pytest.fixture
def host(server: Host) -> Iterator[Host]:
    """The server, which each test leaves without adapters."""
    yield server
    for route in routes_of(server):
        assert server.client.delete(f"{ADAPTERS}/{route}").status_code == 200


def add(host: Host, route: str, source: Path | str, expected: int = 200, **fields: Any) -> dict[str, Any]:
    answer = host.client.post(ADAPTERS, json={"route": route, "source": str(source), **fields})
    assert answer.status_code == expected, answer.text
    values: dict[str, Any] = answer.json()
    return values


def routes_of(host: Host) -> list[str]:
    return [entry["route"] for entry in host.client.get(ADAPTERS).json()["data"]]


def models(host: Host) -> list[str]:
    return [entry["id"] for entry in host.client.get("/v1/models").json()["data"]]


# ---------------------------------------------------------------- the admin API


def test_an_added_adapter_serves_at_once_and_is_listed_everywhere(host: Host, tmp_path: Path) -> None:
    file = write(tmp_path / "flat.safetensors")
    base = host.picture(seed=1)
    answer = host.post(model="one:flat", seed=1)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "adapter_not_found")

    added = add(host, "flat", file, scale=0.5)
    assert added["checksum"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (added["name"], added["scale"], added["rank"], added["state"]) == ("one:flat", 0.5, 4, "ready")
    assert added["target_modules"] == ["to_q"]
    assert "data/adapters" not in json.dumps(added)

    assert host.picture(model="one:flat", seed=1) != base
    assert host.picture(seed=1) == base
    assert models(host) == ["one", "one:flat"]
    assert routes_of(host) == ["flat"]


@attack("Adding an adapter with an ordinary key", outcome="403")
def test_only_an_admin_key_may_call_it(host: Host, tmp_path: Path) -> None:
    body = {"route": "flat", "source": str(write(tmp_path / "flat.safetensors"))}
    with host.new_client() as plain:
        for method, path in (("GET", ADAPTERS), ("POST", ADAPTERS), ("DELETE", f"{ADAPTERS}/flat")):
            answer = plain.request(method, path, json=body if method == "POST" else None)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden"), path
    assert routes_of(host) == []


def test_an_unknown_route_names_the_nearest_that_the_key_may_use(host: Host, tmp_path: Path) -> None:
    add(host, "watercolour", write(tmp_path / "a.safetensors"))
    error = host.post(model="one:watercolor").json()["error"]
    assert error["code"] == "adapter_not_found"
    assert "one:watercolour" in error["message"]
    answer = host.client.delete(f"{ADAPTERS}/watercolor")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "adapter_not_found")
    assert "did you mean watercolour?" in answer.json()["error"]["message"]


def test_a_route_is_only_replaced_when_asked_for(host: Host, tmp_path: Path) -> None:
    add(host, "flat", write(tmp_path / "a.safetensors"))
    other = write(tmp_path / "b.safetensors", text="b")
    assert add(host, "flat", other, 409)["error"]["code"] == "conflict"
    replaced = add(host, "flat", other, replace=True, scale=2.0)
    assert replaced["checksum"] == hashlib.sha256(other.read_bytes()).hexdigest()
    assert (replaced["scale"], routes_of(host)) == (2.0, ["flat"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"route": "a:b", "source": "x"}, "route"),
        ({"route": "", "source": "x"}, "route"),
        ({"route": "a", "source": ""}, "source"),
        ({"route": "a"}, "source"),
        ({"route": "a", "source": "x", "scale": 11}, "scale"),
        ({"route": "a", "source": "x", "scale": "much"}, "scale"),
        ({"route": "a", "source": "x", "path": "/etc/passwd"}, "path"),
    ],
)
def test_a_bad_body_is_refused(host: Host, fields: dict[str, Any], param: str) -> None:
    answer = host.client.post(ADAPTERS, json=fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)


def test_what_the_worker_refuses_is_not_registered(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanishing(*values: Any) -> AdapterFile:
        kept = copy_source(*values)
        kept.path.unlink()
        return kept

    add(host, "flat", write(tmp_path / "b.safetensors", text="b"))
    before = host.picture(model="one:flat", seed=1)
    monkeypatch.setattr(registry, "copy_source", vanishing)
    file = write(tmp_path / "a.safetensors")
    for body in ({"route": "gone"}, {"route": "flat", "replace": True}):
        error = add(host, source=file, expected=422, **body)["error"]
        assert (error["param"], error["code"]) == ("source", "adapter_load_failed")
    assert models(host) == ["one", "one:flat"]
    (entry,) = host.client.get(ADAPTERS).json()["data"]
    assert (entry["route"], entry["state"]) == ("flat", "ready")
    assert host.picture(model="one:flat", seed=1) == before


@pytest.fixture
def two_files(host: Host, tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """Two adapters' files by their checksum, each with the picture that route `flat` gives with it."""
    found = {}
    for text in "ab":
        file = write(tmp_path / f"{text}.safetensors", text=text)
        checksum = add(host, "flat", file)["checksum"]
        found[checksum] = (file, host.picture(model="one:flat", seed=1))
        assert host.client.delete(f"{ADAPTERS}/flat").status_code == 200
    assert len({picture for _, picture in found.values()}) == 2
    return found


def race(host: Host, files: Iterable[Path], **fields: Any) -> list[int]:
    """Adds these files to route `flat` at the same moment; the status of each answer."""
    bodies = [{"route": "flat", "source": str(file), **fields} for file in files]
    together = threading.Barrier(len(bodies))

    def post(body: dict[str, Any]) -> int:
        together.wait(PATIENCE_S)
        return host.client.post(ADAPTERS, json=body).status_code

    return list(host.pool.map(post, bodies))


def agreed(host: Host) -> tuple[str, str]:
    """The checksum that list, database and requests' record hold, and the picture that the worker makes."""
    (listed,) = host.client.get(ADAPTERS).json()["data"]
    (stored,) = host.service.adapters.table.list("one")
    assert listed["checksum"] == stored.checksum == host.endpoint().adapters["flat"].checksum
    assert hashlib.sha256(stored.path.read_bytes()).hexdigest() == stored.checksum
    return stored.checksum, host.picture(model="one:flat", seed=1)


@attack("Two adds of one route at once", outcome="one gets 409; files, workers and requests agree")
@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_simultaneous_adds_of_one_route_one_is_refused(
    host: Host, two_files: dict[str, tuple[Path, str]], overwrite: bool
) -> None:
    for _ in range(40):
        statuses = race(host, [file for file, _ in two_files.values()], replace=overwrite)
        assert sorted(statuses) == ([200, 200] if overwrite else [200, 409])
        checksum, picture = agreed(host)
        assert picture == two_files[checksum][1], "the worker holds what the database says"
        if not overwrite:
            assert statuses[list(two_files).index(checksum)] == 200
        assert host.client.delete(f"{ADAPTERS}/flat").status_code == 200


@attack("Two adds of one route, one file bad", outcome="the good one serves")
def test_a_refused_file_among_two_simultaneous_adds_costs_the_good_one_nothing(
    host: Host, two_files: dict[str, tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanishing(source: str, *values: Any) -> AdapterFile:
        kept = copy_source(source, *values)
        if source == str(bad):
            kept.path.unlink()
        return kept

    (good, picture), (bad, _) = two_files.values()
    monkeypatch.setattr(registry, "copy_source", vanishing)
    for _ in range(40):
        statuses = race(host, (good, bad))
        assert statuses[0] == 200
        assert statuses[1] in (409, 422)
        assert agreed(host) == (next(iter(two_files)), picture)
        assert host.client.delete(f"{ADAPTERS}/flat").status_code == 200
        assert host.post(model="one:flat").status_code == 404


def test_removing_lets_requests_that_were_taken_in_finish(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with hosting(settings_for(tmp_path, endpoint(max_jobs=1))) as host:
        add(host, "flat", write(tmp_path / "flat.safetensors"))
        wanted = host.picture(model="one:flat", seed=1)
        running = host.submit(f"a cat !wait@2:{gate}", model="one:flat")
        queued = [host.post_soon(model="one:flat", seed=1) for _ in range(3)]
        host.wait_until(running, "running")
        host.until(lambda: len(host.endpoint().dispatcher.queue) == len(queued))
        assert host.endpoint().dispatcher.uses_adapter("flat")
        assert host.client.delete(f"{ADAPTERS}/flat").status_code == 200
        assert host.post(model="one:flat").status_code == 404
        assert models(host) == ["one"]
        gate.touch()
        for answer in queued:
            assert answer.result().json()["data"][0]["b64_json"] == wanted
        host.wait_until(running, "done")


# ---------------------------------------------------------------- across restarts


def test_a_request_that_waited_for_its_worker_finds_its_adapter(tmp_path: Path) -> None:
    named = (AdapterSettings(route="flat", source=str(write(tmp_path / "flat.safetensors"))),)
    with hosting(settings_for(tmp_path, endpoint("fake:load_s=0.5", adapters=named)), ready=False) as host:
        assert host.post(model="one:flat").status_code == 200, "it came while the model was loading"
        fatal = f"a cat !die-once@2:{tmp_path / 'flag'}"
        answer = host.post(fatal, model="one:flat")
        assert answer.status_code == 200, f"its worker died, and the next one runs it again: {answer.text}"


def test_adapters_survive_a_restart_and_the_loss_of_their_source(tmp_path: Path) -> None:
    file = write(tmp_path / "flat.safetensors")
    with hosting(settings_for(tmp_path)) as host:
        add(host, "flat", file, scale=0.5)
        before = host.picture(model="one:flat", seed=1)
        key = host.first_key
    file.unlink()
    with hosting(settings_for(tmp_path), key=key) as host:
        assert host.picture(model="one:flat", seed=1) == before
        (entry,) = host.client.get(ADAPTERS).json()["data"]
        assert (entry["scale"], entry["origin"], entry["state"]) == (0.5, "api", "ready")


def test_an_adapter_that_a_starting_worker_refuses_is_shown_and_says_why(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path)) as host:
        add(host, "flat", write(tmp_path / "flat.safetensors"))
        key = host.first_key
        host.endpoint().adapters["flat"].path.unlink()
    with hosting(settings_for(tmp_path), key=key) as host:
        host.until(lambda: host.endpoint().adapters["flat"].state is AdapterState.REFUSED)
        error = host.post(model="one:flat").json()["error"]
        assert (error["param"], error["code"]) == ("model", "adapter_load_failed")
        assert "one:flat cannot be used" in error["message"]
        (entry,) = host.client.get(ADAPTERS).json()["data"]
        assert (entry["state"], entry["failure"] is None) == ("failed", False)


def test_adapters_of_the_configuration_come_change_and_go_with_it(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.safetensors"), write(tmp_path / "b.safetensors", text="b")

    def settings(*named: tuple[str, Path, float]) -> Any:
        wanted = tuple(AdapterSettings(route=r, source=str(f), scale=s) for r, f, s in named)
        return settings_for(tmp_path, endpoint(adapters=wanted))

    def registered(*named: tuple[str, Path, float]) -> dict[str, tuple[float, str]]:
        app = create_app(settings(*named), worker=FAKE)
        service = app.state.context
        service.registry.load(service.settings.endpoints)
        service.adapters.load(service.registry)
        found = {each.route: (each.scale, each.checksum) for each in service.adapters.table.list("one")}
        assert set(next(iter(service.registry)).adapters) == set(found)
        service.engine.dispose()
        return found

    sums = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (first, second)]
    assert registered(("a", first, 1.0)) == {"a": (1.0, sums[0])}
    assert registered(("a", first, 0.5), ("b", second, 1.0)) == {"a": (0.5, sums[0]), "b": (1.0, sums[1])}
    assert registered(("a", second, 0.5)) == {"a": (0.5, sums[1])}
    again = write(tmp_path / "c.safetensors", text="b")
    assert registered(("a", again, 0.7)) == {"a": (0.7, sums[1])}, "the same content from elsewhere"
    assert registered(("a", second, 0.5)) == {"a": (0.5, sums[1])}
    second.unlink()
    assert registered(("a", second, 0.5)) == {"a": (0.5, sums[1])}, (
        "the copy stands for a source that is gone"
    )
    assert registered() == {}
    with pytest.raises(ConfigError, match=r"endpoint one, adapter a: .*was not found"):
        registered(("a", second, 0.5))


def test_what_the_api_added_stays_when_the_configuration_names_others(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors")
    with hosting(settings_for(tmp_path)) as host:
        add(host, "mine", file)
        key = host.first_key
    named = endpoint(adapters=(AdapterSettings(route="theirs", source=str(file)),))
    with hosting(settings_for(tmp_path, named), key=key) as host:
        assert routes_of(host) == ["mine", "theirs"]


@attack(
    "Deleting an adapter whose source is gone, then a restart",
    outcome="the server starts; the adapter stays deleted",
)
@pytest.mark.parametrize("lost", [False, True])
def test_an_adapter_named_at_creation_and_deleted_later_stays_deleted(tmp_path: Path, lost: bool) -> None:
    file = write(tmp_path / "ink.safetensors")
    named = [{"route": "ink", "source": str(file)}, {"route": "kept", "source": str(file)}]
    made = ADAPTERS.replace("/one/", "/made/")
    with hosting(settings_for(tmp_path)) as host:
        body = {"name": "made", "settings": {"model": "fake", "adapters": named}}
        assert host.client.post("/dedicated/beta/endpoint", json=body).status_code == 200
        host.wait_for(State.READY, endpoint_id="made")
        assert host.client.delete(f"{made}/ink").status_code == 200
        key = host.first_key
    if lost:
        file.unlink()
    with hosting(settings_for(tmp_path), key=key) as host:
        (entry,) = host.client.get(made).json()["data"]
        assert (entry["route"], entry["origin"], entry["state"]) == ("kept", "api", "ready")


@attack("Adding an adapter while its endpoint is deleted", outcome="it is in no place")
def test_an_adapter_added_while_its_endpoint_is_deleted_is_in_no_place(host: Host, tmp_path: Path) -> None:
    file = write(tmp_path / "flat.safetensors")
    path = "/dedicated/beta/endpoint/brief"
    for _ in range(5):
        body = {"name": "brief", "settings": {"model": "fake"}}
        assert host.client.post("/dedicated/beta/endpoint", json=body).status_code == 200
        host.wait_for(State.READY, endpoint_id="brief")
        adding = host.pool.submit(
            host.client.post, f"{path}/adapters", json={"route": "a", "source": str(file)}
        )
        assert host.client.delete(path).status_code == 200
        assert adding.result().status_code in (200, 404, 422)
        assert host.service.adapters.table.list("brief") == []


def test_a_removed_adapter_serves_those_taken_in_across_the_death_of_the_worker(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, endpoint("fake:step_s=0.02"))) as host:
        add(host, "flat", write(tmp_path / "flat.safetensors"))
        fatal = f"a cat !die-once@15:{tmp_path / 'flag'}"
        answer = host.post_soon(fatal, model="one:flat", num_inference_steps=20)
        host.until(lambda: host.endpoint().dispatcher.uses_adapter("flat"))
        assert host.client.delete(f"{ADAPTERS}/flat").status_code == 200
        assert host.post(model="one:flat").status_code == 404
        assert answer.result().status_code == 200, answer.result().text
        assert (tmp_path / "flag").exists()


def test_built_in_adapters_belong_to_the_built_in_model_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "models" / "emoji" / "adapters" / "flat.safetensors")
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    assert [adapter.route for adapter in registry.built_in_adapters("emoji")] == ["flat"]
    assert registry.built_in_adapters("owner/model") == []


@pytest.fixture
def built_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AdapterSettings:
    """An adapter `flat` that comes with the model of endpoint `one`."""
    own = AdapterSettings(route="flat", source=str(write(tmp_path / "package" / "flat.safetensors")))
    monkeypatch.setattr(registry, "built_in_adapters", lambda model: [own])
    return own


def test_a_built_in_adapter_serves_from_the_start_and_cannot_be_removed(
    tmp_path: Path, built_in: AdapterSettings
) -> None:
    with hosting(settings_for(tmp_path)) as host:
        assert models(host) == ["one", "one:flat"]
        assert host.picture(model="one:flat", seed=1) != host.picture(seed=1)
        answer = host.client.delete(f"{ADAPTERS}/flat")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")
        assert "comes with the built-in model" in answer.json()["error"]["message"]
        assert models(host) == ["one", "one:flat"]


def test_ones_own_adapter_takes_the_place_of_a_built_in_one_and_gives_it_back(
    tmp_path: Path, built_in: AdapterSettings
) -> None:
    mine = write(tmp_path / "mine.safetensors", text="b")
    with hosting(settings_for(tmp_path)) as host:
        message = add(host, "flat", mine, 409)["error"]["message"]
        assert "has the built-in adapter flat already; take another route, or replace it" in message
        assert add(host, "flat", mine, replace=True)["origin"] == "api"
        key = host.first_key
    with hosting(settings_for(tmp_path), key=key) as host:
        (entry,) = host.client.get(ADAPTERS).json()["data"]
        assert (entry["origin"], entry["source"]) == ("api", str(mine)), "it survives a restart"
        in_use = host.endpoint().adapters["flat"]
        assert host.client.delete(f"{ADAPTERS}/flat").status_code == 200
        (entry,) = host.client.get(ADAPTERS).json()["data"]
        assert (entry["origin"], entry["source"]) == ("built-in", built_in.source)
        assert host.endpoint().adapters["flat"].checksum == entry["checksum"] != in_use.checksum
        assert host.post(model="one:flat").status_code == 200


def test_the_configuration_may_take_a_built_in_route_for_a_while(
    tmp_path: Path, built_in: AdapterSettings
) -> None:
    mine = AdapterSettings(route="flat", source=str(write(tmp_path / "mine.safetensors", text="b")))
    origins = []
    for named in ((), (mine,), ()):
        app = create_app(settings_for(tmp_path, endpoint(adapters=named)), worker=FAKE)
        service = app.state.context
        service.registry.load(service.settings.endpoints)
        service.adapters.load(service.registry)
        origins += [(each.source, each.origin) for each in service.adapters.table.list("one")]
        service.engine.dispose()
    own = (built_in.source, "built-in")
    assert origins == [own, (mine.source, "configuration"), own]


# ---------------------------------------------------------------- without a server


@pytest.fixture
def table(tmp_path: Path, database_url: str) -> Iterator[AdapterTable]:
    engine = open_database(database_url)
    yield AdapterTable(engine, tmp_path / "kept")
    engine.dispose()


def test_the_table_works_on_a_data_folder_alone(table: AdapterTable, tmp_path: Path) -> None:
    file = write(tmp_path / "flat.safetensors", rank=8)
    kept = copy_source(str(file), table.folder, MAX_BYTES)
    settings = AdapterSettings(route="flat", source=str(file))
    record = registry._registered("one", settings, kept, Origin.API)
    table.save(record)
    (stored,) = table.list("one")
    assert (stored, stored.rank, stored.shown()["state"]) == (record, 8, "unchecked")
    checked = record.after(AdapterAdded("flat", str(kept.path), 8, 64, ["to_q"]), "FluxPipeline")
    table.save(checked)
    assert table.list() == [checked], "what a worker found out is kept"
    table.delete(checked)
    assert table.list() == []


def test_a_thousand_adapters_are_listed_in_order(table: AdapterTable, tmp_path: Path) -> None:
    file = str(write(tmp_path / "flat.safetensors"))
    kept = copy_source(file, table.folder, MAX_BYTES)
    for number in range(1000):
        adapter = AdapterSettings(route=f"a{number:03}", source=file)
        table.save(registry._registered("one", adapter, kept, Origin.API))
    assert [each.route for each in table.list("one")] == [f"a{number:03}" for number in range(1000)]
    assert len(list(table.folder.iterdir())) == 1, "one copy serves all"


# ---------------------------------------------------------------- sources


def test_one_copy_is_kept_by_its_content(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    first = copy_source(str(write(tmp_path / "a.safetensors")), folder, MAX_BYTES)
    same = copy_source(str(write(tmp_path / "b.safetensors")), folder, MAX_BYTES)
    other = copy_source(str(write(tmp_path / "c.safetensors", text="c")), folder, MAX_BYTES)
    assert first == same
    assert first.path != other.path
    assert [entry for entry in folder.iterdir() if entry.name.startswith(".")] == []


def test_a_copy_that_another_thread_has_just_made_is_never_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(write(tmp_path / "a.safetensors"))
    first = copy_source(source, tmp_path / "kept", MAX_BYTES)
    made = first.path.stat().st_ino
    is_file, unseen = Path.is_file, [first.path]

    def look(path: Path) -> bool:
        """As if the other thread's copy had come just after the first look."""
        return is_file(path) and not (path in unseen and unseen.pop())

    monkeypatch.setattr(Path, "is_file", look)
    assert copy_source(source, tmp_path / "kept", MAX_BYTES) == first
    assert (unseen, first.path.stat().st_ino) == ([], made)


def test_a_peft_folder_keeps_its_configuration_beside_the_weights(tmp_path: Path) -> None:
    folder = tmp_path / "peft"
    write(folder / "adapter_model.safetensors")
    plain = copy_source(str(folder / "adapter_model.safetensors"), tmp_path / "kept", MAX_BYTES)
    (folder / "adapter_config.json").write_text('{"lora_alpha": 8}')
    kept = copy_source(str(folder), tmp_path / "kept", MAX_BYTES)
    assert kept.path.with_name("adapter_config.json").read_text() == '{"lora_alpha": 8}'
    assert kept.checksum == plain.checksum
    assert kept.path != plain.path, "another alpha is another adapter"


def _torn(file: Path) -> Path:
    file.write_bytes(write(file).read_bytes()[:-1])
    return file


def _text(file: Path, text: str = "hello, this is no safetensors file") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


BAD_SOURCES: dict[str, tuple[Any, str, str]] = {
    "a name too long": (lambda f: f / ("a" * 5000), "adapter_source_not_found", "cannot be looked at"),
    "nobody's home": (lambda f: "~nobody-of-that-name/a", "adapter_source_not_found", "cannot be looked at"),
    "nothing there": (lambda f: f / "none.safetensors", "adapter_source_not_found", "no file or folder"),
    "a pickle": (lambda f: _text(f / "a.bin"), "adapter_unsupported", "pickle"),
    "another file": (lambda f: _text(f / "a.txt"), "adapter_unsupported", "no safetensors file"),
    "an empty file": (lambda f: _text(f / "a.safetensors", ""), "adapter_broken", "not a whole"),
    "text": (lambda f: _text(f / "a.safetensors"), "adapter_broken", "not a whole"),
    "torn": (lambda f: _torn(f / "a.safetensors"), "adapter_broken", "its table says"),
    "an empty folder": (lambda f: f, "adapter_source_not_found", "no safetensors file"),
    "only a pickle in a folder": (lambda f: _text(f / "a.pt").parent, "adapter_unsupported", "pickle"),
    "two in a folder": (
        lambda f: (write(f / "a.safetensors"), write(f / "b.safetensors"))[0].parent,
        "adapter_source_not_found",
        "name one of them",
    ),
    "too large": (lambda f: write(f / "a.safetensors", rank=10_000), "adapter_too_large", "adapter_bytes"),
}


@attack("Adapter sources that are pickles, cut short or missing", outcome="422; nothing is stored")
@pytest.mark.parametrize("case", BAD_SOURCES)
def test_a_bad_source_is_refused_before_anything_is_stored(case: str, tmp_path: Path) -> None:
    make, code, text = BAD_SOURCES[case]
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(InvalidRequestError, match=text) as caught:
        copy_source(str(make(source)), tmp_path / "kept", 10_000)
    assert (caught.value.code, caught.value.param) == (code, "source")
    assert list((tmp_path / "kept").glob("*")) == []


def test_copies_that_nothing_points_to_are_removed_when_they_are_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "kept"
    used = copy_source(str(write(tmp_path / "a.safetensors")), folder, MAX_BYTES)
    unused = copy_source(str(write(tmp_path / "b.safetensors", text="b")), folder, MAX_BYTES)
    remove_unused(folder, {used.path})
    assert unused.path.is_file()
    monkeypatch.setattr("mezzotint.server.store.adapter_files.UNUSED_S", -1.0)
    remove_unused(folder, {used.path})
    assert used.path.is_file()
    assert not unused.path.exists()


SOURCES = ["own/lora", "own/lora:b.safetensors", "own/lora:b.safetensors@v1"]


def point_at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_hub.FakeHub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with fake_hub.serve() as running:
        point_at(monkeypatch, running.url)
        yield running


@pytest.mark.parametrize("source", SOURCES)
def test_an_adapter_of_a_hub_repository_is_kept(source: str, hub: fake_hub.FakeHub, tmp_path: Path) -> None:
    files = {name: write(tmp_path / "repo" / name, text=name[0]) for name in ("b.safetensors",)}
    _text(tmp_path / "repo" / "README.md")
    hub.folders["own/lora"] = tmp_path / "repo"
    kept = copy_source(source, tmp_path / "kept", MAX_BYTES)
    assert kept.path.read_bytes() == files["b.safetensors"].read_bytes()


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("own/none", "does not exist or is private"),
        ("own/lora:none.safetensors", "has no file"),
        ("own/lora:b.safetensors@v9", "has no revision"),
        ("own/gated:b.safetensors", "is gated"),
    ],
)
def test_what_the_hub_does_not_have_is_a_sentence(
    source: str, text: str, hub: fake_hub.FakeHub, tmp_path: Path
) -> None:
    write(tmp_path / "repo" / "b.safetensors")
    hub.folders |= {"own/lora": tmp_path / "repo", "own/gated": tmp_path / "repo"}
    hub.gated.add("own/gated")
    with pytest.raises(InvalidRequestError, match=text):
        copy_source(source, tmp_path / "kept", MAX_BYTES)


@pytest.mark.parametrize("source", SOURCES)
def test_a_hub_that_is_away_is_told_at_once(
    source: str, hub: fake_hub.FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(seconds: float) -> None:
        pytest.fail(f"it waits {seconds} s before it asks again")

    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", wait)
    point_at(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(InvalidRequestError, match=r"cannot be reached, .*copy the file") as caught:
        copy_source(source, tmp_path / "kept", MAX_BYTES)
    assert caught.value.code == "adapter_source_not_found"


@attack("A Hub that accepts and never answers", outcome="a sentence after ten seconds")
def test_a_hub_that_says_nothing_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mezzotint.hub.CONTACT_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_at(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(InvalidRequestError, match="cannot be reached"):
            copy_source("own/nowhere", tmp_path / "kept", MAX_BYTES)


@pytest.mark.parametrize("source", SOURCES)
def test_what_was_fetched_before_needs_no_hub(
    source: str, hub: fake_hub.FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "repo" / "b.safetensors")
    _text(tmp_path / "repo" / "README.md")
    hub.folders["own/lora"] = tmp_path / "repo"
    first = copy_source(source, tmp_path / "kept", MAX_BYTES)
    point_at(monkeypatch, "http://127.0.0.1:9")
    assert copy_source(source, tmp_path / "kept", MAX_BYTES) == first


@attack("A repository with an adapter above the limit", outcome="not fetched")
def test_a_repository_file_over_the_limit_is_not_fetched(hub: fake_hub.FakeHub, tmp_path: Path) -> None:
    write(tmp_path / "repo" / "b.safetensors", rank=10_000)
    hub.folders["own/lora"] = tmp_path / "repo"
    with pytest.raises(InvalidRequestError, match="raise adapter_bytes") as caught:
        copy_source("own/lora", tmp_path / "kept", 10_000)
    assert caught.value.code == "adapter_too_large"
    assert "b.safetensors" not in hub.downloads()
