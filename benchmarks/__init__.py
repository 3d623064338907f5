"""Side-by-side measurements: dckpt, its peers and the hardware's own limits, in one run on the same bytes."""
