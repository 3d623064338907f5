"""`dckpt import`: a foreign checkpoint as the first of a dckpt run, from which a resume continues. Changes no old file."""

from __future__ import annotations

import hashlib
import math
import time
import uuid
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dckpt import failpoint
from dckpt.blocks.source import PieceMemory, parts_of_piece
from dckpt.blocks.write import WriterPool, write_shard_file
from dckpt.catalog.generations import create_generation
from dckpt.catalog.transaction import Transaction
from dckpt.errors import ConfigError, CorruptCheckpointError, StorageFullError
from dckpt.format.checksum import FileHasher
from dckpt.format.index import Chunk, LayoutIndex, build_index
from dckpt.format.layout import shard_file_name
from dckpt.format.manifest import FileEntry, Manifest
from dckpt.format.origin import Origin
from dckpt.format.sealed_json import JsonValue
from dckpt.format.shard_file import ShardFilePlan, ShardTensor, plan_shard_file
from dckpt.format.streams import stream_digest
from dckpt.format.values import TensorRef, dump_json, encode_value
from dckpt.planning.mesh import saved_mesh
from dckpt.planning.records import RECORD_BYTES_MAX, RNG, record_capacity, values_record_name
from dckpt.planning.streams import classify_streams
from dckpt.tools.components import CONSEQUENCES
from dckpt.tools.destination import Destination, choose_import
from dckpt.tools.foreign import ForeignState, files_of, read_foreign
from dckpt.tools.foreign_names import Positions, Unmatched, match_by_shape, match_in_order
from dckpt.tools.foreign_torch import ForeignTensor, ModelOrder, order_by_config, read_bytes_of
from dckpt.tools.foreign_verdict import states_of
from dckpt.tools.refill import MOMENTS_LOST, Change, refill_streams
from dckpt.version import __version__

BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "inv_freq", "position_ids", "masked_bias")
"""Last words of names that are buffers of well-known layers: no optimizer has them."""

ORDER_BYTES_MAX = 64 * 2**20
PARTS = ("model", "optim", "scheduler", "scaler", "progress", "rng")


@dataclass(frozen=True, slots=True)
class ImportRequest:
    """What to import, and what the files do not say.

    order: a file that names the optimizer's parameters, one a line, in its order. ties: `alias=name` of tied parameters. batch:
    samples of one optimizer step. fill: derive random streams that are missing. optimizer: its class, if not as its state looks.
    """

    source: str
    destination: str
    order: str | None = None
    ties: tuple[str, ...] = ()
    batch: int | None = None
    optimizer: str | None = None
    fill: bool = False


@dataclass(frozen=True, slots=True)
class ImportPlan:
    """What a person wants to know before it happens."""

    source: str
    destination: str
    generation: int
    changes: tuple[Change, ...]
    refusals: tuple[str, ...]
    missing: tuple[str, ...]
    """Parts that the new checkpoint will not have: it is PARTIAL. The position in the data is never in such files."""
    num_written: int
    bytes_written: int


@dataclass(slots=True)
class PreparedImport:
    """The plan with all that it takes to carry it out."""

    plan: ImportPlan
    destination: Destination
    manifest: Manifest
    files: list[tuple[ShardFilePlan, list[memoryview]]] = field(default_factory=list)
    empty: Mapping[str, ForeignTensor] = field(default_factory=dict)
    """Tensors without elements: the index alone knows them."""
    source: str = ""


def prepare_import(request: ImportRequest) -> PreparedImport:
    """Reads everything and decides. `ConfigError` if DST is no place for it, `CorruptCheckpointError` if a file is damaged."""
    # Before anything is read of them: what changes from here on is noticed when the import is carried out.
    digest = digest_of(files_of(request.source))
    state = read_foreign(request.source)
    if state.troubles:
        raise CorruptCheckpointError(
            f"Import of {state.url}: expected files that can be read, found {len(state.troubles)} that cannot: "
            f"{state.troubles[0]} Remove what shall not be imported, or restore it.",
            key=state.url,
        )
    return _Import(request, state, digest).run()


class _Import:
    """One import: collects tensors, values and changes part by part."""

    def __init__(self, request: ImportRequest, state: ForeignState, digest: str) -> None:
        self.request = request
        self.digest = digest
        self.state = state
        self.tensors: dict[str, ForeignTensor] = {}
        self.values: dict[str, JsonValue] = {}
        self.aliases: dict[str, str] = {}
        self.changes: list[Change] = []
        self.refusals: list[str] = []
        self.step = state.step or 0

    def run(self) -> PreparedImport:
        self._take_model()
        order = self._order()
        self._take_ties(order)
        self._take_optimizer(order)
        self._take_plain("scheduler", self.state.scheduler)
        self._take_plain("scaler", self.state.scaler)
        self._take_progress()
        return self._prepare()

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _take_model(self) -> None:
        if not self.state.weights:
            self.refusals.append("There are no weights; a run cannot begin without a model.")
        first: dict[Hashable, str] = {}
        for name, tensor in self.state.weights.items():
            # Of one address, dtype, shape and strides: the same elements. A transposed view has others, in another order.
            key = (tensor.storage, tensor.dtype, tensor.shape)
            held = name if tensor.storage is None else first.setdefault(key, name)
            if held == name:
                self.tensors[f"model.{name}"] = tensor
            else:
                self.aliases[f"model.{name}"] = f"model.{held}"
        self.values["model"] = {"is_mapping": False, "extra": {}}

    def _order(self) -> ModelOrder | None:
        path = Path(self.state.url)
        if self.request.order is not None:
            text = read_bytes_of(Path(self.request.order), ORDER_BYTES_MAX).decode("utf-8", "replace")
            names = tuple(line.strip() for line in text.splitlines() if line.strip())
            return ModelOrder(names, label=self.request.order)
        found = order_by_config(path, num_weights=len(self.state.weights)) if path.is_dir() else None
        if found is not None:
            return found
        if self.state.has_order:
            names = tuple(name.removeprefix("model.") for name in self.tensors if not _is_buffer(name))
            return ModelOrder(names, label="the weights file")
        return None

    def _take_ties(self, order: ModelOrder | None) -> None:
        ties = dict(order.ties) if order is not None else {}
        for text in self.request.ties:
            alias, mark, held = text.partition("=")
            if not mark or f"model.{held}" not in self.tensors:
                raise ConfigError(f"--tie {text}: expected ALIAS=NAME with the name of a weight that is there.")
            ties[alias] = held
        for alias, held in ties.items():
            if f"model.{alias}" in self.tensors or f"model.{held}" not in self.tensors:
                continue
            self.aliases[f"model.{alias}"] = f"model.{held}"

    def _take_optimizer(self, order: ModelOrder | None) -> None:
        states = states_of(self.state.optim)
        groups = self.state.optim.get("param_groups") if self.state.optim is not None else None
        if not states or not isinstance(groups, list):
            self._lose("optim", MOMENTS_LOST)
            return
        ids = [list(group.get("params", ())) for group in groups]
        names = self._match(ids, states, order)
        if isinstance(names, Unmatched):
            self.refusals.append(
                f"optimizer: {names.reason}. Name its parameters in its order, one a line, with --order FILE: [name for group in "
                "optimizer.param_groups for p in group['params'] for name, q in model.named_parameters() if q is p]."
            )
            return
        options = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        kind = self.request.optimizer or _class_of(states, options)
        if kind is None:
            self.refusals.append(
                "optimizer: its state and options do not tell its class for sure. Name it with --optimizer (Adam and AdamW of "
                "older torch look the same)."
            )
            return
        templates: dict[str, dict[str, Any]] = {}
        for members, positions in zip(names, ids, strict=True):
            for name, position in zip(members, positions, strict=True):
                self._take_state(name, states.get(position, {}), templates)
        record: dict[str, Any] = {
            "class": kind,
            "groups": [
                {
                    "names": members,
                    "options": encode_value(_plain(found, "optim.param_groups"), path="optim.param_groups"),
                }
                for members, found in zip(names, options, strict=True)
            ],
            "shared": {},
            "states": list(templates.values()),
        }
        optimizers: dict[str, Any] = {"": record}
        self.values["optim"] = {"is_mapping": False, "optimizers": optimizers}
        how = f"moments of {len(states)} parameters as {record['class']}"
        self.changes.append(
            Change("optim", "restored", how if order is None else f"{how}, in the order of {order.label}")
        )

    def _match(
        self, ids: list[list[Any]], states: Mapping[Any, Any], order: ModelOrder | None
    ) -> list[list[str]] | Unmatched:
        positions = Positions(tuple(tuple(_shape_of(states.get(one)) for one in group) for group in ids))
        shapes = {name.removeprefix("model."): tensor.shape for name, tensor in self.tensors.items()}
        if order is None:
            return match_by_shape(positions, {name: s for name, s in shapes.items() if not _is_buffer(name)})
        unknown = [name for name in order.names if name not in shapes]
        if unknown:
            return Unmatched(f"{order.label} names {unknown[0]}, which is no weight of this checkpoint")
        return match_in_order(positions, order.names, shapes, order.norms)

    def _take_state(self, name: str, held: Any, templates: dict[str, dict[str, Any]]) -> None:
        if not isinstance(held, Mapping) or not held:
            return
        shape = self.tensors[f"model.{name}"].shape
        tree: dict[str, Any] = {}
        layout: dict[str, Any] = {}
        for key, value in held.items():
            if isinstance(value, ForeignTensor):
                self.tensors[f"optim.{name}.{key}"] = value
                tree[key] = TensorRef(str(key))
                is_like = value.shape == shape and not (value.shape == () and key == "step")
                layout[key] = {"like": is_like, "device": "any", "placements": None, "beside": "plain"}
            else:
                tree[key] = value
        encoded = encode_value(tree, path=f"optim.{name}")
        template = templates.setdefault(
            dump_json([encoded, layout]).decode(), {"params": [], "tree": encoded, "layout": layout}
        )
        template["params"].append(name)

    def _take_plain(self, part: str, found: Mapping[str, Any] | None) -> None:
        if found is None:
            if part == "scheduler":
                self._lose(part, CONSEQUENCES[part])
            return
        record: dict[str, Any] = {"kind": "stateful", "state": encode_value(_plain(found, part), path=part)}
        if part == "scaler":
            record["enabled"] = bool(found)
        self.values[part] = record
        self.changes.append(Change(part, "restored", "as its state_dict stands in the file"))

    def _take_progress(self) -> None:
        state = self.state
        if state.step is None:
            self._lose("progress", CONSEQUENCES["progress"])
            return
        batch, how = self.request.batch, f"step {state.step}"
        if state.samples is not None:
            samples = state.samples
        elif batch is not None:
            samples, how = state.step * batch, f"{how}; samples counted as {batch} a step"
        else:
            samples, how = (
                0,
                f"{how}; samples are not in the files and count from 0 (--batch-size N: samples of one step)",
            )
        found: dict[str, Any] = {
            "step": state.step,
            "epoch": int(state.epoch or 0),
            "samples": samples,
            "micro_step": 0,
            "best_loss": state.best_loss,
            "loss_history": [[step, loss] for step, loss in state.losses],
            "batch_history": [],
        }
        self.values["progress"] = {"kind": "stateful", "state": found}
        self.changes.append(Change("progress", "filled in", how))

    def _lose(self, part: str, consequence: str) -> None:
        self.changes.append(Change(part, "not possible", f"not in the files: {consequence}"))

    # -- streams and files ---------------------------------------------------------------------------------------------

    def _prepare(self) -> PreparedImport:
        state = self.state
        world_size = state.ranks
        attempt = uuid.uuid4().hex
        draft = Manifest(
            run_id=uuid.uuid4().hex,
            step=self.step,
            micro_step=0,
            generation=1,
            attempt=attempt,
            created_unix_s=time.time(),
            world_size=world_size,
            facts={} if state.max_steps is None else {"max_steps": state.max_steps},
        )
        digest = self.digest
        # The seed of the rule hangs on the files: importing them twice gives the same streams.
        records, axes = self._streams(replace(draft, run_id=digest))
        destination = choose_import(self.request.destination, self.step, draft.run_id or "")
        parts = tuple(name for name in PARTS if name in self.values or (name == RNG and records))
        manifest = replace(
            draft,
            run_id=destination.run_id,
            generation=destination.generation,
            parts=parts,
            values=self.values,
            rank_values=(RNG,) if records else (),
            aliases=self.aliases,
            rng=axes,
            writer={"dckpt": __version__},
            lineage=self._origin(digest),
        )
        files = self._files(records)
        plan = ImportPlan(
            source=state.url,
            destination=f"{destination.storage.url}/{destination.checkpoint}",
            generation=destination.generation,
            changes=tuple(self.changes),
            refusals=tuple(self.refusals),
            missing=tuple(name for name in (*PARTS, "data") if name not in parts and name != "scaler"),
            num_written=len(files),
            bytes_written=sum(file.size for file, _ in files),
        )
        empty = {name: tensor for name, tensor in self.tensors.items() if not len(tensor.data)}
        return PreparedImport(plan, destination, manifest, files, empty, source=self.request.source)

    def _streams(self, draft: Manifest) -> tuple[dict[int, bytes], dict[str, tuple[str, ...]]]:
        states: dict[int, Mapping[str, JsonValue]] = dict(self.state.streams)
        if len(states) < draft.world_size and self.request.fill:
            new = refill_streams(draft, saved_mesh(draft), states, None)
            states |= new.records
            self.changes += new.changes
        elif states:
            self.changes.append(Change("random streams", "restored", f"of ranks {sorted(states)}"))
        if len(states) < draft.world_size:
            self._lose("random streams", CONSEQUENCES["rng"])
            return {}, {}
        digests = [{name: stream_digest(one) for name, one in states[rank].items()} for rank in sorted(states)]
        records = {rank: dump_json(dict(found), limit=RECORD_BYTES_MAX) for rank, found in states.items()}
        return {rank: data.ljust(record_capacity(len(data))) for rank, data in records.items()}, classify_streams(
            digests
        )

    def _files(self, records: Mapping[int, bytes]) -> list[tuple[ShardFilePlan, list[memoryview]]]:
        """Everything that ranks share in the file of rank 0; the streams of each rank in its own."""
        files = []
        for rank in range(max([*records, 0]) + 1):
            held = {name: tensor for name, tensor in self.tensors.items() if len(tensor.data)} if rank == 0 else {}
            if rank in records:
                data = memoryview(records[rank])
                held[values_record_name(rank, RNG)] = ForeignTensor("U8", (len(data),), data)
            rows = [ShardTensor(n, t.dtype, t.shape, (0,) * len(t.shape), t.shape) for n, t in held.items()]
            plan = plan_shard_file(shard_file_name(rank), rows)
            files.append((plan, [held[row.name].data for row in plan.tensors]))
        return files

    def _origin(self, digest: str) -> Origin:
        return Origin(
            how="import",
            run_id=None,
            checkpoint=Path(self.state.url).name,
            step=self.state.step,
            micro_step=0,
            generation=0,
            manifest_sha256=digest,
            world_size=self.state.ranks,
            changes=tuple(dict.fromkeys(str(change)[:1000] for change in self.changes)),
        )


def digest_of(files: Sequence[Path]) -> str:
    """SHA-256 over names, sizes and digests of all files (FORMAT.md, section 8.1)."""
    lines = []
    for path in files:
        hasher = FileHasher()
        with path.open("rb") as file:
            while piece := file.read(8 * 2**20):
                hasher.update(piece)
        lines.append(f"{path.name} {hasher.file_bytes} {hasher.digest()}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _is_buffer(name: str) -> bool:
    return name.rpartition(".")[2] in BUFFERS


def _shape_of(held: Any) -> tuple[int, ...] | None:
    """The parameter's shape by its largest state tensor; None without one."""
    found = [value for value in held.values() if isinstance(value, ForeignTensor)] if isinstance(held, Mapping) else []
    shaped = [tensor.shape for tensor in found if tensor.shape != ()] or [tensor.shape for tensor in found]
    return max(shaped, key=math.prod) if shaped else None


_CLASSES: tuple[tuple[str, frozenset[str], frozenset[str]], ...] = tuple(
    (name, frozenset(keys.split()), frozenset(options.split()))
    for name, keys, options in (
        ("NAdam", "mu_product exp_avg exp_avg_sq", "momentum_decay"),
        ("Adamax", "exp_inf exp_avg", "betas"),
        ("Adadelta", "square_avg acc_delta", "rho"),
        ("RMSprop", "square_avg", "alpha centered"),
        ("Adagrad", "sum", "lr_decay"),
        ("SGD", "momentum_buffer", "dampening nesterov"),
        ("Adam", "exp_avg exp_avg_sq", "amsgrad betas"),
        ("RAdam", "exp_avg exp_avg_sq", "betas eps decoupled_weight_decay"),
    )
)
"""torch's classes: the state of a parameter and the options that they have, the most specific first."""


def _class_of(states: Mapping[Any, Any], options: Sequence[Mapping[str, Any]]) -> str | None:
    """By the names of its state and options; None where they fit no class, or several."""
    keys = {key for held in states.values() if isinstance(held, Mapping) for key in held}
    common = set.intersection(*(set(one) for one in options)) if options else set()
    found = next((name for name, state, own in _CLASSES if state <= keys and own <= common), None)
    if found != "Adam":
        return found
    # Releases of torch before 2.7 do not write it: Adam and AdamW then look the same, and their weight decay is another.
    decoupled = {one.get("decoupled_weight_decay") for one in options}
    return "AdamW" if decoupled == {True} else "Adam" if decoupled == {False} else None


def _plain(value: Any, path: str) -> Any:
    """Tensors of one element as their value: schedulers and options hold learning rates so. `ConfigError` names any other."""
    if isinstance(value, ForeignTensor):
        found = value.item()
        if found is None:
            raise ConfigError(
                f"{path}: expected a number or a tensor with one, found a tensor of {value.dtype} {list(value.shape)}, for which "
                "this part of a checkpoint has no place. Save it as a list of numbers, or leave the part out."
            )
        return found
    if isinstance(value, Mapping):
        return {key: _plain(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item, f"{path}[{number}]") for number, item in enumerate(value))
    return value


# -- carrying it out ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _MappedSource:
    """A `FileSource` over tensors that are mapped from other files."""

    plan: ShardFilePlan
    data: Sequence[memoryview]

    @property
    def size(self) -> int:
        return self.plan.size

    def piece(self, begin: int, end: int, memory: PieceMemory) -> memoryview:
        piece = memory.take(end - begin)
        for number, offset, target in parts_of_piece(self.plan, begin, piece):
            target[:] = self.data[number][offset : offset + len(target)]
        return piece

    def in_place(self, begin: int, end: int) -> None:
        del begin, end


def apply_import(prepared: PreparedImport) -> None:
    """Writes and commits the run's first checkpoint; on return it exists, durably. After any error there is none."""
    assert not prepared.plan.refusals
    destination, manifest = prepared.destination, prepared.manifest
    storage = destination.storage
    storage.ensure_root()
    free = storage.free_bytes()
    if free is not None and free < prepared.plan.bytes_written + 2**20:
        raise StorageFullError(
            f"{storage.url}: expected {prepared.plan.bytes_written:,} bytes of free space, found {free:,}. Nothing was written.",
            key=storage.url,
        )
    attempt = manifest.attempt
    transaction = Transaction(
        storage, checkpoint=destination.checkpoint, attempt=attempt, generation=destination.generation
    )
    transaction.begin()
    pool = WriterPool()
    try:
        entries: list[FileEntry] = []
        for rank, (plan, data) in enumerate(prepared.files):
            source = _MappedSource(plan, data)
            entries += write_shard_file(
                storage, transaction.attempt_dir, attempt, rank, plan.file, source, lambda _: None, pool
            )
        storage.sync_dir(transaction.attempt_dir)
        transaction.ensure_files(entries)
        _ensure_unchanged(prepared)
        entries.append(transaction.write_index(_index(prepared)))
        transaction.stage_manifest(replace(manifest, files=tuple(entries)))
        failpoint.reach("before_generation")
        create_generation(
            storage, destination.record(manifest.world_size, "import"), expected_newest=destination.observed
        )
        failpoint.reach("after_generation")
        transaction.publish()
    except BaseException:
        transaction.abandon()
        raise
    finally:
        pool.stop()


def _ensure_unchanged(prepared: PreparedImport) -> None:
    """The files still are those that the plan was made from: some of what was written is of then, some of now."""
    lineage = prepared.manifest.lineage
    assert lineage is not None
    try:
        found = digest_of(files_of(prepared.source))
    except OSError as error:
        found = f"{type(error).__name__}: {error}"
    if found != lineage.manifest_sha256:
        raise CorruptCheckpointError(
            f"Import of {prepared.plan.source}: expected the files that this import was planned from (digest "
            f"{lineage.manifest_sha256[:16]}), found others ({found[:80]}). Nothing was committed: plan again.",
            key=prepared.plan.source,
            field="digest",
            expected=lineage.manifest_sha256,
            found=found,
        )


def _index(prepared: PreparedImport) -> LayoutIndex:
    tensors: dict[str, tuple[str, Sequence[int], list[Chunk]]] = {}
    for number, (plan, _) in enumerate(prepared.files):
        for tensor, begin in zip(plan.tensors, plan.begins, strict=True):
            tensors[tensor.name] = (tensor.dtype, tensor.shape, [Chunk(tensor.offsets, tensor.shape, number, begin)])
    for name, empty in prepared.empty.items():
        tensors[name] = (empty.dtype, empty.shape, [Chunk((0,) * len(empty.shape), empty.shape, -1, 0)])
    files = [plan.file for plan, _ in prepared.files]
    return build_index(files, tensors, data_begins=[len(plan.header) for plan, _ in prepared.files])
