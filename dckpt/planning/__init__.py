"""Who writes what: pure functions from what each rank holds to the layout of a checkpoint. No I/O, no torch."""
