"""Building a restore plan: which checkpoint tensor goes where, and every difference, before anything live is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dckpt.errors import CorruptCheckpointError
from dckpt.format.values import JsonValue, decode_value
from dckpt.state.naming import DTYPE_NAMES, TORCH_DTYPES, ensure_storable
from dckpt.state.records import Cast, CheckpointView, RestorePlan


class Planner:
    """Collects reads, actions and differences of all components into one plan."""

    def __init__(
        self,
        view: CheckpointView,
        *,
        allow_missing: Sequence[str] = (),
        allow_unexpected: Sequence[str] = (),
        cast: Cast = "exact",
    ) -> None:
        self.plan = RestorePlan()
        self.saved: Mapping[str, tuple[str, tuple[int, ...]]] = view.tensors()
        self.aliases = view.aliases
        self._values: Mapping[str, JsonValue] = view.values()
        self._allow_missing = tuple(allow_missing)
        self._allow_unexpected = tuple(allow_unexpected)
        self._cast = cast
        self._consumed: set[str] = set()

    # What the checkpoint says.

    def decode(self, component: str) -> Any:
        """The component's values with records in the place of tensors, or None when it has none."""
        if component not in self._values:
            return None
        return decode_value(self._values[component], key="manifest.json", path=f"values.{component}")

    def field(self, record: Any, name: str, kind: type, *, component: str) -> Any:
        """`record[name]`, which must be a `kind`: a checkpoint is not believed, it is checked."""
        found = record.get(name) if isinstance(record, dict) else None
        if type(found) is not kind:
            raise CorruptCheckpointError(
                f"manifest.json: values.{component}: field {name!r}: expected {kind.__name__}, found "
                f"{type(found).__name__}. Use an older checkpoint; `dckpt verify` shows the damage",
                key="manifest.json",
                field=f"values.{component}.{name}",
                expected=kind.__name__,
                found=type(found).__name__,
            )
        return found

    def strings(self, record: Any, name: str, *, component: str) -> list[str]:
        """`record[name]`, which must be a list of strings."""
        found: list[str] = self.field(record, name, list, component=component)
        for i, item in enumerate(found):
            self.field({f"{name}[{i}]": item}, f"{name}[{i}]", str, component=component)
        return found

    # Differences.

    def differ(self, text: str) -> None:
        """Note a difference that no permission covers."""
        self.plan.differences.append(text)

    def missing(self, name: str, text: str) -> None:
        """Note something live that the checkpoint lacks, unless `allow_missing` matches its name."""
        if not _matches(name, self._allow_missing):
            self.plan.differences.append(f"{name}: {text}")

    def unexpected(self, name: str, text: str) -> None:
        """Note something saved that has no live place, unless `allow_unexpected` matches its name."""
        if not _matches(name, self._allow_unexpected):
            self.plan.differences.append(f"{name}: {text}")
            self.plan.unexpected.append(name)

    def consume(self, names: Iterable[str]) -> None:
        """These saved tensors are accounted for."""
        self._consumed.update(names)

    def unconsumed(self, component: str) -> list[str]:
        """Saved tensors of the component that nothing has accounted for."""
        prefix = f"{component}."
        return sorted(
            name for name in self.saved if (name == component or name.startswith(prefix)) and name not in self._consumed
        )

    # Reads.

    def fits(self, saved_name: str, live: torch.Tensor, *, label: str, is_any_dtype: bool = False) -> bool:
        """Whether a saved tensor may go into a live one; a difference in shape, or in dtype if that counts, is noted."""
        self._consumed.add(saved_name)
        found = self.saved.get(saved_name)
        if found is None:
            self.differ(f"{label}: its values name the tensor {saved_name!r}, which the checkpoint does not hold")
            return False
        dtype, shape = found
        ensure_storable(live, name=label)
        if tuple(shape) != tuple(live.shape):
            self.differ(
                f"{label}: shape {tuple(shape)} in the checkpoint, {tuple(live.shape)} live{_hint(label, shape, live)}"
            )
            return False
        live_dtype = DTYPE_NAMES[live.dtype]
        if dtype != live_dtype and self._cast != "allow" and not is_any_dtype:
            self.differ(f"{label}: dtype {dtype} in the checkpoint, {live_dtype} live; cast='allow' would convert it")
            return False
        return True

    def into(self, saved_name: str, live: torch.Tensor, *, label: str) -> None:
        """Read a saved tensor into a live one, or note why not."""
        if not self.fits(saved_name, live, label=label):
            return
        dtype = self.saved[saved_name][0]
        if dtype == DTYPE_NAMES[live.dtype]:
            self.plan.reads.append((saved_name, live))
            return
        target = live.detach()
        source = torch.empty_like(target, dtype=self._torch_dtype(dtype, label))
        self.plan.reads.append((saved_name, source))

        def convert() -> None:
            with torch.no_grad():
                target.copy_(source)

        # Conversions run before anything that looks at the live tensor.
        self.plan.actions.append(convert)

    def fresh(
        self, saved_name: str, *, label: str, make: Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
    ) -> torch.Tensor:
        """A new tensor of the saved dtype and shape, made by `make`, that the saved one will be read into."""
        self._consumed.add(saved_name)
        found = self.saved.get(saved_name)
        if found is None:
            self.differ(f"{label}: its values name the tensor {saved_name!r}, which the checkpoint does not hold")
            return torch.empty(0)
        dtype, shape = found
        target = make(tuple(shape), self._torch_dtype(dtype, label))
        assert tuple(target.shape) == tuple(shape), (label, target.shape, shape)
        self.plan.reads.append((saved_name, target))
        return target

    def fetch(self, saved_name: str, *, live: torch.Tensor | None, in_place: bool) -> torch.Tensor:
        """The destination for a tensor inside a tree: the live one where it fits, else a new one beside it."""
        found = self.saved.get(saved_name)
        fits = (
            live is not None
            and found is not None
            and found == (DTYPE_NAMES.get(live.dtype), tuple(live.shape))
            and live.device.type != "meta"
        )
        if in_place and fits and live is not None:
            self.into(saved_name, live, label=saved_name)
            return live
        return self.fresh(saved_name, label=saved_name, make=lambda s, d: empty_beside(live, s, d))

    def fetcher(self, present: Mapping[str, torch.Tensor], *, in_place: bool) -> Callable[[str], torch.Tensor]:
        """`fetch` for the tensors of one tree, given those that the live tree holds now."""
        return lambda name: self.fetch(name, live=present.get(name), in_place=in_place)

    @staticmethod
    def _torch_dtype(name: str, label: str) -> torch.dtype:
        found = TORCH_DTYPES.get(name)
        if found is None:
            raise CorruptCheckpointError(
                f"{label}: dtype {name!r} is not one of {', '.join(TORCH_DTYPES)}. Use an older checkpoint",
                key="layout index",
                field=label,
                expected="a safetensors dtype",
                found=name,
            )
        return found


def _hint(label: str, shape: Sequence[int], live: torch.Tensor) -> str:
    """What a difference in nothing but the rows of a matrix with such a name is."""
    is_rows = live.ndim == 2 == len(shape) and shape[1] == live.shape[1] and label.startswith("model.")
    if not is_rows or not any(word in label.lower() for word in ("emb", "head", "vocab", "wte", "token")):
        return ""
    return " (the size of the vocabulary: build it with the saved one, padding included)"


def empty_beside(live: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor that is laid out like `live` if it has that shape, else plain on the same device."""
    if live is None or live.device.type == "meta":
        return torch.empty(shape, dtype=dtype)
    if tuple(live.shape) == shape:
        return torch.empty_like(live.detach(), dtype=dtype)
    device = live.to_local().device if isinstance(live, DTensor) else live.device
    return torch.empty(shape, dtype=dtype, device=device)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
