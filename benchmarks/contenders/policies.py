"""What is durable when a contender's time ends, in the words of the record."""

ALL_SYNCED = "every file and directory"
FILES_SYNCED = "every file (its own option)"
FILES_SYNCED_BY_US = "every file (by the benchmark, within its time)"
RAW_SYNCED = "its file"
NOTHING_WRITTEN = "nothing is written"

COMMITTED = "checksums every byte, fsyncs directories, commits atomically"
NOT_ATOMIC = "no checksum, not atomic"
