"""Names on storage: every name is made and recognised here and nowhere else (FORMAT.md, section 2)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dckpt.errors import ConfigError
from dckpt.format.refusal import corrupt, shown

MANIFEST_NAME = "manifest.json"
GENERATIONS_DIR = "generations"
PINS_DIR = "pins"
STAGING_PREFIX = ".tmp-"
TRASH_PREFIX = ".trash-"
SHARD_SUFFIX = ".safetensors"
SUMS_SUFFIX = ".sums"
INDEX_SUFFIX = ".index"

STEP_MAX = 10**10 - 1
MICRO_STEP_MAX = 999_999
GENERATION_MAX = 999_999
RANK_MAX = 999_999
PART_MAX = 999_999
WORLD_SIZE_MAX = RANK_MAX + 1
FILE_BYTES_MAX = 2**62 - 1
NAME_BYTES_MAX = 4096
PATH_CHARS_MAX = 1024
PATH_COMPONENTS_MAX = 8

TENSORS_MAX = 2**22
FINGERPRINT_BYTES = 16

BLOCK_BYTES = 65536
"""Bytes under one block checksum."""

_CHECKPOINT = re.compile(r"step-([0-9]{10})\.g([0-9]{4}|[1-9][0-9]{4,5})(?:\.m([1-9][0-9]{0,5}))?")
_GENERATION_FILE = re.compile(r"([0-9]{6})\.json")
_SHARD_FILE = re.compile(r"rank([0-9]{5}|[1-9][0-9]{5})(?:-([1-9][0-9]{0,5}))?\.safetensors")
_INDEX_FILE = re.compile(r"layout-([0-9a-f]{32})\.index")
_HEX32 = re.compile(r"[0-9a-f]{32}")
_HEX64 = re.compile(r"[0-9a-f]{64}")
_COMPONENT = re.compile(r"[A-Za-z0-9._-]{1,128}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True, slots=True, order=True)
class CheckpointId:
    """Which checkpoint of a run; ordered by step, then micro step, then generation."""

    step: int
    micro_step: int
    generation: int

    @property
    def name(self) -> str:
        """The name of its directory."""
        return checkpoint_name(self.step, self.generation, self.micro_step)


def _ensure_range(what: str, value: int, low: int, high: int) -> None:
    # bool is an int to isinstance, and True would silently become step 1.
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(f"{what}: expected an int from {low} to {high}, found {shown(value)}. Pass another one.")


def checkpoint_name(step: int, generation: int, micro_step: int = 0) -> str:
    """The directory name of a checkpoint; the inverse of `parse_checkpoint_name`."""
    _ensure_range("step", step, 0, STEP_MAX)
    _ensure_range("generation", generation, 1, GENERATION_MAX)
    _ensure_range("micro_step", micro_step, 0, MICRO_STEP_MAX)
    suffix = f".m{micro_step}" if micro_step else ""
    return f"step-{step:010d}.g{generation:04d}{suffix}"


def parse_checkpoint_name(name: str) -> CheckpointId | None:
    """The checkpoint that a directory name states, or None if the whole name is not exactly one."""
    match = _CHECKPOINT.fullmatch(name)
    if match is None or int(match[2]) == 0:
        return None
    return CheckpointId(step=int(match[1]), micro_step=int(match[3] or 0), generation=int(match[2]))


def generation_key(number: int) -> str:
    """The key of a generation record, relative to the run."""
    _ensure_range("generation", number, 1, GENERATION_MAX)
    return f"{GENERATIONS_DIR}/{number:06d}.json"


def parse_generation_file(name: str) -> int | None:
    """The number that a file name in `generations/` states, or None if it is not a generation record."""
    match = _GENERATION_FILE.fullmatch(name)
    return (int(match[1]) or None) if match else None


def pin_key(name: str) -> str:
    """The key of the pin of the checkpoint `name`, relative to the run."""
    if parse_checkpoint_name(name) is None:
        raise ConfigError(
            f"pin {shown(name)}: expected a full name such as step-0000001200.g0007. `dckpt ls` lists them."
        )
    return f"{PINS_DIR}/{name}"


def is_hex32(text: str) -> bool:
    """Whether `text` is 32 lower-case hexadecimal digits: an attempt, or a file digest."""
    return _HEX32.fullmatch(text) is not None


def is_hex64(text: str) -> bool:
    """Whether `text` is 64 lower-case hexadecimal digits: a SHA-256."""
    return _HEX64.fullmatch(text) is not None


def is_safe_component(text: str) -> bool:
    """Whether `text` may be one component of a path inside a file."""
    return _COMPONENT.fullmatch(text) is not None and text not in (".", "..")


def is_tensor_name(text: str) -> bool:
    """Whether `text` may name a tensor, a value or another part of the state."""
    if not text or text == "__metadata__" or len(text) > NAME_BYTES_MAX or _CONTROL.search(text):
        return False
    return text.isascii() or len(text.encode()) <= NAME_BYTES_MAX


def _ensure_hex32(what: str, text: str) -> None:
    if not is_hex32(text):
        raise ConfigError(f"{what}: expected 32 digits of 0-9a-f, found {shown(text)}. Use secrets.token_hex(16).")


def staging_name(attempt: str) -> str:
    """The directory in which `attempt` is in progress on a file system."""
    _ensure_hex32("attempt", attempt)
    return STAGING_PREFIX + attempt


def parse_staging_name(name: str) -> str | None:
    """The attempt that a staging directory's name states, or None if it is not one."""
    attempt = name.removeprefix(STAGING_PREFIX)
    return attempt if attempt != name and is_hex32(attempt) else None


def trash_name(nonce: str) -> str:
    """The name to which a directory is renamed before it is deleted."""
    _ensure_hex32("nonce", nonce)
    return TRASH_PREFIX + nonce


def is_trash_name(name: str) -> bool:
    """Whether a directory of this name is being deleted."""
    nonce = name.removeprefix(TRASH_PREFIX)
    return nonce != name and is_hex32(nonce)


def shard_file_name(rank: int, part: int = 0) -> str:
    """The name of the part-th shard file of `rank`, relative to the attempt directory."""
    _ensure_range("rank", rank, 0, RANK_MAX)
    _ensure_range("part", part, 0, PART_MAX)
    suffix = f"-{part}" if part else ""
    return f"rank{rank:05d}{suffix}{SHARD_SUFFIX}"


def parse_shard_file_name(name: str) -> tuple[int, int] | None:
    """(rank, part) that a shard file's name states, or None if it is not one."""
    match = _SHARD_FILE.fullmatch(name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def sums_file_name(shard_file: str) -> str:
    """The sums file beside `shard_file`; a directory before the name is kept."""
    if not shard_file.endswith(SHARD_SUFFIX):
        raise ConfigError(f"shard file {shard_file}: expected a name that ends in {SHARD_SUFFIX}. Pass a shard file.")
    return shard_file.removesuffix(SHARD_SUFFIX) + SUMS_SUFFIX


def sums_file_bytes(shard_file_bytes: int, num_fingerprints: int) -> int:
    """The exact size of the sums file of a shard file of that size, with as many fingerprints: of each tensor, or none."""
    return 56 + 8 * -(-shard_file_bytes // BLOCK_BYTES) + FINGERPRINT_BYTES * num_fingerprints


def fingerprints_in_sums(sums_bytes: int, shard_file_bytes: int) -> int | None:
    """How many fingerprints a sums file of that size holds; None if it cannot be one of such a shard file."""
    number, rest = divmod(sums_bytes - sums_file_bytes(shard_file_bytes, 0), FINGERPRINT_BYTES)
    return number if rest == 0 and 0 <= number <= TENSORS_MAX else None


def index_file_name(digest: str) -> str:
    """The name of the layout index whose content has this file digest."""
    _ensure_hex32("index digest", digest)
    return f"layout-{digest}{INDEX_SUFFIX}"


def parse_index_file_name(name: str) -> str | None:
    """The digest that a layout index's name states, or None if it is not one."""
    match = _INDEX_FILE.fullmatch(name)
    return match[1] if match else None


def ensure_safe_path(path: str, *, key: str, field: str) -> None:
    """Refuses a path in the file `key` that could lead out of the checkpoint's directory."""
    components = path[: PATH_CHARS_MAX + 1].split("/")
    is_short = len(path) <= PATH_CHARS_MAX and len(components) <= PATH_COMPONENTS_MAX
    if not is_short or not all(is_safe_component(component) for component in components):
        raise corrupt(key, field, "a relative path of [A-Za-z0-9._-] without '..'", shown(path))
