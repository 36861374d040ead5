"""The greenlet bridge: a job runs its own unmodified pipeline, and parks at each shared forward.

A PipelineRun runs a pipeline in a greenlet. A Tap replaces `forward` of a shared module (or `decode` of a
VAE) by an instance attribute: called from inside a run it parks the run and hands over a Call, called from
anywhere else it works as always. All of it belongs to one thread.

What is thread-local in torch does not travel with a greenlet. Whoever starts, resumes or closes runs does
so with gradients off (`no_grad` or `inference_mode`). A forward that a pipeline asks for with gradients or
autocast on is run in place instead of parked: so the mode is the same at every switch, and there is nothing
to carry across.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline
from greenlet import GreenletExit, getcurrent, greenlet
from transformers import PreTrainedModel

from mezzotint.engine.lora.bank import Lease
from mezzotint.engine.steps.batching import Call, Rule
from mezzotint.engine.steps.shared_state import AttentionState, RunState

StepHook = Callable[[Any, Mapping[str, Any]], None]
"""Called before every scheduler step with the scheduler and the arguments of its `step`, by name."""

_STEP_ARGUMENTS = ("model_output", "timestep", "sample")
_DEVICE_TYPES = ("cpu", "cuda", "mps")
_MISSING = object()


class _RunGreenlet(greenlet):  # type: ignore[misc]
    pipeline_run: PipelineRun


class Tap:
    """Parks runs at `module.<attribute>`; `close` puts the previous attribute back.

    Tap after everything else that patches the module (accelerate's hooks, compilation): the tap calls what
    it finds, and its attribute `as_loaded`, if it has one, for jobs that change what this module computes.
    At `generate` a tap keeps the run from parking until the method returns: a language model keeps state on
    itself from token to token. `rule` may be changed while no run is under way.
    """

    def __init__(self, name: str, module: Any, attribute: str = "forward", rule: Rule | None = None) -> None:
        self._module = module
        self._attribute = attribute
        self._previous = module.__dict__.get(attribute, _MISSING)
        original = getattr(module, attribute)
        adapted = getattr(original, "as_loaded", original)
        self.name = name
        self.rule = rule
        self.parks = attribute != "generate"
        self._repeatable = attribute == "forward" and isinstance(module, PreTrainedModel)
        self._tapped = self._parking(original, adapted) if self.parks else _unparked(original)
        setattr(module, attribute, self._tapped)

    def close(self) -> None:
        """Restores the module, unless somebody else has patched it since."""
        if self._module.__dict__.get(self._attribute) is not self._tapped:
            return
        if self._previous is _MISSING:
            delattr(self._module, self._attribute)
        else:
            setattr(self._module, self._attribute, self._previous)

    def _parking(self, original: Callable[..., Any], adapted: Callable[..., Any]) -> Callable[..., Any]:
        parameters = inspect.signature(original).parameters.values()
        names = tuple(
            each.name
            for each in parameters
            if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
        )

        @functools.wraps(original)
        def tapped(*args: Any, **kwargs: Any) -> Any:
            current = getcurrent()
            if type(current) is not _RunGreenlet or _mode_differs() or current.pipeline_run.stays:
                return original(*args, **kwargs)
            run = current.pipeline_run
            is_adapted = run.lease is not None and self.name in run.lease.resident.packed
            return run.park(
                Call(
                    self.name,
                    adapted if is_adapted else original,
                    args,
                    kwargs,
                    self.rule,
                    names,
                    run.lease,
                    merges=run.merges,
                    repeatable=self._repeatable,
                )
            )

        return tapped


def _unparked(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def tapped(*args: Any, **kwargs: Any) -> Any:
        current = getcurrent()
        if type(current) is not _RunGreenlet or current.pipeline_run.stays:
            return original(*args, **kwargs)
        current.pipeline_run.stays = True
        try:
            return original(*args, **kwargs)
        finally:
            current.pipeline_run.stays = False

    return tapped


def _mode_differs() -> bool:
    return torch.is_grad_enabled() or any(map(torch.is_autocast_enabled, _DEVICE_TYPES))


class PipelineRun:
    """One run of a pipeline's `__call__`, one parked Call at a time.

    `call` is the parked forward. It is None once the run has ended; then `error` is set if it failed, and
    `result` is what the pipeline returned. The pipeline sees a view of `pipe` with schedulers and
    guiders of its own. `attention` is what it shares with other runs.
    """

    def __init__(
        self,
        pipe: Any,
        arguments: Mapping[str, Any],
        *,
        seed: int,
        lease: Lease | None = None,
        merges: bool = True,
        before_step: StepHook | None = None,
        attention: AttentionState | None = None,
    ) -> None:
        self.call: Call | None = None
        self.result: Any = None
        self.error: Exception | None = None
        # These three are written at every switch and read by the engine, which runs the calls.
        self.lease = lease
        """Its adapter; read by the taps, which write it into each call."""
        self.merges = merges
        """Whether its calls may share a forward; read by the taps."""
        self.num_steps = 0
        """Scheduler steps done so far; counted by the run's own schedulers."""
        self.stays = False
        """Whether forwards run in place instead of parking; the taps set and read it."""
        self._closed = False
        self._before_step = before_step
        self._state = RunState(seed, attention, getattr(pipe, "_execution_device", None))
        self._schedulers: list[Any] = []
        generator = torch.Generator("cpu").manual_seed(seed)
        self._call_code = inspect.unwrap(type(pipe).__call__).__code__
        view = self._view(pipe, generator)
        self._greenlet: _RunGreenlet | None = _RunGreenlet(lambda: view(generator=generator, **arguments))
        self._greenlet.pipeline_run = self

    def local(self, name: str) -> Any:
        """A local variable of the pipeline's call, where it is parked; None if it has none."""
        frame = self._greenlet.gr_frame if self._greenlet is not None else None
        while frame is not None and frame.f_code is not self._call_code:
            frame = frame.f_back
        return None if frame is None else frame.f_locals.get(name)

    def _view(self, pipe: Any, generator: torch.Generator, counted: bool = True) -> Any:
        """A shallow copy of the pipeline: the modules are shared, and left where they are when it ends.

        Not `counted`: its steps come before those that the request asks for.
        """
        view = copy.copy(pipe)
        for name, value in vars(pipe).items():
            if isinstance(value, DiffusionPipeline):  # combined pipelines hold pipelines
                view.__dict__[name] = self._view(value, generator, counted and not _is_prior(name))
        for name, component in pipe.components.items():
            if callable(getattr(component, "step", None)) and hasattr(component, "set_timesteps"):
                own = copy.deepcopy(component)
                own.step = self._stepping(own, own.step, generator, counted and not _is_prior(name))
                self._schedulers.append(own)
                view.__dict__[name] = own
            elif isinstance(component, ConfigMixin) and not isinstance(component, torch.nn.Module):
                view.__dict__[name] = copy.deepcopy(component)  # a guider keeps what it saw last
        view.__dict__["_progress_bar_config"] = {"disable": True}
        view.__dict__["maybe_free_model_hooks"] = _keep_modules
        return view

    def _stepping(
        self, scheduler: Any, step: Callable[..., Any], generator: torch.Generator, counted: bool
    ) -> Callable[..., Any]:
        """`step`, announced if `counted`; where a pipeline passes no generator, it draws from this run's.

        Otherwise its noise would come from the generator of the process, which all jobs share.
        """
        draws = "generator" in inspect.signature(step).parameters

        @functools.wraps(step)
        def stepping(*args: Any, **kwargs: Any) -> Any:
            if draws and len(args) <= len(_STEP_ARGUMENTS) and kwargs.get("generator") is None:
                kwargs["generator"] = generator
            if counted and self._before_step is not None:
                self._before_step(scheduler, dict(zip(_STEP_ARGUMENTS, args, strict=False)) | kwargs)
            result = step(*args, **kwargs)
            self.num_steps += counted
            return result

        return stepping

    def start(self) -> None:
        """Runs up to the first parked call, or to the end."""
        self._switch()

    def resume(self, value: Any) -> None:
        """Hands the parked call its result and runs up to the next one, or to the end."""
        self._switch(value)

    def fail(self, error: Exception) -> None:
        """Lets the parked call raise `error` inside the pipeline."""
        self._enter(lambda running: running.throw(error))

    def close(self) -> None:
        """Unwinds the pipeline wherever it stands and frees what it holds; harmless on an ended run."""
        self._closed = True
        if self._greenlet:  # has started: its frames must unwind
            self._enter(lambda running: running.throw(GreenletExit))
        self._end()
        self.result = None
        _forget_frames(self.error)

    def park(self, call: Call) -> Any:
        """Called inside the run: hands `call` to whoever resumed it and waits for the result."""
        if self._closed:
            raise GreenletExit
        assert self._greenlet is not None, "only a living run parks"
        if self.num_steps == 0 or self._state.processors is not None:
            self._state.notice()
        if self._state.processors is not None:
            call.key, call.repeatable = None, False
            call.run = getattr(call.run, "as_loaded", call.run)  # compiled code has the usual attention
        call.in_place = self._state.in_place
        self.call = call
        return self._greenlet.parent.switch()

    def _switch(self, *value: Any) -> None:
        self._enter(lambda running: running.switch(*value))

    def _enter(self, switch: Callable[[_RunGreenlet], Any]) -> None:
        running = self._greenlet
        assert running is not None, "the run has ended"
        assert not torch.is_grad_enabled(), "pipelines run with gradients off"
        running.parent = getcurrent()
        self.call = None
        try:
            with self._state.in_place():
                result = switch(running)
        except Exception as error:
            self.error = error
            self._end()
            return
        if running.dead:
            self.result = result
            self._end()

    def _end(self) -> None:
        self._state.end()
        for scheduler in self._schedulers:
            scheduler.__dict__.pop("step", None)  # or it would hold itself alive
        self._schedulers.clear()
        self.call = None
        self._greenlet = None
        self._before_step = None


def _is_prior(name: str) -> bool:
    """Whether a component of a combined pipeline runs before the denoiser."""
    return name.startswith("prior")


def _forget_frames(error: BaseException | None) -> None:
    """Lets go of the frames, and with them of the tensors, that a kept exception would keep."""
    while error is not None:
        error.__traceback__ = None
        error = error.__context__


def _keep_modules() -> None:
    """Replaces maybe_free_model_hooks, because other jobs may be using the modules."""
