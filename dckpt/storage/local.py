"""Checkpoints in a local or mounted directory: exclusive names by link(2), the commit by rename(2)."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import uuid
from collections.abc import Iterator

from dckpt import failpoint
from dckpt.errors import (
    ConfigError,
    CorruptCheckpointError,
    KeyExistsError,
    StorageError,
    StorageMissingError,
    StorageReadOnlyError,
    UnknownOutcomeError,
)
from dckpt.storage.base import (
    MANIFEST_NAME,
    STAGING_PREFIX,
    TEMPORARY_PREFIX,
    TRASH_PREFIX,
    Entry,
    check_key,
    parent_key,
)
from dckpt.storage.local_file import LocalReader, LocalWriter, open_direct
from dckpt.storage.posix import DIRECTORY_FLAGS, READ_FLAGS, Posix, read_again, storage_error, translated

logger = logging.getLogger(__name__)

DIRECT_FILE_BYTES_MIN = 4 * 2**20
"""Files from this size on can also be read around the page cache; below, the kernel's own read-ahead is as good."""

# What link(2) says where the file system has no hard links, or no further one of this file to this place.
_LINK_REFUSED = frozenset(
    (
        *(errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS),
        *(errno.EMLINK, errno.EINVAL, errno.EXDEV),
    )
)

# Errors after which rename(2) has certainly not happened. EIO, ETIMEDOUT and the like are not among them: a
# soft NFS mount answers so for a request that the server may still carry out.
_RENAME_REFUSED = frozenset(
    (
        *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EXDEV, errno.EINVAL),
        *(errno.ENAMETOOLONG, errno.EMLINK, errno.EBUSY, errno.ELOOP),
    )
)


class LocalStorage:
    """A `Storage` in the directory `root`, which may be missing until `ensure_root`."""

    def __init__(self, root: str | os.PathLike[str], posix: Posix | None = None) -> None:
        # Absolute now: a later chdir of the training script must not move the run.
        self.root = os.path.abspath(os.fspath(root))
        self._posix = posix or Posix()
        self._durable_root: tuple[int, int] | None = None
        self._in_memory: bool | None = None

    @property
    def url(self) -> str:
        return self.root

    def locate(self, key: str) -> str:
        return self._path(key)

    # --- reading

    def ensure_writable(self) -> None:
        place = self.root
        while place != os.path.dirname(place):
            try:
                if self._is_taken(place):
                    break
            except StorageMissingError:
                # Something above it is a file.
                logger.debug("%s cannot be there", place)
            place = os.path.dirname(place)
        if not self._is_dir(place):
            raise StorageReadOnlyError(
                f"{self.root}: expected a directory, or a place where one can be made, found {place}, which is none. Choose "
                "another root.",
                key=self.root,
            )
        if not self._posix.access(place, os.W_OK | os.X_OK):
            raise StorageReadOnlyError(
                f"{self.root}: expected to be able to write, found that {place} does not allow it. Check the mount and the "
                "permissions, or choose another root.",
                key=self.root,
            )

    def exists(self) -> bool:
        try:
            mode = read_again(lambda: self._posix.stat(self.root, follow_symlinks=True)).st_mode
        except OSError as error:
            # Only these two mean "not there". EACCES, EIO or ESTALE read as "not there" would start a run
            # afresh.
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return False
            raise storage_error(error, "stat", self.root) from error
        if not stat.S_ISDIR(mode):
            raise ConfigError(f"Root {self.root}: expected a directory, found a file. Choose another root.")
        return True

    def read_bytes(self, key: str, *, limit: int, uncached: bool = False) -> bytes:
        with self.open_reader(key, uncached=uncached) as reader:
            if reader.size > limit:
                raise CorruptCheckpointError(
                    f"{self.locate(key)}: expected at most {limit:,} bytes, found {reader.size:,}. This is "
                    "not a file that dckpt wrote; run `dckpt verify`.",
                    key=self.locate(key),
                    field="size",
                    expected=limit,
                    found=reader.size,
                )
            data = bytearray(reader.size)
            reader.read_into(0, memoryview(data))
            return bytes(data)

    def open_reader(self, key: str, *, uncached: bool = False) -> LocalReader:
        path = self._path(check_key(key))
        name = key.rpartition("/")[2]
        direct_fd: int | None = None
        with self._beneath(key, "open") as directory:
            fd = read_again(lambda: self._posix.open(name, READ_FLAGS, dir_fd=directory))
            try:
                info = self._posix.fstat(fd)
                self._ensure_regular(key, info)
                if uncached or info.st_size >= DIRECT_FILE_BYTES_MIN:
                    direct_fd = open_direct(self._posix, name, READ_FLAGS, directory)
                return LocalReader(self._posix, path, fd, uncached=uncached, direct_fd=direct_fd)
            except BaseException:
                for opened in (fd, direct_fd):
                    if opened is not None:
                        self._posix.close(opened)
                raise

    def size(self, key: str) -> int:
        path = self._path(check_key(key))
        with translated("stat", path):
            info = read_again(lambda: self._posix.stat(path))
        self._ensure_regular(key, info)
        return info.st_size

    def modified_unix_s(self, key: str) -> float:
        path = self._path(key)
        with translated("stat", path):
            return self._posix.stat(path).st_mtime

    def list_dir(self, key: str = "") -> list[Entry]:
        found = []
        with self._beneath(f"{key}/." if key else ".", "list") as directory:
            for entry in self._posix.scandir(directory):
                is_dir = entry.is_dir(follow_symlinks=False)
                try:
                    size = 0 if is_dir else entry.stat(follow_symlinks=False).st_size
                except FileNotFoundError:
                    # Deleted between the listing and the question: it is not in the directory any more.
                    continue
                found.append(Entry(name=entry.name, is_dir=is_dir, size=size))
        return sorted(found, key=lambda entry: entry.name)

    def free_bytes(self) -> int | None:
        path = self.root
        while True:
            try:
                info = self._posix.statvfs(path)
            except OSError as error:
                if error.errno == errno.ENOENT and path != "/":
                    path = os.path.dirname(path)
                    continue
                # The number is advice for a message; a storage that does not tell is no reason to fail.
                return None
            return info.f_bavail * info.f_frsize

    # --- creating

    def ensure_root(self) -> None:
        # Made durable by this process, and not replaced since: training need not wait for its fsyncs at each save.
        if self._durable_root is None or self._durable_root != self._identity(self.root):
            self._ensure_durable_dir(self.root)
            self._durable_root = self._identity(self.root)

    def _identity(self, path: str) -> tuple[int, int] | None:
        try:
            info = self._posix.stat(path, follow_symlinks=True)
        except OSError:
            # What is not there, or cannot be asked, is made anew; that raises what there is to say.
            return None
        return info.st_dev, info.st_ino

    def create(self, key: str, data: bytes) -> None:
        path = self._path(check_key(key))
        directory = os.path.dirname(path)
        self._ensure_durable_dir(directory)
        temporary = f"{directory}/{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        self._write_whole(temporary, data)
        if self._link_exclusively(temporary, path):
            # A crash here leaves both names; the temporary one is ignored and swept later.
            self._remove_quietly(temporary)
        else:
            self._remove_quietly(temporary)
            self._write_whole(path, data)
        try:
            self._sync_path(directory)
        except StorageError as error:
            raise UnknownOutcomeError(
                f"Create {path}: the name was made, but its directory could not be synced ({error}). It may "
                "be gone after a power loss; create the same again to find out.",
                key=path,
                code=error.code,
            ) from error

    def make_dirs(self, key: str) -> None:
        path = self.root
        for part in check_key(key).split("/"):
            path = f"{path}/{part}"
            self._mkdir(path)

    def create_file(self, key: str, *, is_large: bool = False, size: int | None = None) -> LocalWriter:  # noqa: ARG002
        return LocalWriter(self._posix, self._path(check_key(key)), is_large=is_large and not self._is_in_memory())

    def link(self, source: str, target: str) -> bool:
        old, new = self._path(check_key(source)), self._path(check_key(target))
        with translated("stat", old):
            info = self._posix.stat(old)
        self._ensure_regular(source, info)
        try:
            self._posix.link(old, new)
        except OSError as error:
            if error.errno == errno.EEXIST and self._is_inode(new, info.st_ino):
                # The server linked it, its answer was lost, and the resent request found our own link.
                return True
            if error.errno in _LINK_REFUSED:
                return False
            raise storage_error(error, f"link {old} to", new) from error
        return True

    def _is_in_memory(self) -> bool:
        """tmpfs takes O_DIRECT and copies all the same: aligned memory would be one copy more."""
        if self._in_memory is None:
            with translated("stat", self.root):
                self._in_memory = self._posix.file_system(self.root) in ("tmpfs", "ramfs")
        return self._in_memory

    def sync_dir(self, key: str = "") -> None:
        self._sync_path(self._path(key))

    # --- committing

    def staging_key(self, checkpoint: str, attempt: str) -> str:
        return f"{self._beside(checkpoint)}{STAGING_PREFIX}{attempt}"

    def stage_manifest(self, staging: str, manifest: bytes) -> None:
        writer = self.create_file(f"{staging}/{MANIFEST_NAME}")
        try:
            writer.write_at(0, memoryview(manifest))
            writer.finish(len(manifest))
        finally:
            writer.abandon()
        self.sync_dir(staging)

    def publish(self, staging: str, checkpoint: str, manifest: bytes) -> None:
        source, target = self._path(check_key(staging)), self._path(check_key(checkpoint))
        failpoint.reach("before_rename")
        # rename(2) replaces an *empty* directory without a word, so a taken name is refused here. If one
        # appears between the check and the rename: an empty directory held nothing, and any other makes the
        # rename fail.
        if self._is_taken(target):
            raise self._taken(target)
        try:
            self._posix.rename(source, target)  # THE COMMIT POINT. Every byte and name below it is durable already.
        except OSError as error:
            self._judge_rename(error, staging, checkpoint, manifest)
        failpoint.reach("after_rename")
        try:
            self._sync_path(os.path.dirname(target))
        except StorageError as error:
            raise UnknownOutcomeError(
                f"Publish {target}: renamed into place, but its directory could not be synced ({error}). "
                "The checkpoint may be gone after a power loss; nothing is cleaned up, and the next save "
                "is a new attempt.",
                key=target,
                code=error.code,
            ) from error

    def _judge_rename(self, error: OSError, staging: str, checkpoint: str, manifest: bytes) -> None:
        """Returns if the failed rename took effect all the same, raises what is known otherwise."""
        target = self._path(checkpoint)
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR):
            raise self._taken(target) from error
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            # A resent NFS request finds the source gone because the first one moved it: the content decides.
            if self._holds(checkpoint, manifest):
                return
            if error.errno == errno.ENOTDIR and self._is_taken(target):
                raise self._taken(target) from error
            raise StorageMissingError(
                f"Publish {target}: expected the staging directory {self._path(staging)}, found none. "
                "Another process swept it (prune, or a clean-up script) while this save ran; nothing was "
                "published. Sweep only older attempts.",
                key=self._path(staging),
                code=error.errno,
            ) from error
        if error.errno in _RENAME_REFUSED:
            raise storage_error(error, f"rename {self._path(staging)} to", target) from error
        raise UnknownOutcomeError(
            f"Publish {target}: the rename answered {error.strerror or error}; it may have happened, or "
            "happen yet. Nothing is cleaned up; the next save is a new attempt.",
            key=target,
            code=error.errno,
        ) from error

    def _holds(self, checkpoint: str, manifest: bytes) -> bool:
        try:
            # The listing first: it makes a network client ask the server again, where a mere look-up of a
            # name that was absent a moment ago may be answered from the client's memory.
            parent = parent_key(checkpoint)
            if checkpoint.rpartition("/")[2] not in {entry.name for entry in self.list_dir(parent)}:
                return False
            return self.read_bytes(f"{checkpoint}/{MANIFEST_NAME}", limit=len(manifest)) == manifest
        except StorageMissingError:
            return False
        except CorruptCheckpointError:
            return False
        except StorageError as error:
            raise UnknownOutcomeError(
                f"Publish {self._path(checkpoint)}: the rename failed, and whether the checkpoint is there "
                f"could not be read ({error}). Nothing is cleaned up.",
                key=self._path(checkpoint),
                code=error.code,
            ) from error

    def _taken(self, target: str) -> KeyExistsError:
        return KeyExistsError(
            f"Publish {target}: expected a free name, found something there (an empty directory counts "
            "too). Nothing was published, and what is there was not changed; remove it or choose another "
            "name.",
            key=target,
            code=errno.EEXIST,
        )

    # --- deleting

    def discard(self, key: str, *, onto: str | None = None) -> None:
        path = self._path(check_key(key))
        try:
            info = self._posix.stat(path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return
            raise storage_error(error, "stat", path) from error
        parent = os.path.dirname(path)
        if not stat.S_ISDIR(info.st_mode):
            with translated("delete", path):
                self._unlink_if_there(path)
            self._sync_path(parent)
            return
        trash = path
        if not os.path.basename(path).startswith(TRASH_PREFIX):
            trash = self._path(check_key(onto)) if onto else f"{parent}/{TRASH_PREFIX}{uuid.uuid4().hex}"
            try:
                # Replaces the empty directory `onto`, if there is one.
                self._posix.rename(path, trash)
            except OSError as error:
                if isinstance(error, FileNotFoundError) and not self._is_taken(path):
                    # Another process deletes it too.
                    return
                raise storage_error(error, f"move to {trash}", path) from error
        # Before the first file goes: otherwise a power loss can bring the old name back with files missing.
        # Also for a directory that is trash already, because the process that moved it may have died before
        # this line.
        self._sync_path(parent)
        failpoint.reach("mid_prune")
        self._delete_tree(trash)

    def _delete_tree(self, path: str) -> None:
        with translated("delete", path):
            try:
                entries = self._posix.scandir(path)
            except FileNotFoundError:
                return
            for entry in entries:
                child = f"{path}/{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    self._delete_tree(child)
                else:
                    self._unlink_if_there(child)
            # Gone already means that another process empties the same trash.
            with contextlib.suppress(FileNotFoundError):
                self._posix.rmdir(path)

    def _unlink_if_there(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._posix.unlink(path)

    # --- parts

    def _path(self, key: str) -> str:
        return f"{self.root.rstrip('/')}/{check_key(key)}" if key else self.root

    @staticmethod
    def _beside(key: str) -> str:
        parent = parent_key(key)
        return f"{parent}/" if parent else ""

    @contextlib.contextmanager
    def _beneath(self, key: str, operation: str) -> Iterator[int]:
        """A descriptor of the directory that holds `key`; no symbolic link below the root is followed."""
        path = self._path(key.removesuffix("/.") if key != "." else "")
        try:
            directory = read_again(lambda: self._posix.open(self.root, DIRECTORY_FLAGS))
            try:
                for part in key.split("/")[:-1]:
                    deeper = self._posix.open(part, DIRECTORY_FLAGS | os.O_NOFOLLOW, dir_fd=directory)
                    # In this order: a failed close has closed all the same, and a second one could hit another's file.
                    directory, above = deeper, directory
                    self._posix.close(above)
                yield directory
            finally:
                self._posix.close(directory)
        except StorageError:
            raise
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                self._refuse_links(path)
            raise storage_error(error, operation, path) from error

    def _refuse_links(self, path: str) -> None:
        while path not in (self.root, "/"):
            with contextlib.suppress(OSError):  # The question only improves a message.
                if stat.S_ISLNK(self._posix.stat(path).st_mode):
                    raise self._not_regular(path, "a symbolic link")
            path = os.path.dirname(path)

    def _ensure_regular(self, key: str, info: os.stat_result) -> None:
        if stat.S_ISREG(info.st_mode):
            return
        kind = "a directory" if stat.S_ISDIR(info.st_mode) else "a symbolic link or special file"
        raise self._not_regular(self._path(key), kind)

    def _not_regular(self, path: str, found: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            f"{path}: expected a regular file, found {found}. dckpt never writes one; it is not followed.",
            key=path,
            field="type",
            expected="a regular file",
            found=found,
        )

    def _is_taken(self, path: str) -> bool:
        try:
            self._posix.stat(path)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            raise storage_error(error, "stat", path) from error
        return True

    def _is_dir(self, path: str) -> bool:
        try:
            mode = self._posix.stat(path, follow_symlinks=True).st_mode
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            raise storage_error(error, "stat", path) from error
        if not stat.S_ISDIR(mode):
            raise ConfigError(f"{path}: expected a directory, found a file. Choose another root.")
        return True

    def _ensure_durable_dir(self, path: str) -> None:
        missing = []
        while not self._is_dir(path):
            missing.append(path)
            path = os.path.dirname(path)
        # The deepest directory that exists may be the work of a process that was killed between its mkdir and
        # its fsync.
        try:
            self._sync_path(os.path.dirname(path))
        except StorageReadOnlyError:
            # A directory that this user may not even open is not one that dckpt has created in.
            logger.debug("not synced: %s", os.path.dirname(path))
        for made in reversed(missing):
            self._mkdir(made)
            self._sync_path(os.path.dirname(made))

    def _mkdir(self, path: str) -> None:
        try:
            self._posix.mkdir(path)
        except FileExistsError:
            # Made earlier, or by another process a moment ago. If a file is there, what comes next says so.
            return
        except OSError as error:
            raise storage_error(error, "make directory", path) from error

    def _sync_path(self, path: str) -> None:
        with translated("fsync directory", path):
            fd = self._posix.open(path, DIRECTORY_FLAGS)
            try:
                self._posix.fsync(fd)
            finally:
                self._posix.close(fd)

    def _write_whole(self, path: str, data: bytes) -> None:
        """A new file with `data`, its content durable. On failure our file is removed again, if possible."""
        writer = LocalWriter(self._posix, path)
        try:
            writer.write_at(0, memoryview(data))
            writer.finish(len(data))
        except BaseException:
            writer.abandon()
            self._remove_quietly(path)
            raise

    def _link_exclusively(self, temporary: str, path: str) -> bool:
        """True if `path` is now a name of the temporary file, False if the file system has no hard links."""
        try:
            inode = self._posix.stat(temporary).st_ino
            self._posix.link(temporary, path)
        except OSError as error:
            if error.errno == errno.EEXIST and self._is_inode(path, inode):
                # The server linked it, its answer was lost, and the resent request found our own link.
                return True
            if error.errno in _LINK_REFUSED:
                return False
            # Without its source, a link request that is still under way can only fail; then the name is
            # looked at.
            self._remove_quietly(temporary)
            if self._is_inode(path, inode):
                raise UnknownOutcomeError(
                    f"Create {path}: the link answered {error.strerror or error} and is there. It may be "
                    "gone after a power loss; create the same again to find out.",
                    key=path,
                    code=error.errno,
                ) from error
            raise storage_error(error, "create", path) from error
        return True

    def _is_inode(self, path: str, inode: int) -> bool:
        try:
            return self._posix.stat(path).st_ino == inode
        except OSError:
            # Asked after a failure: the caller reports that one.
            return False

    def _remove_quietly(self, path: str) -> None:
        try:
            self._posix.unlink(path)
        except OSError as error:
            # A temporary name that stays is ignored by every reader and swept later.
            logger.warning("left behind %s: %s", path, error)
