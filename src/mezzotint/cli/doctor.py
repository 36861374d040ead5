"""`mezzotint doctor`: what models would run on here, and whether what is configured can work."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mezzotint import hub
from mezzotint.cli.models import engine_program
from mezzotint.cli.options import ConfigFlag, DataDirFlag, JsonFlag, read_settings
from mezzotint.cli.running import running_on
from mezzotint.cli.tables import print_facts

if TYPE_CHECKING:
    from mezzotint.config import Settings

Verdict = Literal["ok", "warning", "no"]
MARKS: Mapping[Verdict, str] = {"ok": "ok  ", "warning": "WARN", "no": "NO  "}
MIN_FREE_BYTES = 2**30
"""Free space of the data folder below which pictures and adapters soon find none."""


@dataclass(frozen=True, slots=True)
class Check:
    """One judgement of `doctor`."""

    name: str
    verdict: Verdict
    text: str


def doctor(
    model: Annotated[
        str | None, typer.Argument(metavar="[SOURCE]", help="A model to judge. [those configured]")
    ] = None,
    config: ConfigFlag = None,
    data_dir: DataDirFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Shows what models run on here, and judges: does the model fit, are port, disk and threads right?

    Exit status 1 if something cannot work.

    Example: `mezzotint doctor black-forest-labs/FLUX.1-schnell`
    """
    settings = read_settings(config, data_dir=data_dir)
    sources = [model] if model else list(dict.fromkeys(each.model for each in settings.endpoints))
    child = engine_program("doctor", *sources, capture=True)
    if child.returncode:
        raise typer.Exit(child.returncode)
    facts = json.loads(child.stdout)
    checks = list(judge(facts, settings))
    if as_json:
        typer.echo(json.dumps(facts | {"checks": [asdict(check) for check in checks]}))
    else:
        del facts["asked"], facts["load"]
        print_facts(facts)
        typer.echo()
        for check in checks:
            typer.echo(f"{MARKS[check.verdict]}  {check.name}: {check.text}")
    if any(check.verdict == "no" for check in checks):
        raise typer.Exit(1)


def judge(facts: Mapping[str, Any], settings: Settings) -> Iterator[Check]:
    """The judgements, from the engine's facts and the settings in force."""
    for asked in facts["asked"]:
        yield judge_model(asked, facts)
    yield judge_port(settings)
    yield judge_disk(settings.data_dir)
    yield judge_threads(facts, settings)
    yield judge_compiler(facts, settings)


def judge_model(asked: Mapping[str, Any], facts: Mapping[str, Any]) -> Check:
    """Whether a model fits into the memory that is free on the device that `auto` means."""
    source, needed = asked["source"], asked["needed_bytes"]
    name = f"model {source}"
    if needed is None and hub.parse_reference(source) is None:
        return Check(name, "no", f"{asked['reason']}, and it is no repository (owner/name)")
    if needed is None:
        text = f"{asked['reason']}; `mezzotint pull {source}` fetches it, then ask again"
        return Check(name, "warning", text)
    memory = facts["gpus"][0] if facts["gpus"] else facts["memory"]
    free, total = memory["available_bytes"], memory["total_bytes"]
    need = f"needs about {_gib(needed)} in {facts['dtype']} on {facts['device']}"
    if needed <= free:
        return Check(name, "ok", f"{need}; {_gib(free)} are free")
    if needed <= total:
        return Check(name, "no", f"{need}; only {_gib(free)} of {_gib(total)} are free: stop other programs")
    text = f"{need}; there are {_gib(total)}: take a smaller dtype, offload, or a larger machine"
    return Check(name, "no", text)


def judge_port(settings: Settings) -> Check:
    """Whether a server could listen on its port."""
    running = running_on(settings.data_dir)
    if running is not None:
        return Check("port", "ok", f"your server listens on {running.url}")
    where = f"{settings.host}:{settings.port}"
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, settings.port))
        except OSError as error:
            return Check(
                "port", "no", f"{where} cannot be listened on ({error.strerror}): give another --port"
            )
    return Check("port", "ok", f"{where} is free")


def judge_disk(data_dir: Path) -> Check:
    """Whether pictures and adapters find room where the data folder is, or would be."""
    folder = data_dir.resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    verdict: Verdict = "ok" if free >= MIN_FREE_BYTES else "warning"
    return Check("disk", verdict, f"{_gib(free)} free for the data folder {data_dir}")


def judge_threads(facts: Mapping[str, Any], settings: Settings) -> Check:
    """Whether the workers' threads have a core each: more threads than free cores are many times slower."""
    cores = facts["cpu"]["usable_cores"]
    if facts["device"] != "cpu":
        return Check("threads", "ok", f"the models run on {facts['device']}")
    wanted = sum(each.num_replicas[1] * (each.num_threads or cores) for each in settings.endpoints)
    told = f"{wanted} threads of workers on {cores} cores"
    if wanted > cores:
        share = max(1, cores // sum(each.num_replicas[1] for each in settings.endpoints))
        return Check("threads", "warning", f"{told} get in each other's way: set num_threads = {share}")
    if facts["load"] > cores:
        return Check(
            "threads",
            "warning",
            f"{told}, and other programs keep {facts['load']:.0f} more busy: everything is slower",
        )
    return Check("threads", "ok", told)


def judge_compiler(facts: Mapping[str, Any], settings: Settings) -> Check:
    """Whether torch could compile for this CPU, and whether an endpoint asks for it."""
    if facts["device"] != "cpu":
        return Check("compiler", "ok", f"the models run on {facts['device']}")
    if facts["cpp_compiler"]:
        return Check("compiler", "ok", f'{facts["cpp_compiler"]} compiles for performance = "max"')
    asking = [each.id for each in settings.endpoints if each.performance == "max"]
    text = "there is no C++ compiler (g++, or the one that CXX names)"
    if not asking:
        return Check("compiler", "ok", f'{text}: only performance = "max" would need one')
    text += (
        f', so {", ".join(asking)} with performance = "max" will run as "auto" does: install one, and a lone '
        "step of a small model takes about half the time"
    )
    return Check("compiler", "warning", text)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
