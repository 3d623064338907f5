"""Generation records."""

import json

import pytest

from dckpt.errors import ConfigError, CorruptCheckpointError, FormatVersionError
from dckpt.format.generation import Parent, encode_generation, parse_generation
from tests.unit.format.builders import a_generation, forge_sealed


@pytest.mark.parametrize("reason", ["start", "resume", "walk-back", "rollback", "load", "leg", "repair", "reshard"])
def test_a_generation_round_trips(reason):
    generation = a_generation(reason=reason)

    assert parse_generation(encode_generation(generation), key="generations/000008.json") == generation


def test_a_first_generation_has_no_parent():
    generation = a_generation(number=1, parent=None, reason="start")

    assert parse_generation(encode_generation(generation), key="k").parent is None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"number": 0}, "number"),
        ({"number": True}, "number"),
        ({"number": 7}, "parent.generation"),
        ({"run_id": "a/b"}, "run_id"),
        ({"run_id": ".."}, "run_id"),
        ({"reason": "mood"}, "reason"),
        ({"world_size": 0}, "world_size"),
        ({"world_size": 2.0}, "world_size"),
        ({"created_unix_s": -1.0}, "created_unix_s"),
        ({"created_unix_s": "now"}, "created_unix_s"),
        ({"nonce": ""}, "nonce"),
        ({"parent": []}, "parent"),
        ({"extra": 1}, "extra"),
        ({"dckpt": "manifest"}, "dckpt"),
        ({"version": [1]}, "version"),
        ({"version": [0, 1]}, "version"),
        ({"version": [1, True]}, "version"),
    ],
)
def test_a_forged_field_is_named(changes, field):
    found = json.loads(encode_generation(a_generation()))
    del found["sha256"]
    with pytest.raises(CorruptCheckpointError) as caught:
        parse_generation(forge_sealed(found | changes), key="generations/000008.json")

    assert (caught.value.key, caught.value.field) == ("generations/000008.json", field)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"checkpoint": "step-0000001200.g0006"}, "parent.checkpoint"),
        ({"checkpoint": "../x"}, "parent.checkpoint"),
        ({"manifest_sha256": "AB" * 32}, "parent.manifest_sha256"),
        ({"generation": 8}, "parent.generation"),
        ({"step": -1}, "parent.step"),
        ({"x": 1}, "parent.x"),
    ],
)
def test_a_forged_parent_is_named(changes, field):
    found = json.loads(encode_generation(a_generation()))
    del found["sha256"]
    found["parent"] |= changes
    with pytest.raises(CorruptCheckpointError) as caught:
        parse_generation(forge_sealed(found), key="k")

    assert caught.value.field == field


def test_every_missing_field_is_named():
    found = json.loads(encode_generation(a_generation()))
    del found["sha256"]
    for name in found:
        with pytest.raises(CorruptCheckpointError) as caught:
            parse_generation(forge_sealed({key: value for key, value in found.items() if key != name}), key="k")
        assert caught.value.field == name


def test_newer_versions_are_told_from_damage():
    found = json.loads(encode_generation(a_generation()))
    del found["sha256"]
    with pytest.raises(FormatVersionError, match="Upgrade"):
        parse_generation(forge_sealed(found | {"version": [2, 0], "new": 1}), key="k")

    assert parse_generation(forge_sealed(found | {"version": [1, 9], "new": 1}), key="k") == a_generation()


def test_a_record_that_readers_would_refuse_is_not_written():
    with pytest.raises(ConfigError, match="readers would refuse"):
        encode_generation(a_generation(parent=Parent("step-0000001200.g0007", 1201, 0, 7, "ab" * 32)))
