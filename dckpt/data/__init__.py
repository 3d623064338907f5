"""Which sample comes next: orders, positions, splits and per-sample randomness that depend on no number of ranks or workers."""
