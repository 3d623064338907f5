"""A job of thousands of ranks on one machine: one rank is real, the others say what a real one would say."""
