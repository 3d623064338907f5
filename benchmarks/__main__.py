"""Entry point: `python -m benchmarks --help`."""

from benchmarks.side_by_side import main

if __name__ == "__main__":
    main()
