"""Side-by-side measurements: dckpt, torch's own checkpointing and the medium, in one run."""
