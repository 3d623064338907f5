"""When to save and when to stop: decided once for all ranks, at a cost that does not grow with the step rate."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass

from dckpt.engine.signals import SignalWatch
from dckpt.errors import ConfigError
from dckpt.format.values import dump_json, load_json
from dckpt.ranks.coordination import Coordination
from dckpt.ranks.topology import Topology

CHECK_INTERVAL_S = 1.0  # how long a signal or a clock may go unnoticed when steps are faster than this
CHECKS_KEPT = 1000


class StepAction(enum.Enum):
    """What the training loop does after `Checkpointer.step`."""

    CONTINUE = "continue"
    STOP = "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Every:
    """Save every `steps` optimizer steps (at multiples of it) and at least every `minutes`; None leaves one out."""

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"Every(steps=): expected at least 1, found {self.steps}.")
        if self.minutes is not None and self.minutes <= 0:
            raise ConfigError(f"Every(minutes=): expected more than 0, found {self.minutes}.")
        if self.steps is None and self.minutes is None:
            raise ConfigError("Every: expected steps= or minutes=, found neither.")


@dataclass(frozen=True, slots=True)
class StepDecision:
    """The same on every rank."""

    save: bool
    stop: str | None  # the signal's name


class Cadence:
    """Decides at *checks*. A check costs one store read a rank; how many micro-batches lie between two is itself decided.

    Every rank must call `decide` with the same steps. Ranks other than the coordinator wait in a check until the
    coordinator has come to the same step, at most `deadline_s`.
    """

    def __init__(
        self,
        every: Every | None,
        coordination: Coordination,
        topology: Topology,
        signals: SignalWatch,
        *,
        deadline_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._every = every
        self._coordination = coordination
        self._topology = topology
        self._signals = signals
        self._deadline_s = deadline_s
        self._clock = clock
        self._checks = 0
        self._next_check = 0
        self._posted: str | None = None
        self._last_save_s = clock()
        self._last_check: tuple[int, float] | None = None

    def note_save(self) -> None:
        """The clock of `Every(minutes=)` starts again."""
        self._last_save_s = self._clock()

    def reset(self) -> None:
        """The step counter was set by a load: check at the next step."""
        self._next_check = 0
        self._last_check = None

    def decide(self, step: int, is_last: bool, *, micro_step: int = 0, accumulation: int = 1) -> StepDecision:
        """What to do after optimizer step `step`. `is_last`: training ends here, so its state is worth saving.

        Checks are counted in micro-batches, `accumulation` a step. In the middle of a step (`micro_step`) only signals count.
        """
        every = self._every
        due = not micro_step and (
            is_last or (every is not None and every.steps is not None and step % every.steps == 0)
        )
        place = step * accumulation + micro_step
        if place < self._next_check and not is_last:
            return StepDecision(save=due, stop=None)
        self._checks += 1
        self._post_signal()
        key = f"check/{self._checks}"
        if self._topology.is_coordinator:
            message = self._judge(place)
            self._coordination.publish(key, message)
            if self._checks > CHECKS_KEPT:
                self._coordination.delete(f"check/{self._checks - CHECKS_KEPT}")
        else:
            message = self._coordination.await_key(
                key, self._deadline_s, waiting_for=f"step(state) at step {step}", ranks=[0]
            )
        decided = load_json(message, key=key, limit=65536)
        self._next_check = decided["next"]
        return StepDecision(save=due or (decided["save"] and not micro_step), stop=decided["stop"])

    def _post_signal(self) -> None:
        received = self._signals.received
        if received is not None and received != self._posted:
            self._posted = received
            self._coordination.publish("signal", received.encode())

    def _judge(self, place: int) -> bytes:
        now = self._clock()
        signal = self._coordination.read("signal")
        late = (
            self._every is not None
            and self._every.minutes is not None
            and now - self._last_save_s >= 60 * self._every.minutes
        )
        ahead = 1
        if self._last_check is not None and place > self._last_check[0]:
            taken = place - self._last_check[0]
            seconds_each = (now - self._last_check[1]) / taken
            # At most twice as far as last time: a few quick steps say little about those that follow.
            ahead = max(1, min(2 * taken, int(CHECK_INTERVAL_S / max(seconds_each, 1e-6))))
        self._last_check = (place, now)
        return dump_json({"save": late, "stop": signal.decode() if signal else None, "next": place + ahead})
