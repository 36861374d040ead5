"""Another scheduler, or other settings of it, than a model came with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers

from mezzotint.errors import ModelLoadError, echo, nearest


def set_scheduler(pipe: Any, name: str | None, settings: Mapping[str, Any]) -> None:
    """Gives the pipeline the scheduler `name` (None: its own class) with the model's settings and `settings`.

    ModelLoadError for a class or a setting that there is not.
    """
    if name is None and not settings:
        return
    own = getattr(pipe, "scheduler", None)
    if own is None:
        raise ModelLoadError(
            f"scheduler: {type(pipe).__name__} has none to change; leave the setting out",
            code="invalid_setting",
        )
    cls: Any = type(own) if name is None else _named(name)
    known = [each for each in inspect.signature(cls.__init__).parameters if each != "self"]
    for setting in settings:
        if setting not in known:
            near = nearest(setting, known)
            raise ModelLoadError(
                f"scheduler_settings: {cls.__name__} has no {echo(setting)}; "
                + (f"did you mean {near}?" if near else f"it has {', '.join(known)}"),
                code="invalid_setting",
            )
    pipe.register_modules(scheduler=cls.from_config(own.config, **settings))


def _named(name: str) -> Any:
    cls = getattr(diffusers, name, None)
    if not (inspect.isclass(cls) and issubclass(cls, diffusers.SchedulerMixin)):
        near = nearest(name, [each for each in dir(diffusers) if each.endswith("Scheduler")])
        raise ModelLoadError(
            f"scheduler: diffusers {diffusers.__version__} has no {echo(name)}"
            + (f"; did you mean {near}?" if near else ""),
            code="invalid_setting",
        )
    return cls
