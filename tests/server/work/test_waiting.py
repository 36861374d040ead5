"""What users are told while they wait: the model that loads, the picture and its steps, why nothing comes."""

from __future__ import annotations

from pathlib import Path

import pytest

from mezzotint.errors import without_folders
from mezzotint.messages import Loading
from mezzotint.server.work.lifecycle import State
from tests.server.hosting import Host, client, endpoint, hosting, settings_for


def stage_of(host: Host) -> str:
    loading = host.endpoint().current.replicas[0].loading
    return loading.stage if loading else ""


def test_a_request_for_a_model_that_loads_says_so(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, endpoint("fake:hang_at_start=1")), ready=False) as host:
        request = host.submit()
        host.until(lambda: stage_of(host) == "loading the model")
        state = host.state(request)
        assert (state["status"], state["loading"]["fraction"]) == ("queued", 0.0)


def test_where_a_worker_does_not_know_its_fraction_the_last_start_tells_it(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, endpoint(f"fake:load_s=0.2,hang_at_start=1,once={tmp_path / 'flag'}"))
    (tmp_path / "flag").touch()
    with hosting(settings):
        pass
    (tmp_path / "flag").unlink()
    with hosting(settings, ready=False) as host:
        run = host.endpoint().current.replicas[0].run
        assert run is not None

        def fraction_after(seconds: float) -> float | None:
            assert run is not None
            run.loading = Loading("measuring the model's speed")
            loading = host.endpoint().current.loading(run.started_at + seconds)
            return loading.fraction if loading else None

        load_s = host.endpoint().current.calibration.load_s  # type: ignore[union-attr]
        assert host.call(fraction_after, 0.3) == pytest.approx(0.3 / (load_s + 0.5))
        assert host.call(fraction_after, 600) == 0.99


def test_readyz_names_what_is_not_ready_and_why_to_whoever_has_a_key(tmp_path: Path) -> None:
    broken = endpoint("fake:fail_load=permanent", id="two")
    with hosting(settings_for(tmp_path, endpoint(), broken), ready=False) as host:
        host.wait_for(State.FAILED, endpoint_id="two")
        host.wait_for(State.READY)
        answer = host.client.get("/readyz")
        assert answer.status_code == 503
        reason = "the fake model cannot be loaded"
        assert answer.json()["endpoints"] == [{"id": "two", "state": "failed", "reason": reason}]
        with client(host.url, None) as stranger, host.new_client(endpoints=["one"]) as other:
            assert stranger.get("/readyz").json() == {"status": "starting", "not_ready": 1}
            assert other.get("/readyz").json()["endpoints"] == []


def test_the_users_of_a_failed_endpoint_are_told_its_reason(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, endpoint("fake:fail_load=permanent")), ready=False) as host:
        host.wait_for(State.FAILED)
        error = host.post().json()["error"]
        assert error["code"] == "endpoint_failed"
        assert "has failed: the fake model cannot be loaded" in error["message"]
        (model,) = host.client.get("/v1/models").json()["data"]
        assert model["mezzotint"]["not_ready_because"] == "the fake model cannot be loaded"


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Host:  # type: ignore[misc]
    with hosting(settings_for(tmp_path_factory.mktemp("server"))) as running:
        yield running


def test_steps_are_told_as_the_user_counts_them(slow: Host) -> None:
    request = slow.submit(n=3, num_inference_steps=5)
    done = slow.wait_until(request, "done")
    assert (done["step"], done["num_steps"]) == (15, 15)
    counted = {name: done[name] for name in ("picture", "num_pictures", "picture_step", "num_picture_steps")}
    assert counted == {"picture": 3, "num_pictures": 3, "picture_step": 5, "num_picture_steps": 5}


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("/srv/models/flux could not be loaded", "flux could not be loaded"),
        ("'/srv/my models/a.safetensors': damaged", "'my models/a.safetensors': damaged"),
        (r"C:\models\flux is damaged", "flux is damaged"),
        ("~/models/flux: no such file", "flux: no such file"),
        (
            "see https://example.org/a/b and owner/name, 3/4",
            "see https://example.org/a/b and owner/name, 3/4",
        ),
        ("", ""),
    ],
)
def test_a_message_for_others_names_no_folders(text: str, without: str) -> None:
    assert without_folders(text) == without
