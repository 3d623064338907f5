"""Strict JSON and its seal."""

import hashlib
import json

import pytest

from dckpt.errors import ConfigError, CorruptCheckpointError
from dckpt.format.sealed_json import dump_json, load_json, open_sealed_json, seal_json
from tests.unit.format.builders import forge_sealed


def test_a_seal_is_the_sha256_of_everything_before_it():
    data = seal_json({"b": 1, "a": "ü"})

    assert data.startswith('{"b":1,"a":"ü","sha256":"'.encode())
    assert json.loads(data)["sha256"] == hashlib.sha256('{"b":1,"a":"ü"'.encode()).hexdigest()
    assert open_sealed_json(data, key="k", limit=1000) == {"b": 1, "a": "ü"}


def test_every_flipped_bit_and_every_cut_of_a_sealed_file_is_found():
    data = seal_json({"step": 1, "name": "x"})
    damaged = [data[:place] for place in range(len(data))]
    damaged += [data + b"\n", data[1:], b" " + data]
    for place in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            damaged.append(bytes(changed))
    for bad in damaged:
        with pytest.raises(CorruptCheckpointError) as caught:
            open_sealed_json(bad, key="manifest.json", limit=1000)
        assert caught.value.key == "manifest.json"
        assert caught.value.field == "sha256"


def test_a_sealed_file_holds_an_object_and_respects_the_limit():
    with pytest.raises(CorruptCheckpointError, match="JSON"):
        open_sealed_json(forge_sealed(b"[1]"), key="k", limit=1000)
    with pytest.raises(CorruptCheckpointError, match="at most 10 bytes"):
        open_sealed_json(seal_json({"a": 1}), key="k", limit=10)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b'{"a":1,"a":2}', "twice"),
        (b'{"x":[{"a":1,"b":2,"a":1}]}', "twice"),
        (b"NaN", "NaN"),
        (b"[Infinity]", "Infinity"),
        (b"[-Infinity]", "-Infinity"),
        (b"1e999", "1e999"),
        (b"-1e999", "-1e999"),
        (b"9223372036854775808", "9223372036854775808"),
        (b"-9223372036854775808", "-9223372036854775808"),
        (b"1" * 5000, "11"),
        (b"\xff", "byte 0"),
        (b"\xef\xbb\xbf{}", "JSON"),
        (b'"\\ud800"', "surrogate"),
        (b'{"\\udfff":1}', "surrogate"),
        (b'["\\\\",["\\uD83D"]]', "surrogate"),
        (b'"\xed\xa0\x80"', "UTF-8"),
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[1,]", "JSON"),
        (b"{} {}", "JSON"),
        (b"'a'", "JSON"),
        (b'"a\nb"', "JSON"),
        (b"[" * 900 + b"]" * 900, "levels"),
        (b"[" * 60_000, "levels"),
        (b'{"a":' * 50_000, "levels"),
        (b"[" * 300_000, "arrays and objects"),
        (b"[]," * 300_000, "arrays and objects"),
    ],
)
def test_json_that_the_format_forbids_is_refused(text, found):
    with pytest.raises(CorruptCheckpointError) as caught:
        load_json(text, key="header", limit=2**20)

    assert found in str(caught.value)
    assert caught.value.key == "header"
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -0.0, 2**63 - 1, -(2**63) + 1, 1e308, 5e-324, "", "\0\x1f\u2028😀", [], {}, {"": [{}]}, "\\ud800"],
)
def test_json_round_trips_exactly(value):
    found = load_json(dump_json(value), key="k", limit=1000)

    assert repr(found) == repr(value)


def test_escaped_surrogate_pairs_are_one_character():
    assert load_json(b'"\\ud83d\\ude00"', key="k", limit=100) == "😀"


def test_nesting_up_to_the_limit_passes():
    assert load_json(b"[" * 256 + b"]" * 256, key="k", limit=8192)
    with pytest.raises(CorruptCheckpointError):
        load_json(b"[" * 257 + b"]" * 257, key="k", limit=8192)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800", {1, 2}, object(), b"x"])
def test_what_json_cannot_hold_is_a_config_error(value):
    with pytest.raises(ConfigError, match="encode_value"):
        dump_json({"a": value})


@pytest.mark.parametrize("value", ["x" * 1000, [[]] * 60])
def test_what_is_too_large_to_be_read_back_is_not_written(value):
    with pytest.raises(ConfigError, match="as a tensor"):
        dump_json(value, limit=900)

    assert load_json(dump_json(value, limit=2000), key="k", limit=2000) == value
