"""The manifest."""

import hashlib
import json
import math
import time
from dataclasses import replace

import pytest

from dckpt.errors import ConfigError, CorruptCheckpointError, FormatVersionError
from dckpt.format.layout import CheckpointId
from dckpt.format.manifest import (
    MANIFEST_BYTES_MAX,
    FileEntry,
    Mesh,
    encode_manifest,
    manifest_digest,
    parse_manifest,
)
from tests.unit.format.builders import ATTEMPT, DIGEST, a_manifest, an_origin, forge_sealed

KEY = "step-0000001200.g0007/manifest.json"
OLD = "ab" * 16


def as_json(**changes):
    """A valid manifest as plain JSON with top-level keys replaced."""
    found = json.loads(encode_manifest(a_manifest()))
    del found["sha256"]
    return found | changes


def entry(place, **changes):
    """`files` of a valid manifest with changes in one entry; None as a value removes the key."""
    files = as_json()["files"]
    files[place] = {key: value for key, value in (files[place] | changes).items() if value != "REMOVED"}
    return files


def test_a_manifest_round_trips():
    manifest = a_manifest()
    found = parse_manifest(encode_manifest(manifest), key=KEY)

    assert found == manifest
    assert found.id == CheckpointId(step=1200, micro_step=0, generation=7)
    assert found.index_entry.kind == "index"
    assert [shard.rank for shard in found.shard_entries] == [0, 1]
    sums = found.sums_entry(found.shard_entries[1])
    assert (sums.kind, sums.rank, sums.path) == ("sums", 1, f"{ATTEMPT}/rank00001.sums")
    assert found.total_bytes == sum(file.size for file in found.files)


def test_a_stand_alone_manifest_has_no_run_and_no_id():
    manifest = a_manifest(run_id=None, generation=0, step=None, mesh=None, coordinates=None)
    found = parse_manifest(encode_manifest(manifest), key=KEY)

    assert found == manifest
    assert found.id is None


@pytest.mark.parametrize(
    "changes", [{}, {"how": "export"}, {"run_id": None, "step": None, "generation": 0}, {"carried": ()}]
)
def test_where_a_resharded_checkpoint_comes_from_is_kept(changes):
    manifest = a_manifest(lineage=an_origin(**changes))

    assert parse_manifest(encode_manifest(manifest), key=KEY) == manifest


def test_a_diverged_metric_is_kept():
    data = encode_manifest(a_manifest(metrics={"loss": math.nan, "norm": -math.inf, "steps": 3}))
    found = parse_manifest(data, key=KEY)

    assert math.isnan(found.metrics["loss"])
    assert found.metrics["norm"] == -math.inf
    assert found.metrics["steps"] == 3.0


def test_the_digest_covers_the_complete_file():
    data = encode_manifest(a_manifest())

    assert manifest_digest(data) == hashlib.sha256(data).hexdigest()


def taken_over(place, **changes):
    """`files` in which the shard at `place` and its sums lie in another checkpoint; with changes in the shard's entry."""
    files = as_json()["files"]
    for number in (place, place + 1):
        files[number] |= {"path": files[number]["path"].replace(ATTEMPT, OLD), "checkpoint": "step-0000001100.g0007"}
    files[place] |= {"reused": 1}
    files[place] = {key: value for key, value in (files[place] | changes).items() if value != "REMOVED"}
    return files


def test_a_file_of_another_checkpoint_may_be_named():
    """A writer of a larger world may have written it."""
    manifest = a_manifest()
    reused = tuple(
        replace(
            file,
            path=file.path.replace(ATTEMPT, OLD),
            rank=9,
            checkpoint="step-0000001100.g0007",
            reused=3 * (file.kind == "shard"),
        )
        if file.rank == 1
        else file
        for file in manifest.files
    )
    manifest = a_manifest(files=reused)
    found = parse_manifest(encode_manifest(manifest), key=KEY)

    assert found == manifest
    assert found.references == ("step-0000001100.g0007",)
    assert found.sums_entry(found.shard_entries[1]).checkpoint == "step-0000001100.g0007"
    assert a_manifest().references == ()


def test_a_linked_file_tells_how_often_it_was_taken_over():
    linked = tuple(replace(file, reused=9) if file.kind == "shard" else file for file in a_manifest().files)
    manifest = a_manifest(files=linked)

    assert parse_manifest(encode_manifest(manifest), key=KEY) == manifest


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"reused": "REMOVED"}, "files[0].reused"),
        ({"reused": 0}, "files[0].reused"),
        ({"reused": True}, "files[0].reused"),
        ({"reused": 10**6}, "files[0].reused"),
        ({"checkpoint": "step-0000001200.g0007"}, f"files, {OLD}/rank00000.safetensors"),
        ({"checkpoint": "step-1100"}, "files[0].checkpoint"),
        ({"checkpoint": "REMOVED"}, f"files, {OLD}/rank00000.safetensors"),
        ({"path": f"{OLD}/rank00001.safetensors"}, "files"),
        ({"path": "rank00000.safetensors"}, "files, rank00000.safetensors"),
    ],
)
def test_a_forged_reference_is_named(changes, field):
    with pytest.raises(CorruptCheckpointError) as caught:
        parse_manifest(forge_sealed(as_json(files=taken_over(0, **changes))), key=KEY)

    assert (caught.value.key, caught.value.field) == (KEY, field)


def test_a_checkpoint_may_not_refer_to_itself():
    files = taken_over(0)
    for file in files[:2]:
        file["checkpoint"] = "step-0000001200.g0007"

    with pytest.raises(CorruptCheckpointError, match="another checkpoint than its own"):
        parse_manifest(forge_sealed(as_json(files=files)), key=KEY)


@pytest.mark.parametrize("files", [entry(0, reused=1), taken_over(0)], ids=["link", "reference"])
def test_a_stand_alone_checkpoint_takes_no_file_over(files):
    alone = {"run_id": None, "generation": 0, "files": files}

    with pytest.raises(CorruptCheckpointError, match="stand-alone"):
        parse_manifest(forge_sealed(as_json(**alone)), key=KEY)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"dckpt": "generation"}, "dckpt"),
        ({"version": "1.0"}, "version"),
        ({"unknown": 1}, "unknown"),
        ({"run_id": "a/../b"}, "run_id"),
        ({"run_id": None}, "run_id"),
        ({"run_id": 5}, "run_id"),
        ({"step": None}, "step"),
        ({"step": -1}, "step"),
        ({"step": 10**10}, "step"),
        ({"step": 1200.0}, "step"),
        ({"step": True}, "step"),
        ({"micro_step": None}, "micro_step"),
        ({"generation": 0}, "run_id"),
        ({"generation": 10**6}, "generation"),
        ({"attempt": "../" + "a" * 29}, "attempt"),
        ({"attempt": "ab" * 16}, f"files, {ATTEMPT}/rank00000.safetensors"),
        ({"created_unix_s": -1}, "created_unix_s"),
        ({"created_unix_s": "2020"}, "created_unix_s"),
        ({"world_size": 0}, "world_size"),
        ({"world_size": 2**40}, "world_size"),
        ({"world_size": 1}, "coordinates"),
        ({"mesh": []}, "mesh"),
        ({"mesh": {"axes": ["a", "a"], "shape": [1, 1]}}, "mesh.axes"),
        ({"mesh": {"axes": ["dp"], "shape": [2, 1]}}, "mesh.shape"),
        ({"mesh": {"axes": [], "shape": []}}, "mesh.shape"),
        ({"mesh": {"axes": ["dp"], "shape": [0]}}, "mesh.shape"),
        ({"mesh": {"axes": ["dp"], "shape": [2], "x": 1}}, "mesh.x"),
        ({"mesh": {"axes": ["dp"]}}, "mesh.shape"),
        ({"mesh": None}, "coordinates"),
        ({"coordinates": [[0]]}, "coordinates"),
        ({"coordinates": [[0], [2]]}, "coordinates[1]"),
        ({"coordinates": [[0], [0, 1]]}, "coordinates[1]"),
        ({"coordinates": [[0], 1]}, "coordinates[1]"),
        ({"parts": ["model", "model"]}, "parts"),
        ({"parts": ["a\0b"]}, "parts[0]"),
        ({"parts": [""]}, "parts[0]"),
        ({"parts": "model"}, "parts"),
        ({"values": []}, "values"),
        ({"values": {"": 1}}, "values"),
        ({"rank_tensors": [1]}, "rank_tensors[0]"),
        ({"rank_values": None}, "rank_values"),
        ({"aliases": {"a": 1}}, "aliases.a"),
        ({"rng": {"torch": "dp"}}, "rng.torch"),
        ({"rng": {"torch": ["dp", "dp"]}}, "rng.torch"),
        ({"facts": 3}, "facts"),
        ({"metrics": {"loss": "low"}}, "metrics.loss"),
        ({"metrics": {"loss": True}}, "metrics.loss"),
        ({"metrics": {"loss": {"$t": "float", "v": "1"}}}, "metrics.loss"),
        ({"writer": {"dckpt": None}}, "writer.dckpt"),
        ({"lineage": []}, "lineage"),
        ({"lineage": {"how": "magic"}}, "lineage.checkpoint"),
        ({"lineage": an_origin(how="magic").to_json()}, "lineage.how"),
        ({"lineage": an_origin(run_id="../x").to_json()}, "lineage.run_id"),
        ({"lineage": an_origin(checkpoint="a\0b").to_json()}, "lineage.checkpoint"),
        ({"lineage": an_origin(step=-1).to_json()}, "lineage.step"),
        ({"lineage": an_origin(generation=10**6).to_json()}, "lineage.generation"),
        ({"lineage": an_origin(manifest_sha256="ab").to_json()}, "lineage.manifest_sha256"),
        ({"lineage": an_origin(world_size=0).to_json()}, "lineage.world_size"),
        ({"lineage": an_origin(carried=("a", "a")).to_json()}, "lineage.carried"),
        ({"lineage": an_origin().to_json() | {"x": 1}}, "lineage.x"),
        ({"files": None}, "files"),
        ({"files": []}, "files"),
        ({"files": ["x"]}, "files[0]"),
    ],
)
def test_a_forged_field_is_named(changes, field):
    with pytest.raises(CorruptCheckpointError) as caught:
        parse_manifest(forge_sealed(as_json(**changes)), key=KEY)

    assert (caught.value.key, caught.value.field) == (KEY, field)


@pytest.mark.parametrize(
    ("place", "changes", "field"),
    [
        (0, {"path": "../../etc/passwd"}, "files[0].path"),
        (0, {"path": "/etc/passwd"}, "files[0].path"),
        (0, {"path": f"{ATTEMPT}/a\0b.safetensors"}, "files[0].path"),
        (0, {"path": 7}, "files[0].path"),
        (0, {"path": "rank00000.safetensors"}, "files, rank00000.safetensors"),
        (0, {"path": f"{ATTEMPT}/a/b.safetensors"}, f"files, {ATTEMPT}/a/b.safetensors"),
        (0, {"path": f"{ATTEMPT}/rank00000.bin"}, f"files, {ATTEMPT}/rank00000.bin"),
        (0, {"path": f"{ATTEMPT}/.safetensors"}, f"files, {ATTEMPT}/.safetensors"),
        (0, {"path": f"{ATTEMPT}/rank00005.safetensors"}, f"files, {ATTEMPT}/rank00005.safetensors"),
        (0, {"path": f"{ATTEMPT}/rank00001.safetensors"}, "files"),
        (0, {"size": -1}, "files[0].size"),
        (0, {"size": 2**62}, "files[0].size"),
        (0, {"size": 10**9}, f"files, {ATTEMPT}/rank00000.safetensors"),
        (0, {"digest": DIGEST.upper()}, "files[0].digest"),
        (0, {"digest": "ab"}, "files[0].digest"),
        (0, {"kind": "code"}, "files[0].kind"),
        (0, {"kind": "sums"}, "files"),
        (0, {"rank": None}, "files[0].rank"),
        (0, {"rank": 2}, "files[0].rank"),
        (0, {"rank": 1}, f"files, {ATTEMPT}/rank00000.safetensors"),
        (0, {"rank": "REMOVED"}, "files[0].rank"),
        (0, {"mode": 0o777}, "files[0].mode"),
        (0, {"checkpoint": "../other"}, "files[0].checkpoint"),
        (0, {"checkpoint": None}, "files[0].checkpoint"),
        (0, {"checkpoint": "step-0000001100.g0007"}, "files[0].reused"),
        (0, {"checkpoint": "step-0000001100.g0007", "reused": 1}, f"files, {ATTEMPT}/rank00000.safetensors"),
        (1, {"reused": 1}, "files[1].reused"),
        (4, {"reused": 1}, "files[4].reused"),
        (4, {"checkpoint": "step-0000001100.g0007"}, "files[4].checkpoint"),
        (4, {"path": "layout.index"}, "files, layout.index"),
        (4, {"digest": "ab" * 16}, f"files, layout-{DIGEST}.index"),
        (4, {"rank": 0}, "files[4].rank"),
    ],
)
def test_a_forged_file_entry_is_named(place, changes, field):
    with pytest.raises(CorruptCheckpointError) as caught:
        parse_manifest(forge_sealed(as_json(files=entry(place, **changes))), key=KEY)

    assert (caught.value.key, caught.value.field) == (KEY, field)


def test_every_missing_field_is_named():
    found = as_json()
    for name in found:
        with pytest.raises(CorruptCheckpointError) as caught:
            parse_manifest(forge_sealed({key: value for key, value in found.items() if key != name}), key=KEY)
        assert caught.value.field == name


def test_a_newer_major_version_is_not_called_damage():
    with pytest.raises(FormatVersionError, match=r"found 2\.0\. Upgrade"):
        parse_manifest(forge_sealed({"dckpt": "manifest", "version": [2, 0], "all": "new"}), key=KEY)


def test_a_newer_minor_version_may_have_more_fields():
    files = [file | {"added": 1} for file in as_json()["files"]]
    found = parse_manifest(forge_sealed(as_json(version=[1, 1], added={}, files=files)), key=KEY)

    assert found == a_manifest()


@pytest.mark.parametrize(
    "changes",
    [
        {"run_id": None},
        {"files": ()},
        {"files": (FileEntry("layout-x.index", 1, DIGEST, "index", None),)},
        {"mesh": Mesh(axes=("dp",), shape=(1,))},
        {"facts": {"x": 2**63}},
        {"facts": {"x": float("nan")}},
        {"values": {"x": object()}},
        {"parts": ("a\0",)},
    ],
)
def test_a_manifest_that_readers_would_refuse_is_not_written(changes):
    with pytest.raises(ConfigError):
        encode_manifest(a_manifest(**changes))


def test_a_manifest_above_the_limit_is_not_written():
    with pytest.raises(ConfigError, match="store less"):
        encode_manifest(a_manifest(values={"history": "x" * MANIFEST_BYTES_MAX}))


def test_a_manifest_of_a_thousand_ranks_parses_in_milliseconds():
    data = encode_manifest(a_manifest(world_size=1000))
    assert len(data) > 250_000

    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        parse_manifest(data, key=KEY)
        seconds.append(time.perf_counter() - begin)
    # Ten times what it takes: two cores are shared with other work.
    assert min(seconds) < 0.2
