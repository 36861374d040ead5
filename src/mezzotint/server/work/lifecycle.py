"""The life cycle of an endpoint as one table: what each command does in each state.

A command notes at once what is wanted and takes one action. The two states that take time, DRAINING and
STOPPING, end by looking at what is wanted by then; so a later command always wins, whatever it interrupts.
"""

from __future__ import annotations

from enum import Enum, StrEnum, auto


class State(StrEnum):
    CREATED = "created"
    STARTING = "starting"
    """No worker is ready; some are coming up."""
    READY = "ready"
    DRAINING = "draining"
    """Jobs finish before the workers are stopped."""
    STOPPING = "stopping"
    """The workers are ending and take no job."""
    SLEEPING = "sleeping"
    STOPPED = "stopped"
    FAILED = "failed"


class Desired(StrEnum):
    """What the owner wants of an endpoint; survives restarts of the server."""

    RUNNING = "running"
    SLEEPING = "sleeping"
    TERMINATED = "terminated"


class Command(StrEnum):
    START = "start"
    SLEEP = "sleep"
    RESTART = "restart"
    TERMINATE = "terminate"
    UPDATE = "update"


class Action(Enum):
    NOTHING = auto()
    """What is under way ends in what is wanted."""
    LAUNCH = auto()
    """Start the workers of the current deployment."""
    ROLL = auto()
    """Bring up the next deployment beside the current one; it takes over when it is ready."""
    DRAIN = auto()
    """Let jobs finish, then stop."""
    RESUME = auto()
    """End the drain, then act as the state without it asks."""
    STOP = auto()
    """End the workers, then do what is wanted."""
    REST = auto()
    """There are no workers: take the state that is wanted."""
    ADOPT = auto()
    """There are no workers: make the next deployment the current one."""


DESIRED_BY = {
    Command.START: Desired.RUNNING,
    Command.SLEEP: Desired.SLEEPING,
    Command.RESTART: Desired.RUNNING,
    Command.TERMINATE: Desired.TERMINATED,
}
"""What is wanted after each command; an update changes nothing about that."""

REFUSED_ONCE_TERMINATED = (Command.START, Command.SLEEP)

_ = Action
_ROWS: dict[State, tuple[Action, ...]] = {
    #                START      SLEEP      RESTART    TERMINATE  UPDATE
    State.CREATED:  (_.LAUNCH,  _.REST,    _.LAUNCH,  _.REST,    _.ADOPT),
    State.STARTING: (_.NOTHING, _.DRAIN,   _.STOP,    _.DRAIN,   _.STOP),
    State.READY:    (_.NOTHING, _.DRAIN,   _.ROLL,    _.DRAIN,   _.ROLL),
    State.DRAINING: (_.RESUME,  _.NOTHING, _.RESUME,  _.DRAIN,   _.NOTHING),
    State.STOPPING: (_.NOTHING, _.NOTHING, _.NOTHING, _.NOTHING, _.NOTHING),
    State.SLEEPING: (_.LAUNCH,  _.NOTHING, _.LAUNCH,  _.REST,    _.ADOPT),
    State.STOPPED:  (_.LAUNCH,  _.REST,    _.LAUNCH,  _.NOTHING, _.ADOPT),
    State.FAILED:   (_.NOTHING, _.STOP,    _.STOP,    _.STOP,    _.STOP),
}  # fmt: skip
LIFE_CYCLE = {state: dict(zip(Command, row, strict=True)) for state, row in _ROWS.items()}
