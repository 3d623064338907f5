"""A real S3 server on loopback for tests: Ceph's RADOS Gateway, or moto where that is missing.

By hand, from the repository's root (ends with Ctrl-C, prints what to export):

    python -m tests.support.object_server [--port 9100] [--data DIRECTORY] [--packages DIRECTORY]

The gateway is taken from the system (Debian: ceph-mon ceph-osd radosgw), or from a directory into which its packages were
unpacked: `--packages`, or DCKPT_TEST_CEPH in the environment. `--download` fills that directory on a Debian system; it
installs nothing, and needs apt's lists of packages. moto is an emulator in memory: it checks no signature, and forgets all
when it ends.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode

ACCESS, SECRET, BUCKET = "testkey", "testsecret", "dckpt-test"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": ACCESS,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}
_START_DEADLINE_S = 90.0
_DEBIAN = ("ceph-mon", "ceph-osd", "radosgw")

_CONFIG = """
[global]
fsid = {cluster}
mon host = [v2:127.0.0.1:{mon_v2},v1:127.0.0.1:{mon_v1}]
public addr = 127.0.0.1
public network = 127.0.0.0/8
cluster network = 127.0.0.0/8
ms bind ipv6 = false
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
mon data avail crit = 1
mon data avail warn = 2
{plugins}
admin socket = {data}/run/$name.asok
run dir = {data}/run
crash dir = {data}/run
log file = {data}/log/$name.log
debug ms = 0
[mon]
mon data = {data}/mon
mon cluster log file = {data}/log/cluster.log
[osd]
osd data = {data}/osd
osd objectstore = memstore
memstore device bytes = 4294967296
osd memory target = 1073741824
osd max object size = 134217728
[client.rgw.a]
ms mon client mode = crc
rgw data = {data}/rgw
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw enable ops log = false
rgw enable usage log = false
rgw gc obj min wait = 1
rgw gc processor period = 2
"""


class UnavailableError(Exception):
    """No server can be started here; the message says what to install."""


@dataclass
class ObjectServer:
    """A running server. `kind` is "ceph" or "moto"."""

    kind: str
    port: int
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def url(self, path: str) -> str:
        """The URL of a place in the test bucket."""
        query = urlencode({"endpoint": self.endpoint, "region": "us-east-1", "addressing": "path"})
        return f"s3://{BUCKET}/{path}?{query}"

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.send_signal(signal.SIGKILL)
        for process in self.processes:
            process.wait(30)


@contextlib.contextmanager
def running(
    *, port: int | None = None, data: Path | None = None, packages: Path | None = None
) -> Iterator[ObjectServer]:
    """A server with an empty bucket `BUCKET`, until the body ends."""
    with tempfile.TemporaryDirectory(prefix="dckpt-s3-") as temporary:
        server = start(port or _free_port(), data or Path(temporary), packages)
        try:
            _make_bucket(server)
            yield server
        finally:
            server.stop()


def start(port: int, data: Path, packages: Path | None = None) -> ObjectServer:
    """Starts the best server that there is."""
    if importlib.util.find_spec("boto3") is None:
        raise UnavailableError("no S3 client: pip install 'dckpt[s3]'")
    given = packages or os.environ.get("DCKPT_TEST_CEPH")
    root = Path(given) if given else Path("/")
    if (root / "usr/bin/radosgw").exists():
        return _start_ceph(port, data, root.resolve())
    moto = Path(sys.executable).with_name("moto_server")
    if moto.exists():
        server = ObjectServer("moto", port)
        server.processes.append(_spawn([str(moto), "-H", "127.0.0.1", "-p", str(port)], data / "moto.log", {}))
        _await_port(server, data)
        return server
    raise UnavailableError(
        "no S3 server: install Debian's ceph-mon, ceph-osd and radosgw, or name a directory with them in DCKPT_TEST_CEPH "
        "(tests/support/object_server.py), or pip install 'moto[s3,server]'"
    )


def _start_ceph(port: int, data: Path, root: Path) -> ObjectServer:
    for name in ("mon", "osd", "run", "log", "rgw"):
        (data / name).mkdir(parents=True, exist_ok=True)
    library = root / "usr/lib" / f"{os.uname().machine}-linux-gnu"
    environment: dict[str, str] = {}
    plugins = ""
    if root != Path("/"):
        libraries = (library, library / "ceph", root / "usr/lib/ceph", root / "lib" / library.name)
        environment = {
            "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
            "PYTHONPATH": str(root / "usr/lib/python3/dist-packages"),
        }
        places = {"plugin dir": "ceph", "osd class dir": "rados-classes", "erasure code dir": "ceph/erasure-code"}
        plugins = "\n".join(f"{name} = {library}/{place}" for name, place in places.items())
    mon_v2, mon_v1 = _free_port(), _free_port()
    cluster, osd = str(uuid.uuid4()), str(uuid.uuid4())
    config = data / "ceph.conf"
    config.write_text(
        _CONFIG.format(cluster=cluster, mon_v2=mon_v2, mon_v1=mon_v1, data=data, port=port, plugins=plugins)
    )
    server = ObjectServer("ceph", port)

    def once(name: str, *arguments: str, python: bool = False) -> None:
        before = ["/usr/bin/python3"] if python else []
        with (data / "log" / f"{name}-once.out").open("ab") as log:
            subprocess.run(
                [*before, str(root / "usr/bin" / name), *arguments],
                env={**os.environ, **environment},
                stdout=log,
                stderr=log,
                timeout=_START_DEADLINE_S,
                check=True,
            )

    def serve(name: str, *arguments: str) -> None:
        command = [str(root / "usr/bin" / name), "-f", "-c", str(config), *arguments]
        server.processes.append(_spawn(command, data / "log" / f"{name}.out", environment))

    try:
        address = f"[v2:127.0.0.1:{mon_v2},v1:127.0.0.1:{mon_v1}]"
        once("monmaptool", "--create", "--clobber", "--fsid", cluster, "--addv", "a", address, str(data / "monmap"))
        once("ceph-mon", "-c", str(config), "--mkfs", "-i", "a", "--monmap", str(data / "monmap"))
        serve("ceph-mon", "-i", "a")
        once("ceph", "-c", str(config), "--connect-timeout", "30", "osd", "new", osd, python=True)
        once("ceph-osd", "-c", str(config), "-i", "0", "--mkfs", "--osd-uuid", osd)
        serve("ceph-osd", "-i", "0")
        serve("radosgw", "-n", "client.rgw.a")
        _await_port(server, data / "log")
        user = ("--uid=test", "--display-name=test", f"--access-key={ACCESS}", f"--secret-key={SECRET}")
        once("radosgw-admin", "-c", str(config), "-n", "client.rgw.a", "user", "create", *user)
    except (OSError, subprocess.SubprocessError, AssertionError):
        server.stop()
        raise
    return server


def _spawn(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def _await_port(server: ObjectServer, logs: Path) -> None:
    deadline = time.monotonic() + _START_DEADLINE_S
    while time.monotonic() < deadline:
        assert all(process.poll() is None for process in server.processes), f"a server ended at once; logs in {logs}"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", server.port), 1):
            return
        time.sleep(0.1)
    raise AssertionError(f"nothing listens on port {server.port}; logs in {logs}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _make_bucket(server: ObjectServer) -> None:
    import boto3

    names = {"aws_access_key_id": ACCESS, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=server.endpoint, **names).create_bucket(Bucket=BUCKET)


def download(packages: Path) -> None:
    """Debian's packages of the gateway, unpacked below `packages`; installs nothing."""
    if shutil.which("apt-get") is None:
        raise UnavailableError("--download needs apt-get (Debian or a relative)")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "partial").mkdir()
        option = f"Dir::Cache::archives={folder}"
        subprocess.run(
            ["apt-get", "-y", "--no-install-recommends", "-d", "-o", option, "install", *_DEBIAN], check=True
        )
        for package in sorted(Path(folder).glob("*.deb")):
            subprocess.run(["dpkg", "-x", str(package), str(packages)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=9100)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--download", action="store_true", help="fetch Debian's packages into --packages first")
    arguments = parser.parse_args()
    if arguments.download:
        if arguments.packages is None:
            parser.error("--download needs --packages")
        download(arguments.packages)
    with running(port=arguments.port, data=arguments.data, packages=arguments.packages) as server:
        for name, value in ENVIRONMENT.items():
            print(f"export {name}={value}")
        print(
            f"export AWS_ENDPOINT_URL={server.endpoint} AWS_REGION=us-east-1   # {server.kind}; a run: s3://{BUCKET}/run"
        )
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
