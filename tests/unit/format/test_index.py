"""The layout index."""

import json
import random
import struct
import time

import numpy as np
import pytest

from dckpt.errors import ConfigError, CorruptCheckpointError, FormatVersionError
from dckpt.format.index import Chunk, Grid, LayoutIndex, TensorMeta, build_index, encode_index, parse_index
from tests.unit.format.builders import an_index, forge_trailer, grid_chunks, pack_index, shard_names, unpack_index

KEY = "step-0000001200.g0007/layout-x.index"
COLUMNS = {
    "names": "u1", "name_ends": "u8", "dtype": "u1", "ndim": "u1", "shape": "i8",
    "chunk_ends": "u8", "file": "i4", "begin": "u8", "offsets": "i8", "sizes": "i8",
    "grid": "i4", "data_begin": "u8", "grid_ndim": "u1", "grid_levels": "u1", "grid_parts": "i8",
    "cell_ends": "u8", "cells": "i4",
}  # fmt: skip
NO_GRIDS = {"data_begin": [], "grid_ndim": [], "grid_levels": [], "grid_parts": [], "cell_ends": [], "cells": []}


def read_as_a_stranger(data: bytes):
    """(header, columns as lists) by the tables of FORMAT.md, section 7, and nothing else."""
    (content_bytes,) = struct.unpack_from("<Q", data, 16)
    data = unpack_index(data)
    assert len(data) == 16 + content_bytes
    magic, major, minor, header_bytes = struct.unpack_from("<8sHHI", data)
    assert (magic, major, minor) == (b"\x89dckIDX\n", 1, 0)
    header = json.loads(data[16 : 16 + header_bytes])
    columns = {}
    end = 16 + header_bytes
    for name, kind, begin, count in header["columns"]:
        assert begin == (end + 7) // 8 * 8
        columns[name] = np.frombuffer(data, f"<{kind}", count, begin).tolist()
        end = begin + count * int(kind[1:])
    assert (end + 7) // 8 * 8 == len(data)
    return header, columns


def write_as_a_stranger(header: dict, columns: dict, *, minor: int = 0) -> bytes:
    """The file for these columns, whatever they say; the column table is made to fit."""
    room, text = 0, b" "
    while len(text) > room:
        room = (len(text) + 7) // 8 * 8
        end, table = 16 + room, []
        for name, kind in COLUMNS.items():
            begin = (end + 7) // 8 * 8
            table.append([name, kind, begin, len(columns[name])])
            end = begin + len(columns[name]) * int(kind[1:])
        text = json.dumps(header | {"columns": table}).encode()
    body = struct.pack("<8sHHI", b"\x89dckIDX\n", 1, minor, room) + text.ljust(room)
    for name, kind in COLUMNS.items():
        data = np.array(columns[name], dtype=f"<{kind}").tobytes()
        body += data.ljust((len(data) + 7) // 8 * 8, b"\0")
    return pack_index(body)


def test_an_index_answers_for_every_tensor_and_round_trips():
    index = an_index()
    found = parse_index(encode_index(index), key=KEY)

    assert found == index
    assert found.names() == ("a.weight", "b.bias", "c.scalar", "d.empty")
    assert len(found) == 4
    assert found.num_chunks == 7
    assert found.files == tuple(shard_names(4))
    assert "a.weight" in found
    assert "a.weigh" not in found
    assert 5 not in found
    assert found.meta("a.weight") == TensorMeta("a.weight", "F32", (8, 6))
    assert found.meta("c.scalar") == TensorMeta("c.scalar", "F64", ())
    assert found.meta("d.empty").nbytes == 0
    assert found.chunks("a.weight") == grid_chunks((8, 6), (2, 2))
    assert found.meta("a.weight").chunk_nbytes(found.chunks("a.weight")[0]) == 4 * 3 * 4
    assert found.chunks("b.bias") == [Chunk((0,), (5,), 0, 4144), Chunk((5,), (0,), -1, 0)]
    assert found.chunks("c.scalar") == [Chunk((), (), 1, 5000)]
    assert found.chunks("d.empty") == []
    assert found.chunks_in_file(0) == [("a.weight", 4096, 4144), ("b.bias", 4144, 4154)]
    assert found.chunks_in_file(3) == [("a.weight", 4096, 4144)]
    assert found.file_extents() == [4154, 5008, 4144, 4144]


@pytest.mark.parametrize("method", ["meta", "chunks"])
def test_an_unknown_tensor_is_a_key_error(method):
    with pytest.raises(KeyError, match="missing"):
        getattr(an_index(), method)("missing")


def test_a_stranger_reads_and_writes_the_index_by_the_tables():
    data = encode_index(an_index())
    header, columns = read_as_a_stranger(data)

    assert header["files"] == shard_names(4)
    assert bytes(columns["names"]) == b"a.weightb.biasc.scalard.empty"
    assert columns["name_ends"] == [8, 14, 22, 29]
    assert columns["shape"] == [8, 6, 5, 0, 4]
    assert columns["chunk_ends"] == [4, 6, 7, 7]
    assert columns["file"] == [0, 1, 2, 3, 0, -1, 1]
    assert parse_index(write_as_a_stranger(header, columns), key=KEY) == an_index()


def test_the_bytes_do_not_depend_on_the_order_of_the_input():
    tensors = {
        f"t{place}": ("F32", (8, 6), grid_chunks((8, 6), (2, 2), begin=4096 + 48 * place)) for place in range(20)
    }
    data = encode_index(build_index(shard_names(4), tensors))
    rng = random.Random(4)
    shuffled = list(tensors.items())
    rng.shuffle(shuffled)
    again = {name: (dtype, list(shape), rng.sample(chunks, 4)) for name, (dtype, shape, chunks) in shuffled}

    assert encode_index(build_index(shard_names(4), again)) == data


def test_an_index_of_nothing_is_possible():
    index = build_index([], {})
    found = parse_index(encode_index(index), key=KEY)

    assert (len(found), found.num_chunks, found.files, found.file_extents()) == (0, 0, (), [])
    assert found == index
    assert found != "index"


def test_names_are_sorted_by_their_bytes():
    names = ["z", "é", "😀", "\uffee", "a", "Z"]
    index = build_index(
        shard_names(1), {name: ("U8", (1,), [Chunk((0,), (1,), 0, 4096 + place)]) for place, name in enumerate(names)}
    )

    assert list(index.names()) == sorted(names, key=str.encode)
    assert parse_index(encode_index(index), key=KEY) == index


PINWHEEL = [
    Chunk((0, 0), (2, 1), 0, 4096),
    Chunk((0, 1), (1, 2), 1, 4096),
    Chunk((1, 2), (2, 1), 2, 4096),
    Chunk((2, 0), (1, 2), 3, 4096),
    Chunk((1, 1), (1, 1), 4, 4096),
]


def test_boxes_that_no_straight_cut_separates_are_accepted():
    """A pinwheel: four arms around a centre."""
    index = build_index(shard_names(5), {"w": ("F32", (3, 3), PINWHEEL)})

    assert index.chunks("w")[0] == PINWHEEL[0]


def nested_pinwheels(levels: int) -> tuple[tuple[int, int], list[Chunk]]:
    """A shape and boxes that cover it: rings of four arms around each other, which no straight cut separates."""
    side = 2 * levels + 1
    boxes = [((levels, levels), (1, 1))]
    for level in range(levels):
        length = side - 2 * level - 1
        boxes += [
            ((level, level), (1, length)),
            ((level, level + length), (length, 1)),
            ((level + length, level + 1), (1, length)),
            ((level + 1, level), (length, 1)),
        ]
    return (side, side), [Chunk(offset, size, file, 4096) for file, (offset, size) in enumerate(boxes)]


def test_at_most_64_interlocked_boxes_are_accepted():
    shape, chunks = nested_pinwheels(15)
    assert build_index(shard_names(61), {"w": ("U8", shape, chunks)}).num_chunks == 61

    shape, chunks = nested_pinwheels(16)
    with pytest.raises(ConfigError, match="at most 64 interlocked"):
        build_index(shard_names(65), {"w": ("U8", shape, chunks)})


@pytest.mark.parametrize(
    ("shape", "chunks", "found"),
    [
        ((4,), [Chunk((0,), (2,), 0, 4096)], "2 elements"),
        ((4,), [], "0 elements"),
        ((), [], "0 elements"),
        ((4,), [Chunk((0,), (3,), 0, 4096), Chunk((2,), (2,), 1, 4096)], "overlap"),
        ((4,), [Chunk((0,), (4,), 0, 4096), Chunk((0,), (4,), 1, 4096)], "overlap"),
        ((), [Chunk((), (), 0, 4096), Chunk((), (), 1, 4096)], "overlap"),
        ((2, 2), [Chunk((0, 0), (2, 1), 0, 4096), Chunk((1, 0), (1, 2), 1, 4096)], "overlap"),
        ((3, 3), [*PINWHEEL[:4], Chunk((1, 0), (1, 2), 4, 4096)], "overlap"),
        ((3, 3), PINWHEEL[:4], "8 elements"),
        ((4,), [Chunk((0,), (5,), 0, 4096)], "size 5"),
        ((4,), [Chunk((-1,), (5,), 0, 4096)], "offset -1"),
        ((4,), [Chunk((2**62,), (4,), 0, 4096)], "offset"),
        ((4,), [Chunk((0,), (-4,), 0, 4096)], "size -4"),
        ((4,), [Chunk((0,), (2**63 - 1,), 0, 4096)], "size"),
        ((4,), [Chunk((0,), (2,), 0, 4096), Chunk((2,), (2,), 0, 5000)], "two"),
        ((4,), [Chunk((0,), (4,), 9, 4096)], "file 9"),
        ((4,), [Chunk((0,), (4,), -1, 0)], "file -1"),
        ((4,), [Chunk((0,), (4,), 0, 4096), Chunk((0,), (0,), 0, 0)], "file 0"),
        ((4,), [Chunk((0,), (4,), 0, 2**63)], "begin"),
        ((4,), [Chunk((0,), (4,), 0, 2**62 - 1)], "begin"),
        ((4,), [Chunk((0,), (4,), 2**31, 0)], "does not fit"),
        ((4,), [Chunk((0,), (4,), 0, -1)], "does not fit"),
        ((4,), [Chunk((0, 0), (4, 1), 0, 4096)], "1 dimensions"),
        ((-4,), [Chunk((0,), (4,), 0, 4096)], "-4"),
        ((2**32, 2**31), [Chunk((0, 0), (2**32, 2**31), 0, 4096)], "shape"),
        ((2**62,) * 20, [], "shape"),
        ((1,) * 65, [], "dimensions"),
    ],
)
def test_a_plan_that_does_not_store_every_element_exactly_once_is_refused(shape, chunks, found):
    with pytest.raises(ConfigError) as caught:
        build_index(
            shard_names(5), {"a": ("F32", (1,), [Chunk((0,), (1,), 4, 9000)]), "model.w": ("F32", shape, chunks)}
        )

    assert found in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_of_two_tensors_may_not_overlap():
    tensors = {"a": ("F32", (2,), [Chunk((0,), (2,), 0, 4096)]), "b": ("F32", (2,), [Chunk((0,), (2,), 0, 4103)])}
    with pytest.raises(ConfigError, match=r"Layout of b.*4103"):
        build_index(shard_names(1), tensors)


@pytest.mark.parametrize(
    ("files", "tensors"),
    [
        (["../x.safetensors"], {}),
        (["x.bin"], {}),
        (["a.safetensors", "a.safetensors"], {}),
        ([], {"a\0": ("F32", (0,), [])}),
        ([], {"\ud800": ("F32", (0,), [])}),
        ([], {"a": ("C128", (0,), [])}),
    ],
)
def test_files_names_and_dtypes_that_cannot_be_stored_are_refused(files, tensors):
    with pytest.raises(ConfigError):
        build_index(files, tensors)


def changed(column, place, value):
    def change(header, columns):
        columns[column][place] = value

    return change


def cut(column):
    def change(header, columns):
        columns[column].pop()

    return change


def with_header(**changes):
    def change(header, columns):
        header |= changes

    return change


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (changed("names", 0, 0), "column names"),
        (changed("names", 0, 0xFF), "column names"),
        (changed("names", 0, ord("c")), "column names"),
        (changed("name_ends", 0, 2**63), "column name_ends"),
        (changed("name_ends", -1, 2**64 - 1), "column name_ends"),
        (changed("name_ends", 0, 0), "column names"),
        (changed("name_ends", 1, 3), "column name_ends"),
        (changed("chunk_ends", 0, 5), "column offsets"),
        (changed("chunk_ends", 1, 3), "column chunk_ends"),
        (changed("chunk_ends", -1, 2**40), "column chunk_ends"),
        (changed("dtype", 0, 200), "column dtype"),
        (changed("ndim", 0, 3), "column ndim"),
        (changed("ndim", 0, 255), "column ndim"),
        (changed("shape", 0, -8), "a.weight"),
        (changed("shape", 0, 9), "a.weight"),
        (changed("shape", 0, 2**62), "a.weight"),
        (changed("file", 0, 1), "a.weight"),
        (changed("file", 0, 4), "a.weight"),
        (changed("file", 0, -1), "a.weight"),
        (changed("file", 0, -(2**31)), "a.weight"),
        (changed("file", 5, 0), "b.bias"),
        (changed("begin", 0, 2**64 - 1), "a.weight"),
        (changed("begin", 4, 4100), "b.bias"),
        (changed("offsets", 0, 1), "a.weight"),
        (changed("offsets", 0, 2**63 - 1), "a.weight"),
        (changed("sizes", 0, 3), "a.weight"),
        (changed("sizes", 0, 5), "b.bias"),
        (changed("sizes", 0, -(2**63)), "a.weight"),
        (cut("name_ends"), "column name_ends"),
        (cut("shape"), "column ndim"),
        (cut("file"), "column file"),
        (cut("begin"), "column begin"),
        (cut("offsets"), "column offsets"),
        (cut("sizes"), "column sizes"),
        (with_header(tensors=2**40), "header.tensors"),
        (with_header(tensors=3), "column name_ends"),
        (with_header(chunks=-1), "header.chunks"),
        (with_header(chunks=2**24), "column file"),
        (with_header(files=["../../x.safetensors"]), "files[0]"),
        (with_header(files=["/x.safetensors"]), "files[0]"),
        (with_header(files=["x\0.safetensors"]), "files[0]"),
        (with_header(files=[1]), "files[0]"),
        (with_header(files=["x.safetensors"] * 2), "files"),
        (with_header(files={}), "header.files"),
        (with_header(dtypes=["F32", "F4", "I64"]), "header.dtypes"),
        (with_header(dtypes=["F32", "F32"]), "header.dtypes"),
        (with_header(dtypes=["F64"]), "column dtype"),
        (with_header(more=1), "header.more"),
    ],
)
def test_a_forged_column_or_header_is_named(change, field):
    header, columns = read_as_a_stranger(encode_index(an_index()))
    change(header, columns)
    with pytest.raises(CorruptCheckpointError) as caught:
        parse_index(write_as_a_stranger(header, columns), key=KEY)

    assert (caught.value.key, caught.value.field) == (KEY, field)


def test_versions_are_told_from_damage():
    header, columns = read_as_a_stranger(encode_index(an_index()))
    newer_minor = write_as_a_stranger(header | {"added": [1]}, columns, minor=3)
    body = bytearray(encode_index(an_index())[:-8])
    struct.pack_into("<H", body, 8, 2)
    with pytest.raises(FormatVersionError, match="Upgrade"):
        parse_index(forge_trailer(bytes(body)), key=KEY)
    struct.pack_into("<H", body, 8, 0)
    with pytest.raises(CorruptCheckpointError, match="version"):
        parse_index(forge_trailer(bytes(body)), key=KEY)

    assert parse_index(newer_minor, key=KEY) == an_index()


def test_bytes_between_the_columns_are_zero():
    body = bytearray(unpack_index(encode_index(an_index())))
    (header_bytes,) = struct.unpack_from("<I", body, 12)
    header = json.loads(body[16 : 16 + header_bytes])
    _, _, begin, count = header["columns"][0]
    body[begin + count] = 1
    with pytest.raises(CorruptCheckpointError, match="name_ends: expected zeros"):
        parse_index(pack_index(bytes(body)), key=KEY)


def stream_of(index_file: bytes) -> bytes:
    return index_file[24:-8]


@pytest.mark.parametrize(
    ("content_bytes", "stream", "found"),
    [
        (-1, lambda good: good, "or more data"),
        (+1, lambda good: good, "or more data"),
        (0, lambda good: good[:-1], "or more data"),
        (0, lambda good: good + b"x", "or more data"),
        (0, lambda good: good + good, "or more data"),
        (0, lambda good: b"\xff" + good[1:], "header"),
        (2**62, lambda good: good, str(2**62)),
    ],
)
def test_a_content_of_another_length_or_a_broken_stream_is_refused(content_bytes, stream, found):
    good = encode_index(an_index())
    (stated,) = struct.unpack_from("<Q", good, 16)
    body = good[:16] + struct.pack("<Q", min(stated + content_bytes, 2**62)) + stream(stream_of(good))
    with pytest.raises(CorruptCheckpointError, match="content") as caught:
        parse_index(forge_trailer(body), key=KEY)
    assert found in str(caught.value.found)


def test_an_index_of_many_names_shrinks_to_a_small_part():
    tensors = {f"model.layers.{n}.weight": ("F32", (256,), Grid((), (0,))) for n in range(5000)}
    data = encode_index(build_index(["rank00000.safetensors"], tensors, data_begins=[4096]))

    assert len(data) < 12 * len(tensors)
    assert len(unpack_index(data)) > 40 * len(tensors)


def seconds_of(action) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def columns_of(shape, parts, tensors) -> bytes:
    """An index file with `tensors` tensors of this grid, made from columns so that the test itself is quick."""
    steps = np.array(shape) // np.array(parts)
    offsets = (
        np.stack(np.meshgrid(*[np.arange(count) for count in parts], indexing="ij"), -1).reshape(-1, len(shape)) * steps
    )
    num = len(offsets)
    names = [f"t{place:06d}".encode() for place in range(tensors)]
    nbytes = int(np.prod(steps)) * 4
    columns = {
        "names": list(b"".join(names)),
        "name_ends": (np.arange(tensors) + 1) * 7,
        "dtype": np.zeros(tensors),
        "ndim": np.full(tensors, len(shape)),
        "shape": np.tile(shape, tensors),
        "chunk_ends": (np.arange(tensors) + 1) * num,
        "file": np.tile(np.arange(num), tensors),
        "begin": 4096 + np.repeat(np.arange(tensors), num) * nbytes,
        "offsets": np.tile(offsets, (tensors, 1)).reshape(-1),
        "sizes": np.tile(steps, tensors * num),
        "grid": np.full(tensors, -1),
        **NO_GRIDS,
    }
    files = [f"r{place}.safetensors" for place in range(num)]
    return write_as_a_stranger(
        {"tensors": tensors, "chunks": num * tensors, "grids": 0, "files": files, "dtypes": ["F32"]}, columns
    )


@pytest.mark.parametrize(
    ("shape", "parts", "tensors"),
    [
        ((200_000, 8), (200_000, 1), 1),
        ((8, 200_000), (1, 200_000), 1),
        ((2, 200_000, 2), (1, 200_000, 1), 1),
        ((1000, 400), (500, 400), 1),
        ((64, 4), (64, 1), 3000),
        ((64, 64), (8, 8), 3000),
    ],
)
def test_regular_sharding_is_checked_without_a_quadratic_step(shape, parts, tensors):
    """200,000 chunks: all pairs of them would take hours."""
    data = columns_of(shape, parts, tensors)

    assert seconds_of(lambda: parse_index(data, key=KEY)) < 5


@pytest.mark.parametrize("kind", ["all equal", "staircase", "peeling"])
def test_hostile_boxes_are_refused_in_bounded_time(kind):
    """Boxes made so that neither sorting nor cutting settles them."""
    num = 100_000
    place = np.arange(num)
    if kind == "all equal":
        offsets, sizes = np.zeros((num, 2)), np.ones((num, 2)) * num
    elif kind == "staircase":
        # Every box meets its successors along one dimension only until the last, which meets them all.
        offsets, sizes = np.stack([place, place], 1), np.stack([num - place, np.ones(num)], 1)
        sizes[0] = (num, 2)
    else:
        # A spiral: each round of cuts peels off a few boxes.
        offsets, sizes = np.stack([place, place], 1), np.stack([np.ones(num), num - place], 1)
        sizes[-1] = (1, 1)
        offsets[num // 2] = offsets[num // 2 - 1]
    data = write_as_a_stranger(
        {"tensors": 1, "chunks": num, "grids": 0, "files": [f"r{n}.safetensors" for n in range(num)], "dtypes": ["U8"]},
        {
            "names": list(b"w"), "name_ends": [1], "dtype": [0], "ndim": [2], "shape": [num, num], "chunk_ends": [num],
            "file": place, "begin": np.full(num, 4096), "offsets": offsets.reshape(-1), "sizes": sizes.reshape(-1),
            "grid": [-1], **NO_GRIDS,
        },
    )  # fmt: skip

    def parse():
        with pytest.raises(CorruptCheckpointError) as caught:
            parse_index(data, key=KEY)
        assert caught.value.field == "w"

    assert seconds_of(parse) < 10


def brute_force(shape, boxes) -> bool:
    """Whether the boxes cover the shape exactly once, by counting."""
    counts = np.zeros(shape, dtype=np.int64)
    for offset, size in boxes:
        counts[tuple(slice(a, a + b) for a, b in zip(offset, size, strict=True))] += 1
    return bool((counts == 1).all())


@pytest.mark.parametrize("seed", range(6))
def test_coverage_agrees_with_counting_every_element(seed):
    """Random cuts of random boxes, half of them spoiled, against the definition."""
    rng = random.Random(seed)
    verdicts = []
    for _ in range(60):
        dimensions = rng.randrange(1, 4)
        shape = tuple(rng.randrange(1, 7) for _ in range(dimensions))
        boxes = [((0,) * dimensions, shape)]
        for _ in range(rng.randrange(8)):
            offset, size = boxes.pop(rng.randrange(len(boxes)))
            axis = rng.randrange(dimensions)
            at = rng.randrange(size[axis] + 1)
            low = tuple(at if place == axis else length for place, length in enumerate(size))
            high = tuple(size[axis] - at if place == axis else length for place, length in enumerate(size))
            boxes += [(offset, low), (tuple(o + at * (p == axis) for p, o in enumerate(offset)), high)]
        if rng.random() < 0.6:
            offset, size = boxes.pop(rng.randrange(len(boxes)))
            axis = rng.randrange(dimensions)
            by = rng.choice((-1, 1))
            if rng.random() < 0.5:
                offset = tuple(value + by * (place == axis) for place, value in enumerate(offset))
            else:
                size = tuple(value + by * (place == axis) for place, value in enumerate(size))
            if offset[axis] >= 0 <= size[axis] and offset[axis] + size[axis] <= shape[axis]:
                boxes.append((offset, size))
        chunks = [
            Chunk(offset, size, *((number, 4096) if np.prod(size) else (-1, 0)))
            for number, (offset, size) in enumerate(boxes)
        ]
        expected = brute_force(shape, boxes)
        verdicts.append(expected)
        try:
            index = build_index(shard_names(len(boxes)), {"w": ("F32", shape, chunks)})
            assert expected
            assert isinstance(index, LayoutIndex)
            assert index.chunks("w") == sorted(chunks, key=lambda chunk: (chunk.offsets, chunk.sizes))
        except ConfigError:
            assert not expected

    assert 5 < sum(verdicts) < 55
