"""A small batch whose loss is measured when a checkpoint is saved, and again when it is resumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten

from dckpt.errors import ConfigError
from dckpt.format.checksum import digest_bytes
from dckpt.resume.facts.plain import finite
from dckpt.state.evaluating import evaluating
from dckpt.state.gradients import parameters_by_name
from dckpt.state.rng import preserved_rng
from dckpt.state.train_state import TrainState


@dataclass(frozen=True)
class Probe:
    """`loss(batch)` gives a loss of one element from the models of the TrainState; every rank calls it with the same batch.

    It runs in eval mode without gradients, random streams are put back, and it must not draw from the training loader. With
    `gradient` a backward pass follows, and the norm of all gradients is compared too; it is left out while gradients are held.
    """

    loss: Callable[[Any], torch.Tensor]
    batch: Any
    gradient: bool = False
    _digest: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def measure(self, state: TrainState) -> dict[str, Any]:
        """The loss, the batch's digest and the gradient norm, as facts. Every rank calls it: wrapped models need all ranks."""
        models = list(state.models().values())
        with evaluating(*models), preserved_rng(state.generators):
            with torch.no_grad():
                loss = self._number(self.loss(self.batch))
            norm = self._gradient_norm(state) if self.gradient else None
        return finite({"loss": loss, "gradient_norm": norm, "batch": self.digest()})  # type: ignore[no-any-return]

    def digest(self) -> str:
        """Of the batch's tensors and values."""
        if not self._digest:
            leaves, spec = tree_flatten(self.batch)
            parts = [str(spec).encode()]
            for leaf in leaves:
                if isinstance(leaf, torch.Tensor):
                    raw = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                    parts += [f"{leaf.dtype}{list(leaf.shape)}".encode(), raw]
                else:
                    parts.append(repr(leaf).encode())
            self._digest.append(digest_bytes(b"\0".join(parts)))
        return self._digest[0]

    @staticmethod
    def _number(loss: Any) -> float:
        value = loss.full_tensor() if isinstance(loss, DTensor) else loss
        if isinstance(value, torch.Tensor) and value.numel() != 1:
            raise ConfigError(
                f"Probe: expected a loss of one element, found shape {tuple(value.shape)}. Return its mean."
            )
        return float(value)

    def _gradient_norm(self, state: TrainState) -> float | None:
        params = [param for param in parameters_by_name(state.models()).values() if param.requires_grad]
        if any(param.grad is not None for param in params):
            return None
        try:
            self.loss(self.batch).backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.get_total_norm([param.grad for param in params if param.grad is not None])
            return self._number(norm)
        finally:
            for param in params:
                param.grad = None
