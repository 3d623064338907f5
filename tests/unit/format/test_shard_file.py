"""Shard files: planned, read by the safetensors library, parsed."""

import json
import random
import struct

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from dckpt.errors import ConfigError, CorruptCheckpointError
from dckpt.format.shard_file import (
    DTYPES,
    HEADER_ALIGNMENT,
    HEADER_BYTES_MAX,
    ShardTensor,
    header_bytes_needed,
    parse_shard_header,
    plan_shard_file,
    plan_shard_files,
)
from tests.unit.format.builders import a_shard_plan, forge_shard

NUMPY_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
}  # fmt: skip


def test_the_safetensors_library_reads_a_planned_file(tmp_path):
    """Shard files are plain safetensors: 0-d, every dtype that numpy has, and names of any kind."""
    rng = np.random.default_rng(1)
    arrays = {}
    tensors = []
    for place, (dtype, numpy_dtype) in enumerate(NUMPY_DTYPES.items()):
        for shape in ((), (3,), (2, 5)):
            name = f'model.größe "{dtype}".{len(shape)}'
            arrays[name] = rng.integers(0, 2, shape).astype(numpy_dtype)
            tensors.append(ShardTensor(name, dtype, shape, (place,) * len(shape)))
    random.Random(2).shuffle(tensors)
    plan = plan_shard_file("rank00000.safetensors", tensors)
    content = bytearray(plan.size)
    content[: len(plan.header)] = plan.header
    for tensor, begin in zip(plan.tensors, plan.begins, strict=True):
        content[begin : begin + tensor.nbytes] = arrays[tensor.name].tobytes()
    path = tmp_path / plan.file
    path.write_bytes(content)

    loaded = safetensors.numpy.load_file(path)
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        assert loaded[name].shape == array.shape
        assert loaded[name].tobytes() == array.tobytes()
    with safetensors.safe_open(path, "numpy") as opened:
        metadata = opened.metadata()
    assert {key: metadata[key] for key in ("format", "DCP_VERSION", "dckpt")} == {
        "format": "pt",
        "DCP_VERSION": "1.0",
        "dckpt": "1",
    }
    if not any(any(tensor.offsets) for tensor in tensors):
        assert "DCP_SHARDING_INFO" not in metadata
        return
    saved = json.loads(metadata["DCP_SHARDING_INFO"])
    assert saved == {tensor.name: {"saved_offsets": list(tensor.offsets)} for tensor in tensors}


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_the_safetensors_library_agrees_on_the_size_of_every_dtype(dtype):
    plan = plan_shard_file("rank00000.safetensors", [ShardTensor("x", dtype, (3, 2), (0, 0))])
    data = bytes(range(6 * DTYPES[dtype]))
    ((name, found),) = safetensors.deserialize(plan.header + data)

    assert (name, found["dtype"], found["shape"], bytes(found["data"])) == ("x", dtype, [3, 2], data)


def test_tensors_lie_aligned_without_gaps_in_an_order_that_does_not_depend_on_the_input():
    rng = random.Random(3)
    tensors = [
        ShardTensor(f"t{place}", rng.choice(sorted(DTYPES)), (rng.randrange(1, 9),), (0,)) for place in range(200)
    ]
    plan = plan_shard_file("f.safetensors", tensors)
    rng.shuffle(tensors)

    assert plan_shard_file("f.safetensors", tensors) == plan
    assert len(plan.header) % HEADER_ALIGNMENT == 0
    end = len(plan.header)
    for tensor, begin in zip(plan.tensors, plan.begins, strict=True):
        assert begin == end
        assert begin % DTYPES[tensor.dtype] == 0
        end = begin + tensor.nbytes
    assert end == plan.size


def test_a_planned_header_parses_back():
    plan = a_shard_plan()
    needed = header_bytes_needed(plan.header[:8], file_bytes=plan.size, key="k")
    found = parse_shard_header(plan.header[:needed], file_bytes=plan.size, key="k")

    assert needed == len(plan.header)
    assert found.tensors == plan.tensors
    assert found.begins == plan.begins
    assert found.data_begin == len(plan.header)
    assert found.metadata["dckpt"] == "1"


def test_a_file_without_tensors_is_possible():
    plan = plan_shard_file("rank00000.safetensors", [])

    assert plan.size == len(plan.header) == HEADER_ALIGNMENT
    assert parse_shard_header(plan.header, file_bytes=plan.size, key="k").tensors == ()
    assert safetensors.deserialize(plan.header) == []


def test_a_file_that_the_safetensors_library_wrote_parses():
    """Other tools' files have no offsets, may have empty tensors, and name dtypes in the same way."""
    arrays = {
        "w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "e": np.zeros((0, 2), dtype=np.int64),
        "s": np.array(True),
    }
    data = safetensors.numpy.save(arrays, metadata={"by": "another tool"})
    found = parse_shard_header(data, file_bytes=len(data), key="model.safetensors")

    assert {tensor.name: (tensor.dtype, tensor.shape, tensor.offsets) for tensor in found.tensors} == {
        "w": ("F32", (2, 3), (0, 0)),
        "e": ("I64", (0, 2), (0, 0)),
        "s": ("BOOL", (), ()),
    }
    place = [tensor.name for tensor in found.tensors].index("w")
    assert data[found.begins[place] :][:24] == arrays["w"].tobytes()
    assert found.metadata == {"by": "another tool"}


def test_each_file_holds_one_chunk_of_a_tensor_and_unchanged_tensors_lie_apart():
    chunks = [ShardTensor("w", "F32", (1, 4), (row, 0)) for row in (0, 2, 5)]
    frozen = [ShardTensor("frozen", "F32", (4,), (0,)), ShardTensor("frozen", "F32", (4,), (8,))]
    plans = plan_shard_files(
        3, [chunks[0], frozen[0], ShardTensor("b", "F32", (4,), (0,)), *chunks[1:], frozen[1]], separate={"frozen"}
    )

    assert [plan.file for plan in plans] == ["rank00003.safetensors"] + [
        f"rank00003-{part}.safetensors" for part in (1, 2, 3, 4)
    ]
    assert [[(tensor.name, tensor.offsets) for tensor in plan.tensors] for plan in plans] == [
        [("b", (0,)), ("w", (0, 0))],
        [("w", (2, 0))],
        [("w", (5, 0))],
        [("frozen", (0,))],
        [("frozen", (8,))],
    ]
    assert plan_shard_files(0, []) == []


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([ShardTensor("w", "F32", (1,), (0,))] * 2, "twice"),
        ([ShardTensor("w", "F32", (1,), (0,)), ShardTensor("w", "F64", (1,), (0,))], "twice"),
        ([ShardTensor("__metadata__", "F32", (1,), (0,))], "__metadata__"),
        ([ShardTensor("a\0b", "F32", (1,), (0,))], "control"),
        ([ShardTensor("", "F32", (1,), (0,))], "name"),
        ([ShardTensor("w", "C128", (1,), (0,))], "C128"),
        ([ShardTensor("w", "F32", (0, 3), (0, 0))], "index only"),
        ([ShardTensor("w", "F32", (1,), (-1,))], "offsets from 0"),
        ([ShardTensor("w", "F32", (1,), ())], "offsets"),
        ([ShardTensor("w", "F32", (1,) * 65, (0,) * 65)], "dimensions"),
        ([ShardTensor("w", "U8", (2**62,), (0,))], "at most"),
    ],
)
def test_a_plan_that_cannot_be_stored_is_refused(tensors, message):
    with pytest.raises(ConfigError, match=message):
        plan_shard_file("rank00000.safetensors", tensors)


def test_a_header_above_the_limit_is_refused(monkeypatch):
    monkeypatch.setattr("dckpt.format.shard_file.HEADER_BYTES_MAX", 8192)
    with pytest.raises(ConfigError, match="more files"):
        plan_shard_file("f.safetensors", [ShardTensor(f"t{place}", "U8", (1,), (0,)) for place in range(200)])


@pytest.mark.parametrize(
    ("first8", "file_bytes"),
    [
        (struct.pack("<Q", 2**60), 2**61),
        (struct.pack("<Q", 2**64 - 1), 10**9),
        (struct.pack("<Q", HEADER_BYTES_MAX + 1), 10**9),
        (struct.pack("<Q", 93), 100),
        (b"\x01\0\0", 100),
        (b"", 0),
        (struct.pack("<Q", 0), 4),
    ],
)
def test_a_header_length_out_of_range_is_refused_before_anything_is_read(first8, file_bytes):
    with pytest.raises(CorruptCheckpointError) as caught:
        header_bytes_needed(first8, file_bytes=file_bytes, key="rank00000.safetensors")

    assert (caught.value.key, caught.value.field) == ("rank00000.safetensors", "header length")


def entry(dtype="F32", shape=(2,), begin=0, end=8, **more):
    """One tensor's entry of a header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **more}


def info(**offsets):
    """A `__metadata__` with these saved offsets."""
    return {"DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": place} for name, place in offsets.items()})}


@pytest.mark.parametrize(
    ("header", "data_bytes", "field"),
    [
        ({"a": entry()}, 9, "size"),
        ({"a": entry()}, 7, "size"),
        ({}, 1, "size"),
        ({"a": entry(), "b": entry(begin=4, end=12)}, 12, "header.b"),
        ({"a": entry(), "b": entry()}, 8, "header.b"),
        ({"a": entry(), "b": entry(begin=9, end=17)}, 17, "header.b"),
        ({"a": entry(begin=8, end=16)}, 16, "header.a"),
        ({"a": entry(begin=8, end=0)}, 8, "header.a.data_offsets"),
        ({"a": entry(end=2**62)}, 8, "header.a.data_offsets"),
        ({"a": entry(end=-8)}, 8, "header.a.data_offsets"),
        ({"a": entry(shape=(3,))}, 8, "header.a.data_offsets"),
        ({"a": entry(dtype="F64")}, 8, "header.a.data_offsets"),
        ({"a": entry(dtype="F4")}, 8, "header.a.dtype"),
        ({"a": entry(dtype=3)}, 8, "header.a.dtype"),
        ({"a": entry(shape=(-2,))}, 8, "header.a.shape"),
        ({"a": entry(shape=(2.0,))}, 8, "header.a.shape"),
        ({"a": entry(shape=(True, 2))}, 8, "header.a.shape"),
        ({"a": entry(shape=[2**61] * 64)}, 8, "header.a.data_offsets"),
        ({"a": entry(shape=[1] * 65)}, 8, "header.a.shape"),
        ({"a": entry(extra=1)}, 8, "header.a.extra"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "header.a.data_offsets"),
        ({"a": [1]}, 8, "header.a"),
        ({"a": entry() | {"data_offsets": [0, 8, 8]}}, 8, "header.a.data_offsets"),
        ({"a\0b": entry()}, 8, "header"),
        ({"": entry()}, 8, "header"),
        ({"__metadata__": [], "a": entry()}, 8, "header.__metadata__"),
        ({"__metadata__": {"x": 1}, "a": entry()}, 8, "header.__metadata__.x"),
        ({"__metadata__": info(b=[0]), "a": entry()}, 8, "header.__metadata__.DCP_SHARDING_INFO"),
        ({"__metadata__": info(), "a": entry()}, 8, "header.__metadata__.DCP_SHARDING_INFO"),
        ({"__metadata__": info(a=[0, 0]), "a": entry()}, 8, "header.a.shape"),
        ({"__metadata__": info(a=[-1]), "a": entry()}, 8, "header.__metadata__.DCP_SHARDING_INFO.a.saved_offsets"),
        ({"__metadata__": info(a=None), "a": entry()}, 8, "header.__metadata__.DCP_SHARDING_INFO.a.saved_offsets"),
        ({"__metadata__": {"DCP_SHARDING_INFO": "[]"}, "a": entry()}, 8, "header.__metadata__.DCP_SHARDING_INFO"),
    ],
)
def test_a_forged_header_is_refused_by_field(header, data_bytes, field):
    data = forge_shard(header, bytes(data_bytes))
    with pytest.raises(CorruptCheckpointError) as caught:
        parse_shard_header(data, file_bytes=len(data), key="rank00000.safetensors")

    assert (caught.value.key, caught.value.field) == ("rank00000.safetensors", field)


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}',
        b' {"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b"[]",
        b"",
        b"{",
        b"{" * 1000,
        b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    ],
)
def test_a_header_that_is_not_strict_json_is_refused(text):
    data = forge_shard(text, bytes(8))
    with pytest.raises(CorruptCheckpointError):
        parse_shard_header(data, file_bytes=len(data), key="k")


def test_a_header_that_is_cut_short_is_refused():
    plan = a_shard_plan()
    with pytest.raises(CorruptCheckpointError, match="4096 bytes"):
        parse_shard_header(plan.header[:-1], file_bytes=plan.size, key="k")
