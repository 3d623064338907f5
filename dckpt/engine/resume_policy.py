"""What `Checkpointer.resume` may do, chosen by the caller."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from dckpt.engine.arguments import ensure_choice
from dckpt.engine.rng_restore import RNG_POLICIES, RngPolicy
from dckpt.errors import ConfigError
from dckpt.resume.checks.registry import ALL_IDS


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePolicy:
    """How `resume` behaves. walk_back: pass over checkpoints whose damage was confirmed by a second read.

    gradients: what becomes of those that a checkpoint from the middle of an accumulation holds: "restore", or "drop" and
        begin that step again, which the report says.
    rng: "derive" restores random streams exactly on the same mesh; on another one streams that were equal on all ranks are
        copied and the others derived anew by a documented rule. "refuse" refuses where one would be derived, "exact" where one
        would not come back exactly or is missing; "fresh" leaves all as the program seeded them.
    allow: checks whose critical findings do not stop the run; they become warnings, and later checkpoints name them.
    countdown_s: how long a person at a terminal may think about a critical finding; without one the run stops at once.
    """

    walk_back: bool = True
    gradients: Literal["restore", "drop"] = "restore"
    rng: RngPolicy = "derive"
    allow: Collection[str] = ()
    countdown_s: float = 10.0

    def __post_init__(self) -> None:
        ensure_choice("gradients", self.gradients, ("restore", "drop"), of="ResumePolicy")
        ensure_choice("rng", self.rng, RNG_POLICIES, of="ResumePolicy")
        if isinstance(self.allow, str):
            raise ConfigError(f"allow={self.allow!r}: expected a sequence of names, such as ({self.allow!r},)")
        unknown = sorted(set(self.allow) - ALL_IDS)
        if unknown:
            # A typo would allow nothing, silently.
            raise ConfigError(
                f"allow={unknown}: expected names of checks, such as {sorted(ALL_IDS)[:5]}; `dckpt explain` lists them."
            )
