"""What a run of the benchmarks is asked to do."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LEAST_ROUNDS = 5  # a median of fewer says little on a shared machine


@dataclass(frozen=True, slots=True)
class Options:
    """ranks, megabytes: None means fitted to the machine. storage: where dckpt saves, if not in `directory`."""

    ranks: int | None
    megabytes: int | None
    rounds: int
    quick: bool
    only: tuple[str, ...]
    directory: Path | None
    storage: str | None
    output: Path
    pictures: bool
    device: str
    lists: bool


def parse_options(arguments: Sequence[str], names: Sequence[str]) -> Options:
    """The command line as a record; `names` are the scenarios that exist. Exits with a usage message if it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures dckpt beside peers and the hardware's limits; writes one JSON record, a table and pictures.",
        epilog="Under torchrun the given ranks are used, and scenarios that need another number of ranks are skipped.",
    )
    add = parser.add_argument
    add("--list", dest="lists", action="store_true", help="name the scenarios and end")
    add("--only", action="append", default=[], choices=names, metavar="SCENARIO", help="run this one; may be repeated")
    add("--quick", action="store_true", help="tiny sizes and one round: shows that everything runs, measures nothing")
    add("--ranks", type=int, help="ranks of the scenarios that do not fix it (default: 2, with GPUs one each)")
    add("--megabytes", type=int, help="bytes of the state over all ranks (default: what fits this machine)")
    add("--rounds", type=int, help=f"measured rounds after a discarded one (default: {LEAST_ROUNDS})")
    add("--directory", type=Path, help="where to write; shared by all nodes under torchrun (default: temporary)")
    add(
        "--storage",
        metavar="URL",
        help="where dckpt saves, if not in --directory; it is not emptied, and peers are skipped",
    )
    add(
        "--output", type=Path, default=Path("benchmarks/results/latest"), help="directory of record, table and pictures"
    )
    add("--no-pictures", dest="pictures", action="store_false", help="record and table only")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the state lives")
    found = parser.parse_args(arguments)
    for name, least in (("ranks", 1), ("megabytes", 1), ("rounds", 1)):
        value = getattr(found, name)
        if value is not None and value < least:
            parser.error(f"--{name}: expected at least {least}, found {value}")
    rounds = found.rounds or (1 if found.quick else LEAST_ROUNDS)
    return Options(
        ranks=found.ranks,
        megabytes=found.megabytes,
        rounds=rounds,
        quick=found.quick,
        only=tuple(found.only),
        directory=found.directory,
        storage=found.storage,
        output=found.output,
        pictures=found.pictures,
        device=found.device,
        lists=found.lists,
    )
