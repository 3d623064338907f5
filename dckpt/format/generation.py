"""Generation records: one per (re)start of a run, each naming its parent (FORMAT.md, section 9)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from dckpt.errors import ConfigError, CorruptCheckpointError
from dckpt.format.fields import Fields, ensure_version
from dckpt.format.layout import (
    GENERATION_MAX,
    MICRO_STEP_MAX,
    STEP_MAX,
    WORLD_SIZE_MAX,
    CheckpointId,
    parse_checkpoint_name,
)
from dckpt.format.refusal import corrupt, shown
from dckpt.format.sealed_json import open_sealed_json, seal_json

GENERATION_MAJOR = 1
GENERATION_MINOR = 0
GENERATION_BYTES_MAX = 65536

Reason = Literal["start", "resume", "walk-back", "rollback", "load", "leg", "repair", "reshard", "import"]

_KEYS = ("dckpt", "version", "number", "run_id", "parent", "reason", "world_size", "created_unix_s", "nonce")
_PARENT_KEYS = ("checkpoint", "step", "micro_step", "generation", "manifest_sha256")


@dataclass(frozen=True, slots=True)
class Parent:
    """The checkpoint that a generation continues, pinned down by the digest of its manifest."""

    checkpoint: str
    step: int
    micro_step: int
    generation: int
    manifest_sha256: str

    @property
    def id(self) -> CheckpointId:
        """Which checkpoint of the run it is."""
        return CheckpointId(step=self.step, micro_step=self.micro_step, generation=self.generation)


@dataclass(frozen=True, slots=True)
class Generation:
    """One span of a run between (re)starts. `parent` None means from scratch."""

    number: int
    run_id: str
    parent: Parent | None
    reason: Reason
    world_size: int
    created_unix_s: float
    nonce: str


def encode_generation(generation: Generation) -> bytes:
    """The content of a generation record. What `parse_generation` would refuse is refused here."""
    parent = generation.parent
    data = seal_json(
        {
            "dckpt": "generation",
            "version": [GENERATION_MAJOR, GENERATION_MINOR],
            "number": generation.number,
            "run_id": generation.run_id,
            "parent": None if parent is None else {name: getattr(parent, name) for name in _PARENT_KEYS},
            "reason": generation.reason,
            "world_size": generation.world_size,
            "created_unix_s": float(generation.created_unix_s),
            "nonce": generation.nonce,
        }
    )
    try:
        parsed = parse_generation(data, key="generation record")
    except CorruptCheckpointError as error:
        raise ConfigError(
            f"The generation record cannot be written, readers would refuse it: {error.message}"
        ) from error
    assert parsed == generation, "a generation record must read back as it was written"
    return data


def parse_generation(data: bytes, *, key: str) -> Generation:
    """The record in the file `key`, every field checked."""
    found = open_sealed_json(data, key=key, limit=GENERATION_BYTES_MAX)
    _, minor = ensure_version(found, key=key, kind="generation", major=GENERATION_MAJOR)
    fields = Fields(found, key=key)
    fields.ensure_known(_KEYS, is_newer=minor > GENERATION_MINOR)
    number = fields.integer("number", 1, GENERATION_MAX)
    return Generation(
        number=number,
        run_id=fields.component("run_id"),
        parent=_parse_parent(fields.value("parent"), key, number) if fields.has("parent") else None,
        reason=cast("Reason", fields.choice("reason", get_args(Reason))),
        world_size=fields.integer("world_size", 1, WORLD_SIZE_MAX),
        created_unix_s=fields.seconds("created_unix_s"),
        nonce=fields.component("nonce"),
    )


def _parse_parent(found: Any, key: str, number: int) -> Parent:
    fields = Fields(found, key=key, path="parent")
    fields.ensure_known(_PARENT_KEYS, is_newer=False)
    parent = Parent(
        checkpoint=fields.text("checkpoint"),
        step=fields.integer("step", 0, STEP_MAX),
        micro_step=fields.integer("micro_step", 0, MICRO_STEP_MAX),
        generation=fields.integer("generation", 1, GENERATION_MAX),
        manifest_sha256=fields.hex64("manifest_sha256"),
    )
    # A parent that is not older would let the line of a run go in circles.
    if parent.generation >= number:
        raise corrupt(key, "parent.generation", f"below {number}", str(parent.generation))
    if parse_checkpoint_name(parent.checkpoint) != parent.id:
        raise corrupt(key, "parent.checkpoint", parent.id.name, shown(parent.checkpoint))
    return parent
