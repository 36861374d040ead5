"""Who goes next and how long one waits, without clock or network."""

from __future__ import annotations

import gc
import random
import time

from mezzotint.messages import Generate
from mezzotint.server.work.queueing import Job, JobQueue, Throughput
from mezzotint.spec import ImageSpec
from tests.attacks import attack


def job(
    key: str = "a",
    work_s: float = 1.0,
    *,
    weight: float = 1.0,
    priority: int = 0,
    deadline: float = 1e9,
    steps: int = 10,
) -> Job:
    return Job(
        Generate(f"{key}{work_s}", ImageSpec(prompt="x", num_inference_steps=steps, seed=0)),
        key,
        weight,
        priority,
        work_s,
        deadline,
        on_end=lambda job, outcome: None,
        on_progress=lambda job: None,
        on_preview=lambda job, preview: None,
    )


def run_all(queue: JobQueue, now: float = 0.0) -> list[Job]:
    order = []
    while (first := queue.peek(now)) is not None:
        queue.take(first, now)
        queue.progressed(first, first.spec.num_inference_steps)
        queue.finished(first)
        order.append(first)
    return order


def test_the_least_work_goes_first() -> None:
    queue = JobQueue(max_wait_s=100)
    jobs = [job(work_s=seconds) for seconds in (5, 1, 3)]
    for one in jobs:
        queue.put(one, 1.0)
    assert [one.work_s for one in run_all(queue, 2.0)] == [1, 3, 5]


def test_a_job_that_waited_longer_than_the_bound_goes_first() -> None:
    queue = JobQueue(max_wait_s=20)
    long = job(work_s=9)
    queue.put(long, 1.0)
    queue.put(job(work_s=1), 20.0)
    assert queue.peek(20.5) is not long
    assert queue.peek(21.5) is long


def test_a_job_whose_deadline_is_near_goes_first() -> None:
    queue = JobQueue(max_wait_s=1000)
    long = job(work_s=9, deadline=30)
    queue.put(long, 1.0)
    queue.put(job(work_s=1), 2.0)
    assert queue.peek(10.0) is not long
    assert queue.peek(13.0) is long


def test_two_keys_share_by_weight_however_many_jobs_one_has() -> None:
    queue = JobQueue(max_wait_s=1000)
    for _ in range(200):
        queue.put(job("greedy"), 1.0)
    for _ in range(20):
        queue.put(job("modest", weight=2.0), 1.0)
    first = [one.key_id for one in run_all(queue)][:30]
    assert first.count("modest") == 20


def test_a_higher_priority_goes_first_whatever_its_key_has_had() -> None:
    queue = JobQueue(max_wait_s=1000)
    for _ in range(5):
        queue.put(job("free"), 1.0)
        queue.put(job("paid", work_s=9, priority=1), 1.0)
        queue.put(job("idle", work_s=0.1, priority=-1), 1.0)
    assert [one.key_id for one in run_all(queue, 2.0)] == ["paid"] * 5 + ["free"] * 5 + ["idle"] * 5


def test_what_has_waited_too_long_takes_turns_with_a_higher_priority() -> None:
    queue = JobQueue(max_wait_s=20)
    for _ in range(10):
        queue.put(job("free"), 1.0)
    for _ in range(40):
        queue.put(job("paid", priority=1), 1.0)
    before = [one.key_id for one in take_some(queue, 15, now=20.0)]
    after = [one.key_id for one in take_some(queue, 20, now=22.0)]
    assert before == ["paid"] * 15
    assert after.count("free") == 10, "half of it: the time behind the others earns nothing on top"


def test_a_deadline_that_is_near_takes_turns_with_a_higher_priority() -> None:
    queue = JobQueue(max_wait_s=1000)
    urgent = job("free", deadline=10)
    queue.put(urgent, 1.0)
    for _ in range(3):
        queue.put(job("paid", priority=1), 1.0)
    assert urgent not in take_some(queue, 1, now=2.0)
    assert urgent in take_some(queue, 2, now=8.5)


def test_the_wait_behind_a_higher_priority_is_told() -> None:
    queue = JobQueue(max_wait_s=20)
    for _ in range(10):
        queue.put(job("free"), 1.0)
        queue.put(job("paid", priority=1), 1.0)
    assert queue.work_before("new", 1.0, 0, 2.0) == 10
    assert queue.work_before("new", 1.0, 1, 2.0) == 0
    assert queue.work_before("paid", 1.0, 1, 2.0) == 10
    assert queue.work_before("paid", 1.0, 1, 30.0) == 20, "what has waited too long takes turns with it"
    (free,) = [one for one in queue.waiting() if one.key_id == "free"][-1:]
    (paid,) = [one for one in queue.waiting() if one.key_id == "paid"][-1:]
    assert queue.ahead(free).num >= 10
    assert queue.ahead(paid).num < 10


def take_some(queue: JobQueue, number: int, now: float) -> list[Job]:
    """The next jobs, each run to its end."""
    taken = []
    for _ in range(number):
        one = queue.peek(now)
        assert one is not None
        queue.take(one, now)
        queue.progressed(one, one.spec.num_inference_steps)
        queue.finished(one)
        taken.append(one)
    return taken


def test_a_newcomer_waits_for_one_job_at_most() -> None:
    queue = JobQueue(max_wait_s=1000)
    for _ in range(200):
        queue.put(job("greedy"), 1.0)
    for _ in range(50):
        greedy = queue.peek(2.0)
        assert greedy is not None
        queue.take(greedy, 2.0)
        queue.progressed(greedy, 10)
        queue.finished(greedy)
    newcomer = job("new", work_s=5)
    queue.put(newcomer, 3.0)
    order = [one.key_id for one in run_all(queue)]
    assert order.index("new") <= 1


def test_of_level_keys_the_one_with_nothing_running_goes_first() -> None:
    queue = JobQueue(max_wait_s=1000)
    for _ in range(3):
        queue.put(job("greedy"), 1.0)
    running = queue.peek(1.0)
    assert running is not None
    queue.take(running, 1.0)
    queue.put(job("new"), 1.0)
    first = queue.peek(1.0)
    assert first is not None
    assert first.key_id == "new"


def test_an_idle_key_gathers_no_credit() -> None:
    queue = JobQueue(max_wait_s=1000)
    for key in ("a", "b"):
        queue.put(job(key), 1.0)
    for _ in range(50):
        queue.put(job("a"), 1.0)
    assert len(run_all(queue)) == 52
    for _ in range(10):
        queue.put(job("a"), 2.0)
        queue.put(job("b"), 2.0)
    first = [one.key_id for one in run_all(queue)][:10]
    assert 4 <= first.count("b") <= 6


def test_a_newcomers_wait_is_its_share_and_never_more_than_all() -> None:
    queue = JobQueue(max_wait_s=1000)
    for _ in range(100):
        queue.put(job("greedy"), 1.0)
    assert queue.work_before("greedy", 1.0, 0, 2.0) == 100
    assert queue.work_before("new", 1.0, 0, 2.0) == 0
    running = queue.peek(1.0)
    assert running is not None
    queue.take(running, 1.0)
    assert queue.work_before("new", 1.0, 0, 2.0) == 1
    queue.put(job("new"), 1.0)
    assert queue.work_before("new", 1.0, 0, 2.0) == 3
    assert queue.work_before("new", 1.0, 0, 2.0) <= queue.backlog_s()


def test_work_that_a_job_did_not_use_is_given_back() -> None:
    queue = JobQueue(max_wait_s=1000)
    one, two = job("a", work_s=10), job("a", work_s=10)
    queue.put(one, 1.0)
    queue.put(two, 1.0)
    queue.take(one, 1.0)
    queue.progressed(one, 4)
    assert queue.backlog_s() == 16
    queue.finished(one)
    assert queue.backlog_s() == 10
    queue.remove(two)
    assert (queue.backlog_s(), len(queue)) == (0, 0)


def test_a_job_that_comes_back_keeps_its_age_and_starts_over() -> None:
    queue = JobQueue(max_wait_s=20)
    one = job(work_s=9)
    queue.put(one, 1.0)
    queue.take(one, 2.0)
    queue.progressed(one, 5)
    queue.finished(one)
    queue.put(job(work_s=1), 15.0)
    queue.put(one, 16.0)
    assert one.step == 0
    assert queue.peek(21.5) is one
    assert queue.waiting().count(one) == 1


def test_what_goes_before_a_job_is_known() -> None:
    queue = JobQueue(max_wait_s=1000)
    jobs = [job(work_s=seconds) for seconds in (5, 1, 3)]
    for one in jobs:
        queue.put(one, 1.0)
    assert [queue.ahead(one).num for one in jobs] == [2, 0, 1]


def test_a_new_speed_counts_the_waiting_work_anew() -> None:
    queue = JobQueue(max_wait_s=1000)
    short, long = job(work_s=1, steps=4), job(work_s=1, steps=50)
    queue.put(long, 1.0)
    queue.put(short, 1.0)
    queue.reestimate(lambda one: one.spec.num_inference_steps * 0.1)
    assert queue.peek(2.0) is short
    assert abs(queue.backlog_s() - 5.4) < 1e-9


def test_any_order_of_events_keeps_the_account_right() -> None:
    chance = random.Random(7)
    queue, waiting, running = JobQueue(max_wait_s=5), [], []
    for now in range(1, 3000):
        if chance.random() < 0.5:
            key, work_s = chance.choice("abc"), chance.choice([0.0, 0.4, 5.0])
            one = job(key, work_s=work_s, priority="abc".index(key) // 2, deadline=now + 50)
            queue.put(one, now)
            waiting.append(one)
        action = chance.random()
        first = queue.peek(now)
        assert (first is None) == (not waiting)
        if first is not None and action < 0.4:
            queue.take(first, now)
            waiting.remove(first)
            running.append(first)
        elif waiting and action < 0.5:
            queue.remove(waiting.pop(chance.randrange(len(waiting))))
        if running and chance.random() < 0.6:
            one = running.pop(chance.randrange(len(running)))
            queue.progressed(one, chance.randrange(11))
            queue.finished(one)
            if chance.random() < 0.2:
                queue.put(one, now)
                waiting.append(one)
        assert len(queue) == len(waiting)
        assert set(queue.waiting()) == set(waiting)
        expected = sum(one.work_s for one in waiting) + sum(one.remaining_s for one in running)
        assert abs(queue.backlog_s() - expected) < 1e-6


@attack("A queue of tens of thousands of jobs", outcome="an entry costs the same")
def test_an_entry_costs_the_same_however_many_jobs_wait() -> None:
    def cpu_s(number: int) -> float:
        queue, jobs = JobQueue(max_wait_s=1000), [job() for _ in range(number)]
        gc.collect()
        gc.disable()  # a collection costs by what other tests have left in this process
        try:
            began = time.thread_time()
            for one in jobs:
                queue.put(one, 1.0)
            return time.thread_time() - began
        finally:
            gc.enable()

    few_s = min(cpu_s(1500) for _ in range(3))
    assert cpu_s(15_000) < 40 * few_s, "ten times as many should take about ten times as long"


@attack("Sending and cancelling without end", outcome="what left the queue is not kept")
def test_jobs_that_left_are_not_held_while_another_of_their_key_waits() -> None:
    queue = JobQueue(max_wait_s=1000)
    oldest = job(work_s=0.5)
    queue.put(oldest, 1.0)
    for _ in range(1000):
        one = job()
        queue.put(one, 2.0)
        queue.remove(one)
    share = queue._shares["a"]
    assert max(len(share.by_age), len(share.by_work)) < 50
    assert run_all(queue, 3.0) == [oldest]


def test_a_job_that_left_and_came_back_is_there_once() -> None:
    queue = JobQueue(max_wait_s=1000)
    first, other = job(work_s=1), job(work_s=2)
    for one in (first, other):
        queue.put(one, 1.0)
    queue.take(first, 2.0)
    queue.finished(first)
    queue.put(first, 3.0)
    assert queue.waiting() == [first, other], "in the order of their age"
    assert run_all(queue, 4.0) == [first, other]


def test_throughput_follows_what_is_measured() -> None:
    throughput = Throughput.expected(1.0)
    for _ in range(100):
        throughput = throughput.observed(work_s=2.0, clock_s=0.5)
    assert 3.5 < throughput.speed < 4.1
