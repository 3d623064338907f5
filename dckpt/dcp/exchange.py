"""One rank's part in a shared load: reads the stripes that are its own, hands them on, and takes those of the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import xxhash

from dckpt.blocks.arena import Arena, Slot
from dckpt.blocks.frames import PAYLOAD, Frame
from dckpt.blocks.peers import PeerLostError, Peers, PeersEndedError
from dckpt.blocks.read import ReadMemory, VerifiedFile
from dckpt.dcp.destinations import Destinations, pack, packed
from dckpt.format.checksum import BLOCK_BYTES
from dckpt.planning.pieces import FileChunks, Piece, find_pieces
from dckpt.planning.sharing import STRIPE_BLOCKS_MAX, Stripe
from dckpt.planning.wants import Wants

READER_THREADS = 4
NUM_SLOTS = READER_THREADS + 2  # being read, and being copied out by the others
SLOT_BYTES = STRIPE_BLOCKS_MAX * BLOCK_BYTES
FILES_AT_ONCE = 32
SLICE_S = 0.25
JOIN_S = 5.0


def make_arena() -> Arena:
    """Memory for the stripes that a rank reads: 6 MiB, whatever it loads; new memory costs more than the copies into it."""
    return Arena(NUM_SLOTS, SLOT_BYTES)


class Exchange:
    """The pieces of round `number`: `begin`, then `read_own`, then wait with `settle`, then `finish`.

    A rank that fails tells those who expect pieces from it, and still takes what the others send. `failure`: this
    rank's own error, the first one; `voided`: ranks that said that they failed; `lost`: a rank whose connection failed.
    """

    def __init__(
        self,
        peers: Peers,
        number: int,
        wants: Wants,
        destinations: Destinations,
        stripes: Mapping[int, Sequence[Stripe]],
        chunks: Mapping[int, FileChunks],
        on_bytes: Callable[[int], None],
    ) -> None:
        self._peers, self._number, self._rank = peers, number, peers.rank
        self._wants, self._destinations, self._chunks, self._on_bytes = wants, destinations, chunks, on_bytes
        self._own = [s for plan in stripes.values() for s in plan if s.owner == self._rank]
        self._expected: dict[tuple[int, int], tuple[int, list[Piece]]] = {}
        for plan in stripes.values():
            for stripe in plan:
                pieces = [] if stripe.owner == self._rank else list(self._pieces(stripe, self._rank))
                if pieces:
                    self._expected[stripe.file, stripe.begin] = (stripe.owner, pieces)
        self._scratch: dict[int, ReadMemory] = {}
        self._copied_out: dict[int, memoryview] = {}
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._reading = 0
        self.failure: Exception | None = None
        self.lost: PeerLostError | None = None
        self.voided: set[int] = set()

    def begin(self) -> None:
        """From here on pieces are taken."""
        self._destinations.begin()
        self._peers.receiving.open_round(self._number, self, SLOT_BYTES)

    # -- what is under way ---------------------------------------------------------------------------------------------

    @property
    def is_reading(self) -> bool:
        """Whether a thread of this rank waits for the storage."""
        return self._reading > 0

    def settle(self, seconds: float) -> bool:
        """Waits at most so long until everything is where it belongs, or will not come; whether it is."""
        limit = time.monotonic() + seconds
        pause = 0.0005
        while self.lost is not None or self.awaited() or self._peers.waiting_for():
            if time.monotonic() > limit:
                return False
            time.sleep(pause)
            pause = min(2 * pause, 0.01)
        return True

    def finish(self) -> None:
        """After the last wait, however it ended: tensors on a GPU are as they will be."""
        self._destinations.finish()

    def awaited(self) -> set[int]:
        """Ranks whose pieces are still to come."""
        with self._lock:
            return {owner for owner, _ in self._expected.values()} - self.voided

    # -- the sending side ----------------------------------------------------------------------------------------------

    def read_own(
        self, open_file: Callable[[int], VerifiedFile], wait: Callable[[Callable[[float], bool]], None]
    ) -> None:
        """Reads this rank's stripes and hands them on. Errors of storage end in `failure`, those of connections in `lost`.

        `wait(is_done)` returns when `is_done(seconds)`, which waits that long, is true; or raises, which ends the exchange.
        """
        numbers = sorted({stripe.file for stripe in self._own})
        for at in range(0, len(numbers), FILES_AT_ONCE):
            batch = numbers[at : at + FILES_AT_ONCE]
            try:
                # Opened before the threads begin: who opens one may close another to make room.
                files = {number: open_file(number) for number in batch}
            except Exception as error:  # noqa: BLE001 - the caller's to raise, once the others know
                self._fail(error)
            if self.failure is not None:
                break
            self._read_files(_batches([stripe for stripe in self._own if stripe.file in files]), files, wait)
        if self.failure is not None:
            self._tell_failure()

    def _read_files(
        self,
        batches: Iterator[list[Stripe]],
        files: Mapping[int, VerifiedFile],
        wait: Callable[[Callable[[float], bool]], None],
    ) -> None:
        self._threads = [
            threading.Thread(target=self._serve, args=(batches, files), name=f"dckpt-stripes-{number}", daemon=True)
            for number in range(READER_THREADS)
        ]
        for thread in self._threads:
            thread.start()
        try:
            wait(self._join)
        except BaseException:
            self._peers.end()
            self._join(JOIN_S)
            raise

    def _join(self, seconds: float) -> bool:
        for thread in self._threads:
            thread.join(seconds)
            if thread.is_alive():
                return False
        return True

    def _serve(self, batches: Iterator[list[Stripe]], files: Mapping[int, VerifiedFile]) -> None:
        try:
            while self.failure is None and self.lost is None and not self._peers.is_ended:
                with self._lock:
                    batch = next(batches, None)
                if batch is None:
                    return
                self._hand_on(batch, files[batch[0].file])
        except PeersEndedError:
            return
        except PeerLostError as error:
            self.lost = self.lost or error
        except Exception as error:  # noqa: BLE001 - the caller's to raise, once the others know
            self._fail(error)

    def _hand_on(self, batch: Sequence[Stripe], file: VerifiedFile) -> None:
        """Reads stripes that follow each other at once, and gives each to its takers."""
        slot = self._free_slot()
        try:
            data = self._read(batch[0].begin, batch[-1].end, slot, file)
            for stripe in batch:
                part = data[stripe.begin - batch[0].begin : stripe.end - batch[0].begin]
                # Everybody begins with another rank, or all of them would wait for the first.
                at = stripe.takers.index(self._rank)
                for taker in stripe.takers[at + 1 :] + stripe.takers[:at]:
                    self._send(stripe, taker, slot, stripe.begin - batch[0].begin, part)
                self._destinations.fill(self._pieces(stripe, self._rank), part)
        finally:
            slot.release()

    def _read(self, begin: int, end: int, slot: Slot, file: VerifiedFile) -> memoryview:
        with self._lock:
            self._reading += 1
        try:
            data = file.read(begin, end, slot)
        finally:
            with self._lock:
                self._reading -= 1
        with self._lock:
            self._on_bytes(len(data))
        return data

    def _free_slot(self) -> Slot:
        assert self._peers.arena is not None
        while True:
            if self._peers.is_ended or self.lost is not None:
                raise PeersEndedError
            slot = self._peers.arena.take(SLICE_S)
            if slot is not None:
                return slot

    def _send(self, stripe: Stripe, taker: int, slot: Slot, offset: int, data: memoryview) -> None:
        if next(self._pieces(stripe, taker), None) is None:
            return

        def payload() -> tuple[list[memoryview], int]:
            views = pack(self._pieces(stripe, taker), data)
            hasher = xxhash.xxh3_64()
            for view in views:
                hasher.update(view)
            return views, hasher.intdigest()

        head = Frame(PAYLOAD, self._number, stripe.file, stripe.begin, len(data), offset=offset)
        self._peers.send_stripe(taker, head, slot, payload)

    def _pieces(self, stripe: Stripe, rank: int) -> Iterator[Piece]:
        return find_pieces(self._wants, self._chunks[stripe.file], rank, stripe.begin, stripe.end)

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self.failure = self.failure or error

    def _tell_failure(self) -> None:
        for taker in sorted({taker for stripe in self._own for taker in stripe.takers} - {self._rank}):
            try:
                self._peers.send_void(taker, self._number)
            except PeersEndedError:
                return
            except PeerLostError as error:
                self.lost = self.lost or error

    # -- the receiving side, in the receiving thread -------------------------------------------------------------------

    def take_slot(self, source: int, frame: Frame, memory: memoryview) -> None:
        """Copies this rank's elements out of a stripe of a rank on this host."""
        pieces = self._expect(source, frame)
        self._fill(frame, pieces, memory)

    def places(self, source: int, frame: Frame) -> Sequence[memoryview]:
        """Live memory where the pieces lie in one stretch each, else memory that is copied from."""
        pieces = self._expect(source, frame)
        landings = None
        if sum(piece.nbytes for piece in pieces) == frame.length and self.failure is None:
            landings = self._destinations.landings(pieces)
        if landings is None:
            memory = self._scratch.setdefault(source, ReadMemory()).take(frame.length)
            self._copied_out[source] = memory
            return [memory]
        return landings

    def take_payload(self, source: int, frame: Frame, *, is_whole: bool) -> None:
        """Copies what did not arrive where it belongs."""
        pieces = self._expect(source, frame)
        memory = self._copied_out.pop(source, None)
        expected = sum(piece.nbytes for piece in pieces)
        if not is_whole or frame.length != expected:
            what = f"{expected} bytes expected, {frame.length} found" if is_whole else "their checksum differs"
            self._fail(OSError(f"bytes of file {frame.file} at {frame.begin:,} from rank {source}: {what}"))
        elif memory is not None:
            self._fill(frame, packed(pieces), memory)
            return
        self._done(frame)

    def take_void(self, source: int) -> None:
        """That rank failed, and says so to all ranks by itself."""
        with self._lock:
            self.voided.add(source)

    def _expect(self, source: int, frame: Frame) -> list[Piece]:
        owner, pieces = self._expected.get((frame.file, frame.begin), (-1, []))
        return pieces if owner == source else []

    def _fill(self, frame: Frame, pieces: Sequence[Piece], memory: memoryview) -> None:
        try:
            if self.failure is None:
                self._destinations.fill(pieces, memory)
        except Exception as error:  # noqa: BLE001 - the caller's to raise; the senders must not wait for it
            self._fail(error)
        self._done(frame)

    def _done(self, frame: Frame) -> None:
        with self._lock:
            self._expected.pop((frame.file, frame.begin), None)


def _batches(stripes: Sequence[Stripe]) -> Iterator[list[Stripe]]:
    """Ascending stripes of one owner, those together that follow each other without a gap and fit into a slot."""
    batch: list[Stripe] = []
    for stripe in stripes:
        follows = batch and (batch[-1].file, batch[-1].end) == (stripe.file, stripe.begin)
        if batch and not (follows and stripe.end - batch[0].begin <= SLOT_BYTES):
            yield batch
            batch = []
        batch.append(stripe)
    if batch:
        yield batch
