"""The main job, shown: train on 2 ranks, SIGKILL in the middle of a save, resume on 4 ranks, finish, look at the result.

Run it by `bash launch/demo.sh`. The training is `launch/train.py`, started by torchrun as anyone would.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import plot
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parent.parent
PLACE = Path("demo-run")  # below ROOT, which is the working directory
RUN = PLACE / "run"
MARKER = PLACE / ".made-by-dckpt-demo"
STEPS, SAVE_EVERY = 96, 12
FIRST_RANKS, SECOND_RANKS = 2, 4
# Small steps, and a checkpoint of about 120 MiB, so that the middle of a save is there to be hit. Without dropout the
# steps that are trained twice can be compared number by number.
TRAINING = (
    f"--steps {STEPS} --save-every {SAVE_EVERY} --global-batch 16 --accumulation 1 --context 64 --dropout 0".split()
)
KILL_ATTEMPTS = 3
LEG_LIMIT_S = 900.0
PR_SET_CHILD_SUBREAPER = 36

console = Console(highlight=False)


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


def say(text: str) -> None:
    console.print(text, soft_wrap=True)


def stage(number: int, title: str) -> None:
    console.print(f"\n[bold]{number}. {title}[/bold]")


# -- processes ---------------------------------------------------------------------------------------------------------


def descendants() -> list[int]:
    """Every process below this one. torchrun gives each rank a session of its own, so one group does not hold them all."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):  # gone between the listing and the look
                state, parent = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    children.setdefault(int(parent), []).append(int(entry))
    found, waiting = [], [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def kill(processes: list[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


@contextlib.contextmanager
def training(leg: int, ranks: int) -> Iterator[subprocess.Popen[bytes]]:
    """torchrun with its ranks; when the block is left, however, none of them is left running."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["launch/train.py", "--checkpoint", str(RUN), "--log-file", str(log_of(leg)), *TRAINING]
    say(f"[dim]$ torchrun {' '.join(command[3:])}[/dim]")
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    with open(PLACE / f"leg-{leg}.out", "wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        yield process
    finally:
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave some of them behind
        while left := descendants():
            kill(left)
            time.sleep(0.01)
        process.wait()
        signal.signal(signal.SIGINT, previous)


def log_of(leg: int) -> Path:
    return PLACE / f"leg-{leg}.jsonl"


def ended_early(leg: int, code: int) -> DemoError:
    tail = (PLACE / f"leg-{leg}.out").read_text(errors="replace").splitlines()[-25:]
    return DemoError("\n".join([*tail, "", f"The training ended with exit code {code}; its last lines are above."]))


# -- watching ----------------------------------------------------------------------------------------------------------


def committed() -> list[str]:
    """Names of the committed checkpoints, oldest first."""
    return sorted(path.parent.name for path in RUN.glob("step-*/manifest.json"))


def shards_in_progress() -> list[Path]:
    """Shard files with content in attempts that are not committed."""
    found = []
    for path in RUN.glob(".tmp-*/*/*.safetensors"):
        with contextlib.suppress(FileNotFoundError):  # the attempt was committed, and renamed, just now
            if path.stat().st_size:
                found.append(path)
    return sorted(found)


def last_row(leg: int) -> dict[str, float] | None:
    """The last complete line of the leg's log."""
    if not log_of(leg).exists():
        return None
    lines = log_of(leg).read_text(encoding="utf-8").split("\n")[:-1]
    return json.loads(lines[-1]) if lines else None


class StepBar:
    """The steps of a leg: a bar on a terminal, now and then a line elsewhere."""

    def __init__(self, leg: int, ranks: int) -> None:
        self._leg = leg
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task(f"{ranks} ranks", total=STEPS, shown="starting torch on every rank")
        self._told = 0

    def __enter__(self) -> StepBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self) -> None:
        row = last_row(self._leg)
        if row is None:
            return
        shown = f"step {row['step']}/{STEPS}, loss {row['loss']:.3f}, checkpoints: {len(committed())}"
        self._progress.update(self._task, completed=row["step"], shown=shown)
        if not console.is_terminal and row["step"] >= self._told + 20:
            self._told = int(row["step"]) // 20 * 20
            say(f"   {shown}")


def train_until_killed(leg: int) -> bool:
    """Kill every process while a third or later save is being written; False if that save was whole after all."""
    deadline = time.monotonic() + LEG_LIMIT_S
    with training(leg, FIRST_RANKS) as process, StepBar(leg, FIRST_RANKS) as bar:
        next_look = 0.0
        targets: list[int] = []
        while len(committed()) < 2 or len(shards_in_progress()) < FIRST_RANKS:
            if process.poll() is not None:
                raise ended_early(leg, process.returncode)
            if time.monotonic() > deadline:
                raise DemoError(f"No third save began within {LEG_LIMIT_S:.0f} s.")
            if time.monotonic() >= next_look:
                bar.show()
                targets = descendants()  # known beforehand, so that the kill is sudden
                next_look = time.monotonic() + 0.3
            time.sleep(0.002)
        kill(targets)
    return bool(shards_in_progress())


def train_to_the_end(leg: int) -> None:
    deadline = time.monotonic() + LEG_LIMIT_S
    with training(leg, SECOND_RANKS) as process, StepBar(leg, SECOND_RANKS) as bar:
        while process.poll() is None:
            if time.monotonic() > deadline:
                raise DemoError(f"The training did not finish within {LEG_LIMIT_S:.0f} s.")
            bar.show()
            time.sleep(0.3)
        bar.show()
        if process.returncode != 0:
            raise ended_early(leg, process.returncode)


# -- the story ---------------------------------------------------------------------------------------------------------


def make_place() -> None:
    """A fresh demo-run/. An old one is removed only if the demo made it and no other demo is using it."""
    if PLACE.exists() and not MARKER.exists():
        raise DemoError(f"{ROOT / PLACE} exists and was not made by this demo: move it away, then start again.")
    if PLACE.exists():
        with open(MARKER) as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DemoError("Another demo is running in this checkout; wait for it to end.") from None
            shutil.rmtree(PLACE)
    PLACE.mkdir()
    fcntl.flock(os.open(MARKER, os.O_RDWR | os.O_CREAT, 0o644), fcntl.LOCK_EX)  # held until this process ends


def show_what_was_left(leg: int) -> int:
    """Say what the kill left behind; returns the newest committed step."""
    names, leftovers = committed(), shards_in_progress()
    row = last_row(leg)
    assert row is not None
    newest = int(names[-1].split(".")[0].removeprefix("step-"))
    size = sum(path.stat().st_size for path in leftovers) / 2**20
    attempt = leftovers[0].parents[1].name
    say(f"   Killed after step {row['step']}. Whole on disk: {', '.join(names)}.")
    say(f"   Left of the interrupted save: {attempt} with {len(leftovers)} shard files, {size:.0f} MiB.")
    say("   It never got a checkpoint's name, so nothing will ever read it; the next start removes it.")
    say(f"   Lost: the {row['step'] - newest} steps since step {newest}. Never more than that.")
    return newest


def compare(legs: list[plot.Leg]) -> None:
    lost = dict(zip(legs[-2].steps, legs[-2].losses, strict=True))
    again = [(loss, lost[step]) for step, loss in zip(legs[-1].steps, legs[-1].losses, strict=True) if step in lost]
    apart = max(abs(new - old) for new, old in again)
    say(
        f"   {len(again)} steps were trained twice, on {FIRST_RANKS} and on {SECOND_RANKS} ranks, from the same samples: their"
    )
    say(f"   losses differ by at most {apart:.0e}, the rounding of sums over another number of ranks.")


def run_dckpt(*arguments: str) -> None:
    say(f"[dim]$ dckpt {' '.join(arguments)}[/dim]")
    command = [str(Path(sys.executable).parent / "dckpt"), *arguments]
    code = subprocess.run(command, check=False, timeout=LEG_LIMIT_S).returncode
    if code != 0:
        raise DemoError(f"dckpt {arguments[0]} ended with exit code {code}.")


def tell() -> None:
    started = time.monotonic()
    say("[bold]dckpt: train, kill, resume on another number of ranks.[/bold] About 3 minutes; Ctrl-C ends it cleanly.")
    make_place()

    stage(1, f"Train a small GPT with FSDP2 on {FIRST_RANKS} ranks, and kill it in the middle of a save.")
    say(
        f"   It learns the source text of Python's standard library and saves every {SAVE_EVERY} steps while it trains on."
    )
    for leg in range(1, KILL_ATTEMPTS + 1):
        if train_until_killed(leg):
            break
        say("   The save was committed in the instant of the kill. Resuming, to hit the next one.")
    else:
        raise DemoError(f"{KILL_ATTEMPTS} kills all came after the commit. Start the demo again.")
    newest = show_what_was_left(leg)

    stage(2, f"Start the same command again, now on {SECOND_RANKS} ranks.")
    leg += 1
    train_to_the_end(leg)
    legs = [plot.read_leg(log_of(number)) for number in range(1, leg + 1)]
    if legs[-1].steps[0] != newest + 1:
        raise DemoError(f"Expected the resumed run to begin with step {newest + 1}, found step {legs[-1].steps[0]}.")
    say(f"   Resumed from step {newest}, finished {STEPS} steps.")
    compare(legs)

    stage(3, "List the checkpoints, and check every byte of the newest.")
    run_dckpt("ls", str(RUN))
    run_dckpt("verify", str(RUN))

    stage(4, "Draw the loss across the kill.")
    os.environ.setdefault("MPLCONFIGDIR", str((PLACE / "matplotlib").resolve()))
    plot.draw(legs, PLACE / "loss.png")
    say(f"   {PLACE / 'loss.png'}")

    say(f"\n[bold green]Done in {time.monotonic() - started:.0f} s.[/bold green] What to do next:")
    for purpose, what in (
        ("look at the picture", PLACE / "loss.png"),
        ("look inside a checkpoint", f".venv/bin/dckpt show {RUN}"),
        ("read the training loop", "launch/train.py"),
        ("train on your own text", ".venv/bin/torchrun --nproc-per-node 2 launch/train.py --data FILE"),
        ("run the tests", "bash tests/run.sh"),
    ):
        say(f"   {purpose:26}{what}")


def main() -> int:
    os.chdir(ROOT)
    # Ranks whose torchrun died come to this process, so that `descendants` finds them.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGTERM, signal.SIGHUP):  # end like Ctrl-C
        signal.signal(number, signal.default_int_handler)
    try:
        tell()
    except DemoError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        say("The demo did not finish.")
        return 1
    except KeyboardInterrupt:
        console.print("\nStopped; no process is left running.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
