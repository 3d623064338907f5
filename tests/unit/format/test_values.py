"""Python values as tagged JSON."""

import enum
import math
import random
from collections import Counter, OrderedDict, defaultdict, namedtuple

import numpy as np
import pytest

from dckpt.errors import ConfigError, CorruptCheckpointError
from dckpt.format.values import (
    VALUES_DEPTH_MAX,
    DType,
    Size,
    TensorRef,
    decode_value,
    dump_json,
    encode_value,
    load_json,
)

Point = namedtuple("Point", "x y")


class Color(enum.IntEnum):
    RED = 1


class HasState:
    def state_dict(self):
        return {}


def round_trip(value):
    """`value` after a trip through bytes."""
    data = dump_json(encode_value(value, path="extra"))
    return decode_value(load_json(data, key="manifest.json", limit=2**20), key="manifest.json", path="extra")


def same(one, other):
    """Equal in value and in exact type, all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        pairs = zip(one.items(), other.items(), strict=True)
        return len(one) == len(other) and all(same(a, b) and same(x, y) for (a, x), (b, y) in pairs)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and math.isnan(one):
        return math.isnan(other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    return repr(one) == repr(other) if isinstance(one, float) else one == other


@pytest.mark.parametrize(
    "value",
    [
        None, True, False, 0, 1, -1, 2**63 - 1, -(2**63), 2**63, 2**64, -(2**200), 10**4095,
        0.0, -0.0, 0.1, 1e-320, 1.0, 1e22, math.inf, -math.inf, math.nan,
        "", "a\0b", "$t", "ü😀\u2028", b"", b"\x00\xff", [], [[]], [1, [2.0, "x"]], (), (1, (2,), [3]),
        {}, {"a": {"b": 1}}, {"$t": 1}, {"$x": {"$y": 2}}, {1: "a", "1": "b"}, {None: 1, (1, 2): 2, 1.5: 3, b"x": 4},
        {True: 1, 2: 2}, {DType("float32"): 1},
        set(), {1, 2, 3}, {"a", "b"}, frozenset({(1, 2), "x"}), {frozenset({1}): 2},
        Counter("abca"), OrderedDict([("b", 1), ("a", 2)]), OrderedDict([(1, {"x": ()})]),
        DType("float8_e4m3fn"), TensorRef("model.weight"), Size(()), Size((2, 3)),
        random.Random(3).getstate(),
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_a_value_comes_back_equal_and_of_the_same_type(value):
    assert same(round_trip(value), value)


@pytest.mark.parametrize(
    "dtype",
    [
        "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
        "float16", "float32", "float64", "complex64", "complex128",
    ],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3)])
def test_numeric_arrays_come_back_with_dtype_and_shape(dtype, shape):
    value = np.arange(math.prod(shape)).reshape(shape).astype(dtype)
    found = round_trip(value)

    assert same(found, value)
    assert found.flags.writeable


def test_an_array_that_is_not_contiguous_comes_back_by_its_elements():
    value = np.arange(12, dtype=np.int32).reshape(3, 4).T[::2]

    assert np.array_equal(round_trip(value), value)


@pytest.mark.parametrize("value", [np.float64(0.1), np.float32(math.nan), np.int64(-3), np.bool_(True), np.uint8(255)])
def test_numpy_scalars_are_not_confused_with_python_numbers(value):
    found = round_trip(value)

    assert type(found) is type(value)
    assert found.tobytes() == value.tobytes()


def test_the_state_of_numpys_generators_round_trips():
    legacy = np.random.RandomState(5).get_state(legacy=False)
    modern = np.random.Generator(np.random.PCG64(5)).bit_generator.state

    assert same(round_trip(legacy), legacy)
    assert same(round_trip(modern), modern)


def test_a_set_has_the_same_bytes_in_every_process():
    """Values are compared between ranks by their bytes, and the order of a set of strings differs by process."""
    words = [f"w{number}" for number in range(50)]
    forward = set(words)
    backward = {*words[::-1]}

    assert dump_json(encode_value(forward, path="x")) == dump_json(encode_value(backward, path="x"))
    found = encode_value({"b", "a"}, path="x")
    assert found == {"$t": "set", "v": ["a", "b"]}


@pytest.mark.parametrize(
    ("value", "found", "remedy"),
    [
        (Point(1, 2), "Point", "_asdict"),
        (Color.RED, "Color", "int(value)"),
        (HasState(), "HasState", "state_dict()"),
        (lambda: 1, "function", "Code is never stored"),
        (HasState, "type", "Code is never stored"),
        (print, "builtin_function", "Code is never stored"),
        (defaultdict(int), "defaultdict", "dict(value)"),
        (object(), "object", "as a dict"),
        (1j, "complex", "as a dict"),
        (bytearray(b"x"), "bytearray", "as a dict"),
        (np.array(["a"]), "numpy.ndarray of dtype", "plain numeric"),
        (np.array([object()]), "object", "plain numeric"),
        (np.zeros(2, dtype=[("a", "i4")]), "numpy.ndarray", "plain numeric"),
        (np.zeros(2, dtype=">f4"), ">f4", "byteorder"),
        (np.longdouble(1), "longdouble", "plain numeric"),
        (np.datetime64("2020-01-01"), "datetime64", "plain numeric"),
        ("\ud800", "surrogate", "bytes"),
        pytest.param(10**5000, "bits", "bytes", id="huge"),
        (DType("float32; import os"), "dtype name", "torch's name"),
        (TensorRef("a\0b"), "tensor name", "control"),
        (Size((2**70,)), "sizes", "2^63"),
        (Size((True,)), "sizes", "2^63"),
    ],
)
def test_what_cannot_be_stored_is_refused_with_path_and_remedy(value, found, remedy):
    with pytest.raises(ConfigError) as caught:
        encode_value({"a": [0, value]}, path="extra.ema")

    message = str(caught.value)
    assert "extra.ema.a[1]" in message
    assert found in message
    assert remedy in message
    assert "\n" not in message


def test_a_cycle_or_a_deep_value_is_refused_by_depth():
    cycle: list = []
    cycle.append(cycle)
    with pytest.raises(ConfigError, match="levels"):
        encode_value(cycle, path="extra")
    for wrap in (lambda x: [x], lambda x: (x,), lambda x: {"a": x}, lambda x: {1: x}, lambda x: OrderedDict(a=x)):
        value = wrap(0)
        for _ in range(VALUES_DEPTH_MAX - 1):
            value = wrap(value)
        assert same(round_trip(value), value)
        with pytest.raises(ConfigError, match="levels"):
            encode_value(wrap(value), path="extra")


@pytest.mark.parametrize(
    "found",
    [
        {"$t": "code", "v": "print()"},
        {"$t": ["tuple"], "v": []},
        {"$t": "tuple"},
        {"$t": "tuple", "v": [], "w": 1},
        {"$t": "tuple", "v": {}},
        {"$x": 1},
        {"$t": "dict", "v": [[1, 2, 3]]},
        {"$t": "dict", "v": [[[], 1]]},
        {"$t": "dict", "v": [["a", 1], ["a", 2]]},
        {"$t": "dict", "v": [[1, 1], [True, 2]]},
        {"$t": "dict", "v": {"a": 1}},
        {"$t": "Counter", "v": "abc"},
        {"$t": "set", "v": [1, 1]},
        {"$t": "set", "v": [{}]},
        {"$t": "frozenset", "v": [[1]]},
        {"$t": "bytes", "v": "a"},
        {"$t": "bytes", "v": "é==="},
        {"$t": "bytes", "v": 5},
        {"$t": "int", "v": "5"},
        {"$t": "int", "v": 2**62},
        {"$t": "int", "v": "0x" + "f" * 40},
        {"$t": "int", "v": "9" * 4097},
        {"$t": "int", "v": "9" * 10_000_000},
        {"$t": "int", "v": "0" * 30},
        {"$t": "int", "v": "١" * 30},
        {"$t": "float", "v": "1.5"},
        {"$t": "float", "v": 1.5},
        {"$t": "dtype", "v": "os.system"},
        {"$t": "dtype", "v": None},
        {"$t": "tensor", "v": ""},
        {"$t": "tensor", "v": "a\0"},
        {"$t": "size", "v": [1.0]},
        {"$t": "size", "v": [True]},
        {"$t": "size", "v": 3},
        {"$t": "ndarray", "dtype": "float32", "shape": [2], "v": "AAAA"},
        {"$t": "ndarray", "dtype": "float32", "shape": [-1], "v": "AAAAAA=="},
        {"$t": "ndarray", "dtype": "float32", "shape": [-1, -1], "v": "AAAAAA=="},
        {"$t": "ndarray", "dtype": "object", "shape": [0], "v": ""},
        {"$t": "ndarray", "dtype": "float32,float32", "shape": [0], "v": ""},
        {"$t": "ndarray", "dtype": "uint8", "shape": [2**62, 2**62], "v": "AA=="},
        {"$t": "ndarray", "dtype": "uint8", "shape": [2**62, 2**62, 0], "v": ""},
        {"$t": "ndarray", "dtype": "uint8", "shape": [1] * 33, "v": "AA=="},
        {"$t": "ndarray", "dtype": "uint8", "shape": [1], "v": ["AA=="]},
        {"$t": "ndarray", "dtype": 3, "shape": [1], "v": "AA=="},
        {"$t": "npscalar", "dtype": "float32", "v": ""},
        {"$t": "npscalar", "dtype": "float32", "v": "AAAAAAAAAAA="},
        float("nan"),
        2**63,
        object(),
    ],
    ids=lambda found: repr(found)[:50],
)
def test_a_value_that_encode_cannot_have_written_is_refused(found):
    with pytest.raises(CorruptCheckpointError) as caught:
        decode_value({"a": [found]}, key="manifest.json", path="values.x")

    assert caught.value.key == "manifest.json"
    assert caught.value.field is not None
    assert caught.value.field.startswith("values.x.a[0]")
    assert len(str(caught.value)) < 700


def test_a_hostile_depth_is_refused_without_a_stack_overflow():
    found: list = []
    for _ in range(100_000):
        found = [found]
    with pytest.raises(CorruptCheckpointError, match="levels"):
        decode_value(found, key="k", path="values.x")
