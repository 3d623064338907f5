"""Copies that go on behind forward and backward, until an optimizer is about to change what they read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import torch

from dckpt.dcp.chunks import bytes_as_tensor, copy_to_bytes
from dckpt.errors import ConfigError, DckptError

WAIT_SLICE_S = 5.0


class DeviceCopies:
    """Copies from GPUs into host memory, on one side stream a device.

    Each begins after everything that the training stream had queued when its first copy was issued. The tensors must stay
    referenced, and unchanged by later work of the training stream, until the copies are done.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def copy(self, tensor: torch.Tensor, target: torch.Tensor) -> None:
        """Queues one copy; `target` is a CPU tensor, page-locked if the copy is to run by itself."""
        stream = self._streams.get(tensor.device)
        if stream is None:
            stream = self._streams[tensor.device] = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream), torch.no_grad():
            target.copy_(tensor.detach(), non_blocking=True)

    def events(self) -> list[tuple[torch.device, torch.cuda.Event]]:
        """One event a device, behind the last copy."""
        return [(device, stream.record_event()) for device, stream in self._streams.items()]

    def wait(self) -> None:
        """Blocks this thread until every copy is done."""
        for stream in self._streams.values():
            stream.synchronize()


class DeferredCopies:
    """Reads tensors into host memory while training goes on; whoever is about to change them calls `before_change`.

    An in-place change by anything else is noticed where torch counts it (`Tensor._version`, which everything but fused
    optimizers, batch normalization and `.data` moves): then the copy is torn, and `result` says so.
    """

    def __init__(self, copies: Sequence[tuple[str, torch.Tensor, memoryview]]) -> None:
        self._versions = [tensor._version for _, tensor, _ in copies]
        self._on_host = [n for n, (_, tensor, _) in enumerate(copies) if not tensor.is_cuda]
        self._on_device = [n for n, (_, tensor, _) in enumerate(copies) if tensor.is_cuda]
        self._copies: Sequence[tuple[str, torch.Tensor, memoryview]] = copies
        self._error: DckptError | None = None
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._is_device_checked = False
        self.on_done: Callable[[], None] = lambda: None
        """Called on the copying thread when nothing is left to copy."""
        self.on_waited: Callable[[float], None] = lambda _: None
        """Called on the training thread with the seconds for which `before_change` held it up."""
        device_copies = DeviceCopies()
        for number in self._on_device:
            _, tensor, target = copies[number]
            device_copies.copy(tensor, bytes_as_tensor(target, tensor))
        self._events = device_copies.events()

    def start(self) -> None:
        """Begins to copy what is in host memory, on a thread that ends by itself; at once where none can be started."""
        try:
            threading.Thread(target=self._run, name="dckpt-stage", daemon=True).start()
        except RuntimeError:
            # Out of threads, or the interpreter is ending: whoever waits for these copies must not wait for nobody.
            self._run()

    @property
    def done(self) -> bool:
        """True once every byte is copied, or one could not be."""
        return self._done.is_set()

    def before_change(self) -> None:
        """Called by the thread that trains, before the tensors change: a host wait for what the host copies; what a GPU copies
        only holds up the stream of the change."""
        if self.done:
            return
        begin = time.monotonic()
        self._check_device()
        for device, event in self._events:
            torch.cuda.current_stream(device).wait_event(event)
        if self._on_host:
            self.wait()
        self.on_waited(time.monotonic() - begin)

    def result(self) -> None:
        """Waits for the end of all copies; raises the `ConfigError` of one that is torn."""
        self.wait()
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Waits for the end of all copies, whatever became of them."""
        # Ends: it is memory that is copied, and the thread sets the event however it ends.
        while not self._done.wait(WAIT_SLICE_S):
            pass

    def _run(self) -> None:
        try:
            for number in self._on_host:
                name, tensor, target = self._copies[number]
                copy_to_bytes(tensor, target)
                self._check(number, name, tensor)
            for _, event in self._events:
                event.synchronize()
            self._check_device()
        except DckptError as error:
            self._error = error
        except Exception as error:  # noqa: BLE001 - raised by `result` on the thread that writes the files
            self._error = DckptError(f"Copying the state behind the training failed: {type(error).__name__}: {error}")
        finally:
            with self._lock:
                self._copies = ()  # the tensors are the trainer's again
                self._is_device_checked = True
            self._done.set()
            self.on_done()

    def _check_device(self) -> None:
        """Once, before the optimizer's own change counts: the device copies later than the host can look."""
        with self._lock:
            if self._is_device_checked:
                return
            self._is_device_checked = True
            try:
                for number in self._on_device:
                    name, tensor, _ = self._copies[number]
                    self._check(number, name, tensor)
            except ConfigError as error:
                self._error = error

    def _check(self, number: int, name: str, tensor: torch.Tensor) -> None:
        if tensor._version != self._versions[number]:
            raise ConfigError(
                f"Tensor {name}: expected it unchanged until the next optimizer step, found that it was changed in place while "
                "it was being copied (overlap=True). This save is given up. Change parameters only through the optimizer "
                "between a save and the next step, or use Checkpointer(overlap=False)."
            )
