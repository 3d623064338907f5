"""Facts of a run as plain JSON: what a checkpoint carries for comparison, and what the run that continues it brings."""
