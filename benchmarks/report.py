"""From records to tables, pictures and the page: `python -m benchmarks.report RECORD... [--readme benchmarks/README.md]`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.pictures import draw
from benchmarks.record import read_record, write_record
from benchmarks.table import render

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
RECORD, TABLE = "record.json", "table.md"
NO_PICTURES = "No pictures: matplotlib is not installed (pip install dckpt[report])."


def write_report(record: dict[str, Any], directory: Path, *, pictures: bool) -> None:
    """Writes record, table and pictures into the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    write_record(record, directory / RECORD)
    (directory / TABLE).write_text(render(record), encoding="utf-8")
    if pictures and importlib.util.find_spec("matplotlib") is None:
        print(NO_PICTURES)
    elif pictures:
        draw(record, directory)


def replaced(page: str, figures: str) -> str:
    """The page with everything between its two markers replaced; an error if they are not there, once and in order."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"expected one {BEGIN} and, after it, one {END} in the page")
    return f"{before}{BEGIN}\n\n{figures.strip()}\n\n{END}{after}"


def main(arguments: Sequence[str]) -> int:
    """Prints the tables, or writes them into a page; redraws the pictures beside the records."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("record", type=Path, nargs="+", help="the JSON records of runs, shown in this order")
    parser.add_argument("--readme", type=Path, help="the page whose marked part is replaced (default: print the table)")
    parser.add_argument("--pictures", action="store_true", help="draw the pictures again, beside the record")
    found = parser.parse_args(arguments)
    records = [(path, read_record(path)) for path in found.record]
    for path, record in records if found.pictures else ():
        draw(record, path.parent)
    if found.readme is None:
        print("\n".join(render(record) for _, record in records))
        return 0
    tables = [render(record, _pictures_beside(path, found.readme, record)) for path, record in records]
    page = found.readme.read_text(encoding="utf-8")
    found.readme.write_text(replaced(page, "\n\n".join(table.strip() for table in tables)), encoding="utf-8")
    return 0


def _pictures_beside(path: Path, page: Path, record: dict[str, Any]) -> dict[str, str]:
    """Scenario -> the address, as the page must write it, of the picture that lies beside the record."""
    found = {scenario["name"]: path.parent / f"{scenario['name']}.svg" for scenario in record["scenarios"]}
    return {
        name: Path(os.path.relpath(picture, page.parent)).as_posix()
        for name, picture in found.items()
        if picture.exists()
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
