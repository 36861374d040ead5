from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic_core import PydanticUndefined

from mezzotint.config import EndpointSettings, Settings, as_toml, load_settings
from mezzotint.errors import ConfigError
from tests.attacks import attack


@pytest.fixture(autouse=True)
def _empty_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(text: str, name: str = "mezzotint.toml") -> Path:
    file = Path(name)
    file.write_text(text)
    return file


def complaint(
    text: str = "", *, env: dict[str, str] | None = None, flags: dict[str, Any] | None = None
) -> str:
    if text:
        write(text)
    with pytest.raises(ConfigError) as caught:
        load_settings(environment=env or {}, flags=flags)
    return caught.value.message


def test_without_any_file_the_built_in_model_is_the_endpoint_emoji() -> None:
    settings = load_settings(environment={})
    assert [(endpoint.id, endpoint.model) for endpoint in settings.endpoints] == [("emoji", "emoji")]
    assert settings == Settings()


def test_the_file_in_the_working_folder_is_read() -> None:
    write(
        "[server]\nport = 9000\n[[endpoints]]\nid = 'a'\n[[endpoints.adapters]]\nroute = 'flat'\nsource = 'x'"
    )
    settings = load_settings(environment={})
    assert settings.port == 9000
    assert settings.endpoints[0].adapters[0].route == "flat"


def test_a_file_named_with_config_is_read_instead() -> None:
    write("[server]\nport = 9000\n")
    other = write("[server]\nport = 9001\n", "other.toml")
    assert load_settings(other, environment={}).port == 9001


def test_flags_win_over_environment_over_file_over_default() -> None:
    write("[server]\nport = 1\nhost = '127.0.0.1'\nlog_level = 'debug'\n")
    environment = {"MEZZOTINT_PORT": "2", "MEZZOTINT_HOST": "127.0.0.2"}
    settings = load_settings(environment=environment, flags={"port": 3, "host": None})
    assert (settings.port, settings.host, settings.log_level) == (3, "127.0.0.2", "debug")


def test_environment_text_becomes_the_type_of_the_setting() -> None:
    settings = load_settings(
        environment={
            "MEZZOTINT_AUTH": "false",
            "MEZZOTINT_URL_TTL_S": "1.5",
            "MEZZOTINT_CORS_ORIGINS": "https://a.example, https://b.example",
            "MEZZOTINT_PUBLIC_URL": "",
            "MEZZOTINT_API_KEY": "for the command line",
            "UNRELATED": "1",
        }
    )
    assert settings.auth is False
    assert settings.url_ttl_s == 1.5
    assert settings.cors_origins == ("https://a.example", "https://b.example")
    assert settings.public_url is None


def test_a_tilde_in_the_data_folder_is_the_home_folder() -> None:
    assert (
        load_settings(environment={"MEZZOTINT_DATA_DIR": "~/pictures"}).data_dir == Path.home() / "pictures"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[server]\nport = 70000\n", ["mezzotint.toml: port:", "65535", "70000"]),
        ("[server]\nport = '8000'\n", ["mezzotint.toml: port:", "integer", "'8000'"]),
        ("[server]\nport = true\n", ["mezzotint.toml: port:", "integer"]),
        ("[server]\nauth = 'no'\n", ["mezzotint.toml: auth:", "boolean"]),
        ("[server]\nprot = 8000\n", ["mezzotint.toml: unknown key prot", "did you mean port?"]),
        ("[server]\nzzzzzz = 8000\n", ["mezzotint.toml: unknown key zzzzzz", "known are host, port"]),
        ("[server]\ndrain_s = nan\n", ["mezzotint.toml: drain_s:"]),
        ("[server]\ndrain_s = inf\n", ["mezzotint.toml: drain_s:", "finite"]),
        ("[server]\ndrain_s = -1\n", ["mezzotint.toml: drain_s:", "greater than or equal to 0"]),
        ("[server]\npublic_url = 'example.org'\n", ["mezzotint.toml: public_url:", "https?"]),
        ("[server]\nhost = '0.0.0.0'\nauth = false\n", ["mezzotint.toml: auth:", "loopback", "0.0.0.0"]),
        ("[server\n", ["mezzotint.toml: not valid TOML", "line 1"]),
        ("[serve]\n", ["mezzotint.toml: unknown table [serve]", "[server] and [[endpoints]]"]),
        ("server = 1\n", ["mezzotint.toml: server must be a table"]),
        ("[[server.endpoints]]\nid = 'a'\n", ["endpoints do not belong in [server]"]),
        ("endpoints = 5\n", ["mezzotint.toml: endpoints:", "(got 5)"]),
        ("[[endpoints]]\nmodel = 'emoji'\n", ["mezzotint.toml: endpoints.number 1.id is missing"]),
        ("[[endpoints]]\nid = 'a'\n[[endpoints]]\nid = 'a'\n", ["endpoint id 'a' stands twice"]),
        ("[[endpoints]]\nid = 'a b'\n", ["mezzotint.toml: endpoints.a b.id:", "pattern"]),
        ("[[endpoints]]\nid = 'a'\ndtype = 'int8'\n", ["endpoints.a.dtype:", "'bf16'", "'int8'"]),
        ("[[endpoints]]\nid = 'a'\ndevice = 'the big one'\n", ["endpoints.a.device:"]),
        (
            "[[endpoints]]\nid = 'a'\nbatchin = 'off'\n",
            ["unknown key endpoints.a.batchin; did you mean batching?"],
        ),
        (
            "[[endpoints]]\nid = 'a'\nadapters = [{route = 'r', source = 's', scal = 1.0}]\n",
            ["unknown key endpoints.a.adapters.r.scal; did you mean scale?"],
        ),
        (
            "[[endpoints]]\nid = 'a'\nadapters = [{route='r', source='s'}, {route='r', source='t'}]\n",
            ["endpoints.a.adapters:", "adapter route 'r' stands twice"],
        ),
        (
            "[[endpoints]]\nid = 'a'\ncontrolnets = [{route='r', source='s'}, {route='r', source='t'}]\n",
            ["endpoints.a.controlnets:", "controlnet route 'r' stands twice"],
        ),
    ],
)
def test_a_bad_file_stops_the_start_with_a_sentence_naming_file_and_key(text: str, words: list[str]) -> None:
    message = complaint(text)
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message.split("not valid TOML")[0]


def test_a_bad_value_in_the_file_is_told_even_where_a_flag_overrides_it() -> None:
    assert complaint("[server]\nport = -1\n", flags={"port": 8000}).startswith("mezzotint.toml: port:")


@attack("A configuration file made to end in a traceback", outcome="one sentence, exit status 2")
@pytest.mark.parametrize(
    "text",
    [
        "[server]\nport = 1" + "0" * 5000,
        "x = " + "[" * 5000,
        "x = " + "{a=" * 3000,
        "\x00",
        "[server]\npublic_url = 'http://['",
        "[server]\npublic_url = 'http://a:b/'",
        "[server]\npublic_url = 'http://\u2100/'",
        "[server]\ndrain_s = inf",
        "endpoints = 5",
        "[[endpoints]]\nid = {a = 1}",
        "[[endpoints]]\nid = 'a'\nadapters = [5]",
    ],
)
def test_a_file_made_to_break_the_reader_is_refused_with_a_sentence(text: str) -> None:
    message = complaint(text)
    assert message.startswith("mezzotint.toml: ")
    assert len(message) < 1000


@attack("heartbeat_s = 0, which would ask workers all the time", outcome="refused at the start")
@pytest.mark.parametrize("name", ["heartbeat_s", "body_timeout_s", "load_timeout_s", "encode_threads"])
def test_a_setting_that_cannot_work_at_zero_is_refused(name: str) -> None:
    assert "greater than or equal to" in complaint(f"[server]\n{name} = 0")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot be read \(No such file or directory\)"):
        load_settings(Path("nowhere.toml"), environment={})


def test_a_bad_environment_variable_is_named() -> None:
    assert complaint(env={"MEZZOTINT_PORT": "many"}).startswith("environment variable MEZZOTINT_PORT: port:")
    assert "did you mean MEZZOTINT_PORT?" in complaint(env={"MEZZOTINT_PROT": "1"})
    assert "not a setting" in complaint(env={"MEZZOTINT_ENDPOINTS": "a"})


def test_a_bad_flag_is_named() -> None:
    assert complaint(flags={"host": "0.0.0.0", "auth": False}).startswith("flag --no-auth: auth:")
    assert complaint(flags={"endpoints": [{"id": "a:b"}]}).startswith(
        "flags --model and --id: endpoints.a:b.id:"
    )


@pytest.mark.parametrize("comments", [True, False])
def test_a_printed_configuration_loads_to_the_same_settings(comments: bool) -> None:
    settings = load_settings(
        write(
            '[server]\nport = 0\npublic_url = "https://example.org/é"\ncors_origins = ["https://a.example"]\n'
            '[[endpoints]]\nid = "a"\nmodel = "back\\\\slash \\"and\\" \\u007f quote"\nwidth = 512\n'
            'dtype = "torch.float16"\nscheduler_settings = { shift = 5.0, order = 2 }\n'
            '[endpoints.arguments]\nclip_skip = 1\n"a b" = [1.5, [true, "é"]]\nnested = { x = 1 }\n'
            '[[endpoints.adapters]]\nroute = "r"\nsource = "s"\nscale = 0.5\n'
            '[[endpoints.controlnets]]\nroute = "c"\nsource = "owner/c"\n'
            '[[endpoints]]\nid = "b"\nidle_sleep_s = 60\n'
        ),
        environment={},
    )
    assert settings.endpoints[0].dtype == "fp16"
    assert settings.endpoints[0].arguments == {"clip_skip": 1, "a b": [1.5, [True, "é"]], "nested": {"x": 1}}
    text = as_toml(settings, comments=comments)
    assert load_settings(write(text, "again.toml"), environment={}) == settings
    assert ("# Port to listen on" in text) is comments


def test_the_printed_configuration_names_every_setting() -> None:
    text = as_toml(Settings())
    for table in (Settings, EndpointSettings):
        for name in table.model_fields:
            assert name in text or name in ("adapters", "controlnets")
    assert tomllib.loads(text)["endpoints"][0]["id"] == "emoji"


@pytest.mark.parametrize("table", [Settings, EndpointSettings])
def test_every_setting_has_a_help_text_and_units_in_its_name(
    table: type[Settings] | type[EndpointSettings],
) -> None:
    for name, field in table.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
        if field.annotation is float and field.default is not PydanticUndefined:
            assert name.endswith("_s") or name in ("min_batch_gain", "max_batch_stretch"), name


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("min_replicas = 3\nmax_replicas = 2", "min_replicas is 3, more than max_replicas, which is 2"),
        ("replicas = 4\nmax_replicas = 2", "replicas (min_replicas is unset) is 4, more than max_replicas"),
        ("min_replicas = 2", "min_replicas is 2, more than replicas (max_replicas is unset), which is 1"),
        ("min_replicas = 1\nidle_sleep_s = 9", "must be 0 where min_replicas is 1; set min_replicas = 0"),
        ("target_backlog_s = 0", "greater than 0"),
    ],
)
def test_bounds_of_scaling_that_do_not_fit_stop_the_start(tmp_path: Path, lines: str, sentence: str) -> None:
    file = tmp_path / "mezzotint.toml"
    file.write_text(f'[[endpoints]]\nid = "a"\nmodel = "emoji"\n{lines}\n')
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        load_settings(file, environment={})


@pytest.mark.parametrize(
    ("fields", "num", "sleep_after_s"),
    [
        ({"replicas": 3}, (3, 3), None),
        ({"replicas": 2, "idle_sleep_s": 9.0}, (2, 2), 9.0),
        ({"min_replicas": 0, "max_replicas": 4, "scale_down_delay_s": 30.0}, (1, 4), 30.0),
        ({"max_replicas": 4}, (1, 4), None),
    ],
)
def test_a_fixed_number_of_replicas_is_both_bounds(
    fields: dict[str, Any], num: tuple[int, int], sleep_after_s: float | None
) -> None:
    spec = EndpointSettings(id="a", model="emoji", **fields)
    assert (spec.num_replicas, spec.sleep_after_s) == (num, sleep_after_s)
