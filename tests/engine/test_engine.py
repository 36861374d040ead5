"""The engine as a library: results in order, errors of their own, progress, cancellation, no growth."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from greenlet import greenlet

from mezzotint.engine import Engine, EngineSettings, Event, Request
from mezzotint.engine.steps import inference, proof
from mezzotint.engine.steps.jobs import Job
from mezzotint.engine.steps.pipeline_run import PipelineRun
from mezzotint.errors import GenerationError, InvalidRequestError, NotFoundError
from mezzotint.messages import Cancelled, Done, Failed, Preview, Progress
from tests.engine import adapter_files, tiny
from tests.engine.adapter_files import uses
from tests.engine.conftest import same_alone_and_together


@functools.cache
def pipeline(dtype: torch.dtype = torch.float32) -> Any:
    return tiny.build("flux", dtype)


def request(**fields: Any) -> Request:
    defaults: dict[str, Any] = {
        "prompt": "a red fox",
        "num_inference_steps": 2,
        "seed": 1,
        "width": 32,
        "height": 32,
        "extra": {"max_sequence_length": 32},
    }
    return Request(**{**defaults, **fields})


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(pipeline(), rows=2)
    yield engine
    engine.close()


def drain(engine: Engine) -> list[Event]:
    events: list[Event] = []
    while engine.has_work:
        events += engine.step()
    return events


def of(job_id: str, events: list[Event]) -> list[Event]:
    return [event for event in events if event.job_id == job_id]


# ---------------------------------------------------------------- library


def test_results_come_in_the_order_of_the_requests(engine: Engine) -> None:
    requests = [
        request(num_inference_steps=5, seed=1),
        request(seed=2),
        request(num_inference_steps=1, seed=3),
    ]
    results = engine.generate(requests)
    assert [result.seed for result in results] == [1, 2, 3]
    assert [result.request for result in results] == requests
    for result in results:
        assert result.error is None
        assert result.image is not None
        assert result.image.shape == (32, 32, 3)
        assert result.image.dtype == np.uint8
        assert result.timings["generate_s"] > 0


def test_stream_yields_results_as_they_finish(engine: Engine) -> None:
    results = list(
        engine.stream([request(num_inference_steps=6, seed=1), request(num_inference_steps=1, seed=2)])
    )
    assert [result.seed for result in results] == [2, 1]


def test_a_stream_that_is_dropped_leaves_nothing_running(engine: Engine) -> None:
    stream = engine.stream([request(num_inference_steps=1), request(num_inference_steps=9)])
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert engine.num_jobs == 0


def test_a_missing_seed_is_drawn_and_returned(engine: Engine) -> None:
    first, second = engine.generate([request(seed=None), request(seed=None)])
    assert first.seed != second.seed
    assert 0 <= first.seed < 2**32
    (again,) = engine.generate([request(seed=first.seed)])
    assert again.image is not None
    assert first.image is not None
    assert np.array_equal(again.image, first.image)


def test_the_global_random_state_is_neither_used_nor_moved(engine: Engine) -> None:
    torch.manual_seed(1)
    (one,) = engine.generate([request()])
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    (two,) = engine.generate([request()])
    assert one.image is not None
    assert two.image is not None
    assert np.array_equal(one.image, two.image)
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state())


def test_pixels_are_those_of_diffusers_own_pictures() -> None:
    engine = Engine(pipeline(), rows=1)
    picture = pipeline()(  # the taps let through what comes from outside a job
        prompt="a red fox",
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(1),
        width=32,
        height=32,
        max_sequence_length=32,
    ).images[0]
    (result,) = engine.generate([request()])
    engine.close()
    assert result.image is not None
    assert np.array_equal(result.image, np.asarray(picture))


def test_load_takes_a_ready_pipeline_and_measures_it() -> None:
    pipe = tiny.build("flux")
    engine = Engine.load(pipe, EngineSettings(max_rows=2, num_threads=1, width=32, height=32))
    try:
        assert engine.measured[0].rows == 1
        assert engine.runner.num_rows in (1, 2)
        (result,) = engine.generate([request()])
        assert result.error is None
    finally:
        engine.close()
    assert "forward" not in pipe.transformer.__dict__


def test_load_keeps_the_rows_it_is_given() -> None:
    engine = Engine.load(tiny.build("flux"), EngineSettings(num_threads=1, width=32, height=32), rows=3)
    assert engine.runner.num_rows == 3
    engine.close()


def test_load_takes_a_folder(tmp_path: Path) -> None:
    engine = Engine.load(
        tiny.save("flux", tmp_path, sizes=[(32, 32)]),
        EngineSettings(num_threads=1, dtype="fp32", performance="reference"),
        rows=1,
    )
    (loaded,) = engine.generate([request()])
    engine.close()
    built = Engine(pipeline(), rows=1)
    (expected,) = built.generate([request()])
    built.close()
    assert loaded.image is not None
    assert expected.image is not None
    assert np.array_equal(loaded.image, expected.image)


def moody_pipeline() -> tuple[Any, list[bool]]:
    """A pipeline that draws nothing until something is in its list."""
    pipe = tiny.build("flux")
    encode = pipe.text_encoder.forward
    healthy: list[bool] = []

    def moody(*args: Any, **kwargs: Any) -> Any:
        if not healthy:
            raise ValueError("not at this hour")
        return encode(*args, **kwargs)

    pipe.text_encoder.forward = moody
    return pipe, healthy


def test_a_model_whose_first_picture_fails_is_served_unmerged_and_says_why(caplog: Any) -> None:
    pipe, healthy = moody_pipeline()
    engine = Engine.load(pipe, EngineSettings(num_threads=1, width=32, height=32))
    assert "not at this hour" in engine.info().merging["all"]
    assert (engine.info().mergeable, engine.info().rows) == (False, 1)
    healthy.append(True)
    (result,) = engine.generate([request()])
    engine.close()
    assert result.error is None


def test_real_requests_show_how_a_model_merges_whose_first_picture_failed() -> None:
    pipe, healthy = moody_pipeline()
    settings = EngineSettings(num_threads=1, width=32, height=32, batching="fast")
    engine = Engine.load(pipe, settings)
    assert not engine.merges
    healthy.append(True)
    assert all(result.error is None for result in engine.generate([request(), request(seed=2)]))
    assert engine.info().merging == {"transformer": "merges"}
    assert engine.runner.num_forwards < engine.runner.num_real_rows
    engine.close()


def test_what_one_start_has_proven_the_next_takes_over_while_versions_agree(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe = tiny.build("qwen-image")
    settings = EngineSettings(num_threads=1, width=32, height=32)
    engine = Engine.load(pipe, settings)
    info = engine.info()
    engine.close()
    assert info.merging == {"transformer": "merges"}
    assert info.proof is not None
    assert f"torch {torch.__version__}" in info.proof.made_with

    proofs: list[str] = []
    plain = proof.prove

    def counted(laboratory: Any, trial: Any, name: str) -> None:
        proofs.append(name)
        plain(laboratory, trial, name)

    monkeypatch.setattr(inference, "prove", counted)
    again = Engine.load(pipe, settings, rows=2, proof=info.proof)
    assert (proofs, again.info().proof) == ([], info.proof)
    assert again.findings == engine.findings
    again.close()
    other = Engine.load(pipe, settings, rows=2, proof=replace(info.proof, made_with="torch 1.0"))
    assert proofs
    assert other.info().proof == info.proof
    other.close()


def test_the_size_of_a_model_is_what_its_pipeline_draws_unasked() -> None:
    pipe = tiny.build("flux")
    pipe.default_sample_size = 16
    engine = Engine.load(pipe, EngineSettings(num_threads=1))
    assert (engine.info().width, engine.info().height) == (64, 64)
    engine.close()


def test_a_pipeline_that_must_be_told_a_size_merges_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As GLM-Image, which computes with the height before it has a default."""
    pipe = tiny.build("flux")
    pipe.default_sample_size = 8
    plain = type(pipe).__call__

    @functools.wraps(plain)
    def told(self: Any, *args: Any, **arguments: Any) -> Any:
        if arguments.get("height") is None:
            raise TypeError("unsupported operand type(s) for //: 'NoneType' and 'int'")
        return plain(self, *args, **arguments)

    monkeypatch.setattr(type(pipe), "__call__", told)
    engine = Engine.load(pipe, EngineSettings(num_threads=1))
    info = engine.info()
    engine.close()
    assert (info.width, info.height) == (32, 32)
    assert info.merging == {"transformer": "merges"}


@pytest.mark.filterwarnings("ignore:`callback_steps`:FutureWarning")  # of diffusers' own
def test_the_steps_of_a_prior_are_no_progress() -> None:
    engine = Engine(tiny.build("kandinsky-2.2"), batching="off")
    call = tiny.call("kandinsky-2.2")
    extra = {"prior_num_inference_steps": call["prior_num_inference_steps"]}
    asked = request(width=call["width"], height=call["height"], num_inference_steps=3, extra=extra)
    engine.submit(asked, "a")
    told = []
    while engine.has_work:
        steps = [event.step for event in engine.step() if isinstance(event, Progress)]
        told += [(step, engine.runner.num_forwards) for step in steps]
    engine.close()
    assert [step for step, _ in told] == [0, 1, 2, 3]
    assert [forwards for _, forwards in told] == [0, 1, 2, 3], "no step is done before the denoiser runs"


# ---------------------------------------------------------------- errors


def test_a_request_with_bad_arguments_fails_alone_with_a_sentence(engine: Engine) -> None:
    bad = {
        "num_inference_steps must be an integer between 1 and 50 (got 51)": request(num_inference_steps=51),
        "width must be a positive multiple of 8 for this model (got 33)": request(width=33),
        "seed must be between 0 and 2**63-1 (got -1)": request(seed=-1),
        "extra: 'colour' is not an argument of this pipeline": request(extra={"colour": "red"}),
        "extra: 'generator' is set by the request itself": request(extra={"generator": None}),
    }
    results = engine.generate([request(), *bad.values()])
    assert results[0].error is None
    for message, result in zip(bad, results[1:], strict=True):
        assert isinstance(result.error, InvalidRequestError)
        assert result.error.message == message
        assert result.image is None


def test_what_the_pipeline_itself_refuses_is_the_requests_fault(engine: Engine) -> None:
    (result,) = engine.generate([request(extra={"max_sequence_length": 513})])
    assert isinstance(result.error, InvalidRequestError)
    assert "max_sequence_length" in result.error.message


class Faulty:
    """Makes chosen forwards of a module fail: by the seed's noise, one job among others can be told."""

    def __init__(
        self, module: torch.nn.Module, when: Callable[[torch.Tensor], bool], error: Exception
    ) -> None:
        self.module, self.when, self.error = module, when, error
        self.before = module.forward

    def __enter__(self) -> None:
        self.module.__dict__["forward"] = self._forward

    def __exit__(self, *error: object) -> None:
        del self.module.__dict__["forward"]

    def _forward(self, hidden_states: torch.Tensor, **arguments: Any) -> Any:
        if self.when(hidden_states):
            raise self.error
        return self.before(hidden_states=hidden_states, **arguments)


def test_a_bad_row_in_a_merged_forward_fails_alone() -> None:
    pipe = tiny.build("flux")
    requests = [request(seed=seed, num_inference_steps=3) for seed in range(4)]
    engine = Engine(pipe, rows=4)
    expected = engine.generate(requests)
    engine.close()
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(2))

    def seed_two(rows: torch.Tensor) -> bool:
        return bool((rows[:, 0, 0] == noise.flatten()[0]).any())

    with Faulty(pipe.transformer, seed_two, ZeroDivisionError("a bad row")):
        engine = Engine(pipe, rows=4)
        results = engine.generate(requests)
        engine.close()
    assert isinstance(results[2].error, GenerationError)
    assert results[2].error.message == "generation failed: ZeroDivisionError: a bad row"
    for index in (0, 1, 3):
        image, wanted = results[index].image, expected[index].image
        assert image is not None
        assert wanted is not None
        assert np.array_equal(image, wanted)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (lambda images: images[..., 0], "shape (32, 32)"),
        (lambda images: images[..., :1], "shape (32, 32, 1)"),
        (lambda images: images[:0], "no picture"),
        (lambda images: None, "no picture"),
    ],
)
def test_an_output_that_is_no_colour_picture_fails_its_request_alone(
    output: Callable[[Any], Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny.build("flux")
    whole = pipe.image_processor.postprocess
    engine = Engine(pipe, rows=1)
    with monkeypatch.context() as patch:
        patch.setattr(pipe.image_processor, "postprocess", lambda *a, **fields: output(whole(*a, **fields)))
        (odd,) = engine.generate([request()])
    (good,) = engine.generate([request()])
    engine.close()
    assert isinstance(odd.error, GenerationError)
    assert words in odd.error.message
    assert good.error is None


def test_running_out_of_memory_fails_one_job_with_advice() -> None:
    pipe = tiny.build("flux")
    big = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with Faulty(pipe.transformer, lambda rows: rows.shape[1] > 16, big):
        engine = Engine(pipe, rows=2)
        small, large = engine.generate([request(width=16, height=16), request(width=64, height=64)])
        engine.close()
    assert small.error is None
    assert isinstance(large.error, GenerationError)
    assert large.error.code == "out_of_memory"
    assert "64x64" in large.error.message
    assert "smaller" in large.error.message


def test_an_unknown_adapter_names_the_nearest(engine: Engine, tmp_path: Path) -> None:
    path = adapter_file(tmp_path, "flat", 1)
    engine.enable_adapters().add("flat", path)
    (result,) = engine.generate([request(adapters=uses("flot"))])
    assert isinstance(result.error, NotFoundError)
    assert "flat" in result.error.message


# ---------------------------------------------------------------- warnings


def test_a_prompt_longer_than_the_text_encoder_holds_is_cut_and_said(engine: Engine) -> None:
    long = request(prompt="fox " * 60)
    short, cut = engine.generate([request(), long])
    assert short.warnings == ()
    (warning,) = cut.warnings
    assert "cut" in warning
    assert "32" in warning


def test_guidance_without_effect_is_said() -> None:
    engine = Engine(tiny.build("flux-schnell"), rows=1)
    quiet, told = engine.generate([request(), request(guidance_scale=3.0)])
    engine.close()
    assert quiet.warnings == ()
    assert told.warnings == ("guidance_scale had no effect: this model does not use it",)


def test_a_negative_prompt_without_effect_is_said(engine: Engine) -> None:
    (result,) = engine.generate([request(negative_prompt="ugly")])
    assert result.warnings == ("negative_prompt had no effect: this model does not use it",)


# ---------------------------------------------------------------- one request at a time


def test_every_step_is_reported_and_the_end_comes_once(engine: Engine) -> None:
    engine.submit(request(num_inference_steps=3), "a")
    events = drain(engine)
    steps = [event.step for event in events if isinstance(event, Progress)]
    assert steps == [0, 1, 2, 3]
    assert [type(event) for event in events if not isinstance(event, Progress)] == [Done]
    assert isinstance(events[-1], Done)


def test_a_short_job_overtakes_a_long_one(engine: Engine) -> None:
    engine.submit(request(num_inference_steps=20, seed=1, height=48), "long")
    while not any(isinstance(event, Progress) and event.step == 3 for event in engine.step()):
        pass
    engine.submit(request(num_inference_steps=1, seed=2), "short")
    done = [event.job_id for event in drain(engine) if isinstance(event, Done)]
    assert done == ["short", "long"]


@pytest.mark.parametrize(("late", "order"), [(False, ["paid", "free"]), (True, ["free", "paid"])])
def test_a_job_that_was_overdue_is_no_longer_passed_by_a_higher_priority(
    late: bool, order: list[str]
) -> None:
    engine = Engine(pipeline(), rows=1)
    engine.submit(request(num_inference_steps=3), "free")
    engine.submit(request(num_inference_steps=9), "paid", priority=1)
    engine.step()
    engine._active["free"].parked -= 2 * engine.max_wait_s * late
    assert [event.job_id for event in drain(engine) if isinstance(event, Done)] == order
    engine.close()


@pytest.mark.parametrize(("rows", "late"), [(2, False), (1, True)])
def test_where_jobs_merge_a_new_one_is_prepared_first_so_that_it_can_join(rows: int, late: bool) -> None:
    engine = Engine(pipeline(), rows=rows)
    engine.submit(request(num_inference_steps=4, seed=1), "running")
    while not any(isinstance(event, Progress) and event.step == 1 for event in engine.step()):
        pass
    engine.submit(request(num_inference_steps=8, seed=2), "new")
    forwards = engine.runner.num_forwards
    while parked(engine, "new") != "transformer" if "new" in engine._active else True:
        engine.step()
    ran = engine.runner.num_forwards - forwards
    drain(engine)
    engine.close()
    assert (ran == 3) is late
    assert (ran == 0) is not late


def test_cancelling_takes_effect_before_the_next_forward(engine: Engine) -> None:
    engine.submit(request(num_inference_steps=20), "a")
    for _ in range(6):
        engine.step()
    forwards = engine.runner.num_forwards
    assert engine.cancel("a")
    assert engine.step() == [Cancelled("a")]
    assert engine.runner.num_forwards == forwards
    assert not engine.cancel("a")
    assert not engine.has_work


def test_a_job_can_be_cancelled_before_it_has_started(engine: Engine) -> None:
    engine.submit(request(), "a")
    assert engine.cancel("a")
    assert [type(event) for event in drain(engine)] == [Progress, Cancelled]


@pytest.mark.parametrize("stage", ["text_encoder_2", "transformer", "vae"])
def test_a_job_can_be_cancelled_at_every_stage(engine: Engine, stage: str) -> None:
    engine.submit(request(), "a")
    engine.step()
    while parked(engine, "a") != stage:
        engine.step()
    engine.cancel("a")
    assert engine.step()[-1] == Cancelled("a")
    assert not engine.has_work


def parked(engine: Engine, job_id: str) -> str:
    """The component that a job waits for."""
    return engine._active[job_id].call.name


def test_jobs_above_the_limit_wait_for_their_turn() -> None:
    engine = Engine(pipeline(), max_jobs=2)
    for index in range(5):
        engine.submit(request(seed=index), str(index))
    most = 0
    done = 0
    while engine.has_work:
        done += sum(isinstance(event, Done) for event in engine.step())
        most = max(most, len(engine._active))
    engine.close()
    assert (most, done) == (2, 5)


def test_closing_ends_what_runs_and_gives_the_pipeline_back() -> None:
    pipe = tiny.build("flux")
    engine = Engine(pipe)
    engine.submit(request(num_inference_steps=9), "a")
    engine.step()
    engine.close()
    assert engine.num_jobs == 0
    assert not any(
        "forward" in part.__dict__ for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2)
    )
    assert "decode" not in pipe.vae.__dict__


def test_pictures_above_the_limit_for_merging_run_as_they_come() -> None:
    engine = Engine(pipeline(), rows=2, max_merge_pixels=32 * 32)
    small = engine.generate([request(), request(seed=2)])
    assert engine.runner.num_forwards == 2
    large = engine.generate([request(height=48), request(height=48, seed=2)])
    assert engine.runner.num_forwards == 2 + 4
    engine.close()
    assert all(result.error is None for result in small + large)


# ---------------------------------------------------------------- previews and adapters


def test_previews_come_evenly_spaced_and_resemble_the_picture() -> None:
    engine = Engine(tiny.build("flux"))
    engine.warm_up()
    engine.submit(request(num_inference_steps=8), "a", num_previews=3)
    events = drain(engine)
    engine.close()
    previews = [event for event in events if isinstance(event, Preview)]
    assert [(event.index, event.step) for event in previews] == [(0, 2), (1, 4), (2, 6)]
    for event in previews:
        assert len(event.payload) == event.width * event.height * 3
    (done,) = [event for event in events if isinstance(event, Done)]
    final = np.frombuffer(done.payload, np.uint8).reshape(16, 2, 16, 2, 3).mean((1, 3))

    def distance(event: Preview) -> float:
        picture = np.frombuffer(event.payload, np.uint8).reshape(16, 16, 3)
        return float(np.abs(picture - final).mean())

    shuffled = final.reshape(-1, 3)[np.random.default_rng(0).permutation(256)].reshape(16, 16, 3)
    assert distance(previews[2]) < distance(previews[0])
    assert distance(previews[2]) < float(np.abs(shuffled - final).mean())


def test_previews_do_not_change_the_picture(engine: Engine) -> None:
    engine.warm_up()
    engine.submit(request(num_inference_steps=4), "with", num_previews=2)
    engine.submit(request(num_inference_steps=4), "without")
    events = [event for _ in range(40) if engine.has_work for event in engine.step()]
    assert sum(isinstance(event, Preview) for event in events) == 2
    with_previews, without = (event.payload for event in events if isinstance(event, Done))
    assert with_previews == without


def adapter_file(folder: Path, name: str, seed: int) -> Path:
    state = adapter_files.LAYOUTS["flux", "peft"](pipeline(), seed)
    return adapter_files.write(state, folder / f"{name}.safetensors")


def test_adapters_mix_in_one_batch_and_keep_each_rows_bytes(tmp_path: Path) -> None:
    pipe = tiny.build("flux")
    engine = Engine(pipe, rows=4)
    for index, route in enumerate(("flat", "mono")):
        engine.enable_adapters().add(route, adapter_file(tmp_path, route, index))
    routes = (None, "flat", "mono", "flat", None, "mono")
    requests = [request(adapters=uses(route), seed=5, num_inference_steps=3) for route in routes]
    requests.append(request(adapters=uses("flat", 0.25), seed=5, num_inference_steps=3))
    alone = same_alone_and_together(engine, requests)
    engine.close()
    base, flat, mono, weak = alone[0], alone[1], alone[2], alone[6]
    assert not np.array_equal(base, flat)
    assert not np.array_equal(flat, mono)
    assert not np.array_equal(flat, weak)
    assert not np.array_equal(base, weak)


def test_a_job_lets_its_adapter_go_when_it_ends(engine: Engine, tmp_path: Path) -> None:
    engine.enable_adapters().add("flat", adapter_file(tmp_path, "flat", 1))
    engine.submit(request(adapters=uses("flat"), num_inference_steps=9), "a")
    engine.step()
    lease = engine._active["a"].lease
    assert lease is not None
    assert lease.resident.num_leases == 1
    engine.cancel("a")
    assert lease.resident.num_leases == 0
    assert engine.bank_stats().loads == 1


# ---------------------------------------------------------------- no growth


def living(kind: type) -> int:
    return sum(issubclass(type(each), kind) for each in gc.get_objects())


def test_two_hundred_jobs_leave_nothing_behind() -> None:
    engine = Engine(pipeline(), rows=4)
    drain_and_count(engine, 8)
    gc.collect()
    before = tensors()
    gc.disable()
    try:
        drain_and_count(engine, 200)
        assert living(Job) == living(PipelineRun) == 0
        assert living(greenlet) <= 1
        assert tensors() <= before + 2
    finally:
        gc.enable()
    engine.close()


def tensors() -> int:
    return sum(type(each) is torch.Tensor for each in gc.get_objects())


def drain_and_count(engine: Engine, num: int) -> None:
    """Jobs that finish, jobs that are cancelled and jobs that fail, all mixed."""
    done = 0
    for index in range(num):
        bad = {"max_sequence_length": 513} if index % 10 == 3 else {"max_sequence_length": 32}
        small = replace(request(seed=index, num_inference_steps=1, extra=bad), width=16, height=16)
        engine.submit(small, str(index))
        if index % 2 == 1:
            engine.step()
            engine.cancel(str(index))
        if index % 8 == 7:
            done += sum(isinstance(event, (Done, Failed, Cancelled)) for event in drain(engine))
    drain(engine)
    assert engine.num_jobs == 0
