"""The bytes' path: aligned buffers, block checksums in the stream, verified reads. Knows no tensor and no torch."""
