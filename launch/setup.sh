#!/usr/bin/env bash
# Makes .venv in this repository with dckpt and everything its tests and demo need, once; afterwards it does nothing and
# needs no network. Writes nothing outside the repository but pip's own cache.
#
#   bash launch/setup.sh
#
# pip finds its packages as it always does: an index, a mirror, a folder of wheels or a CPU build of torch that is set in
# pip's own environment variables or configuration is used as it is, for example
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash launch/setup.sh
# DCKPT_PYTHON=/path/to/python3 chooses the Python.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
stamp=$venv/dckpt-setup.stamp
constraints=$root/launch/constraints.txt
torch_pin=$(sed -n 's/^torch==//p' "$constraints")

say() { printf '%s\n' "$*"; }
fail() {
    printf 'Set-up failed: %s\n' "$*" >&2
    exit 1
}

# What the stamp must hold: it changes with the pins, the metadata, this script, and when the repository moves.
fingerprint() {
    {
        printf '%s\n' "$root"
        cat "$root/pyproject.toml" "$constraints" "${BASH_SOURCE[0]}"
    } | sha256sum | cut -d' ' -f1
}

is_set_up() { [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint)" ]; }

# The version of the torch that this Python has, if dckpt can use it; nothing otherwise. Does not import it.
usable_torch() {
    "$1" - <<'PY' 2>/dev/null || true
import importlib.metadata, importlib.util, re

version = importlib.metadata.version("torch")
major, minor = re.findall(r"\d+", version)[:2]
if importlib.util.find_spec("torch") and (int(major), int(minor)) >= (2, 9):
    print(version)
PY
}

is_supported() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

# Chooses python and torch_found: a Python that has a usable torch, else python3.11, else the newest from 3.10 on.
choose_python() {
    local candidate
    python='' torch_found=''
    for candidate in ${DCKPT_PYTHON:-python3.11 python3 python3.14 python3.13 python3.12 python3.10}; do
        candidate=$(command -v "$candidate" || true)
        is_supported "$candidate" || continue
        [ -n "$python" ] || python=$candidate
        torch_found=$(usable_torch "$candidate")
        if [ -n "$torch_found" ]; then
            python=$candidate
            return
        fi
    done
    [ -n "$python" ] || fail "no Python from 3.10 on was found. On Debian: apt-get install python3 python3-venv"
}

make_venv() {
    local version options=()
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "Python $version has no venv module. On Debian: apt-get install python$version-venv"
    [ -z "$torch_found" ] || options=(--system-site-packages)
    say "Making .venv with Python $version ($python)."
    rm -rf "$venv"
    "$python" -m venv ${options[@]+"${options[@]}"} "$venv"
}

pip_install() {
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$pins" "$@" ||
        fail "pip could not install $*. Its own message is above; without a network, set PIP_INDEX_URL or PIP_FIND_LINKS."
}

install() {
    local ours
    pins=$constraints
    torch_found=$(usable_torch "$venv/bin/python")
    ours=$(cat "$venv/dckpt-torch.pin" 2>/dev/null || true) # a torch that this script installed follows the pin
    if [ -n "$torch_found" ] && [ "${ours:-$torch_pin}" = "$torch_pin" ]; then
        say "Using torch $torch_found, which is installed already."
        pins=$venv/constraints.txt
        # That torch may want an older setuptools than the pinned torch does.
        sed -e "s/^torch==.*/torch==$torch_found/" -e '/^setuptools==/d' "$constraints" >"$pins"
    else
        say "Installing torch $torch_pin (the largest part, some minutes; from a CPU index about 200 MB, else up to 3 GB)."
        # Alone and first, so that no other package's requirement ever brings an unpinned torch.
        pip_install "torch==$torch_pin"
        printf '%s\n' "$torch_pin" >"$venv/dckpt-torch.pin"
    fi
    say "Installing dckpt and its other dependencies."
    pip_install "setuptools>=77"
    # In compat mode a script beside the clone finds the package, not the clone's folder of the same name.
    pip_install --no-build-isolation --config-settings editable_mode=compat --editable "${root}[dev]"
}

missing_tools() {
    local entry missing=()
    for entry in mkfs.ext4:e2fsprogs strace:strace mkfs.xfs:xfsprogs ip:iproute2; do
        PATH=$PATH:/usr/sbin:/sbin command -v "${entry%%:*}" >/dev/null || missing+=("${entry#*:}")
    done
    printf '%s' "${missing[*]-}"
}

if is_set_up; then
    say "The environment in .venv is up to date."
    exit 0
fi

# One set-up of a checkout at a time. The lock is the directory itself: no file is left over, and it ends with this shell.
exec 9<"$root"
if ! flock --nonblock 9; then
    say "Another set-up of this checkout is under way; waiting for it."
    flock 9
fi
if is_set_up; then
    say "The environment in .venv is up to date."
    exit 0
fi

# An environment that was made by hand, or for earlier pins, is kept and brought up to date; one that was moved here with
# the repository is made again, because its programs name their old place.
rm -f "$stamp"
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1 || ! grep -qsF "$venv" "$venv/bin/activate"; then
    choose_python
    make_venv
fi
install
fingerprint >"$stamp"

tools=$(missing_tools)
[ -z "$tools" ] || say "Some tests need programs that are missing here and will be skipped. On Debian: apt-get install $tools"
say "The environment is ready: .venv/bin/dckpt and .venv/bin/python."
