"""Where a checkpoint comes from that no training run saved: the manifest's `lineage` (FORMAT.md, section 8.1)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

from dckpt.format.fields import Fields
from dckpt.format.layout import GENERATION_MAX, MICRO_STEP_MAX, STEP_MAX, WORLD_SIZE_MAX, is_tensor_name
from dckpt.format.refusal import shown

How = Literal["reshard", "export", "repair", "import"]

CARRIED_MAX = 2**20
CHANGES_MAX = 10_000

_KEYS = (
    "how", "run_id", "checkpoint", "step", "micro_step", "generation", "manifest_sha256", "world_size", "carried",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Origin:
    """The checkpoint whose state this one holds in another form, pinned down by the digest of its manifest.

    checkpoint: the name of its directory. world_size: of the ranks that saved it. carried: tensors that differed between
    those ranks and that this checkpoint holds once, with rank 0's value. changes: what a repair or an import derived, filled
    in or left out, a sentence each.
    """

    how: How
    run_id: str | None
    checkpoint: str
    step: int | None
    micro_step: int
    generation: int
    manifest_sha256: str
    world_size: int
    carried: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As the manifest holds it."""
        found = asdict(self) | {"carried": list(self.carried), "changes": list(self.changes)}
        if not self.changes:
            del found["changes"]
        return found


def parse_origin(found: Any, *, key: str) -> Origin:
    """The record in the manifest `key`, every field checked."""
    fields = Fields(found, key=key, path="lineage")
    fields.ensure_known((*_KEYS, "changes"), is_newer=False)
    checkpoint = fields.text("checkpoint")
    if not is_tensor_name(checkpoint):
        raise fields.refuse("checkpoint", "the name of a directory", shown(checkpoint))
    return Origin(
        how=cast("How", fields.choice("how", get_args(How))),
        run_id=fields.component("run_id") if fields.has("run_id") else None,
        checkpoint=checkpoint,
        step=fields.integer("step", 0, STEP_MAX) if fields.has("step") else None,
        micro_step=fields.integer("micro_step", 0, MICRO_STEP_MAX),
        generation=fields.integer("generation", 0, GENERATION_MAX),
        manifest_sha256=fields.hex64("manifest_sha256"),
        world_size=fields.integer("world_size", 1, WORLD_SIZE_MAX),
        carried=fields.names("carried", limit=CARRIED_MAX),
        changes=fields.names("changes", limit=CHANGES_MAX) if "changes" in fields else (),
    )
