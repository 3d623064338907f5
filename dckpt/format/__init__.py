"""The on-disk format: bytes in, records out, and back; no I/O. FORMAT.md here is the specification."""
