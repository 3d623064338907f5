"""Random records round-trip; randomly damaged files end in a typed error or, without a checksum, in an equal parse."""

import string
from datetime import timedelta

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from dckpt.errors import DckptError
from dckpt.format.checksum import BLOCK_BYTES, Sums, encode_sums, parse_sums
from dckpt.format.generation import Generation, Parent, encode_generation, parse_generation
from dckpt.format.index import Chunk, build_index, encode_index, parse_index
from dckpt.format.layout import checkpoint_name, index_file_name, shard_file_name, sums_file_bytes, sums_file_name
from dckpt.format.manifest import FileEntry, Manifest, Mesh, encode_manifest, parse_manifest
from dckpt.format.origin import Origin
from dckpt.format.sealed_json import dump_json, load_json
from dckpt.format.shard_file import DTYPES, ShardTensor, parse_shard_header, plan_shard_file
from dckpt.format.values import decode_value, encode_value
from tests.unit.format.builders import (
    a_generation,
    a_manifest,
    a_shard_plan,
    a_sums,
    an_index,
    forge_sealed,
    forge_trailer,
)
from tests.unit.format.builders import shard_names as names_of_shards

# Generous: two cores are shared with other work. A step of quadratic or unbounded time takes far longer.
fuzz = settings(max_examples=150, deadline=timedelta(seconds=3))

hex32 = st.text("0123456789abcdef", min_size=32, max_size=32)
hex64 = st.text("0123456789abcdef", min_size=64, max_size=64)
component = st.text(string.ascii_letters + string.digits + "_-", min_size=1, max_size=20)
name = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).filter(
    lambda text: text != "__metadata__"
)
names = st.lists(name, unique=True, max_size=4)
integer = st.integers(-(2**63) + 1, 2**63 - 1)
json_value = st.recursive(
    st.none() | st.booleans() | integer | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
hashable = st.none() | st.booleans() | st.integers() | st.text() | st.binary()
hashable = hashable | st.tuples(hashable, hashable) | st.frozensets(hashable, max_size=3)
python_value = st.recursive(
    hashable | st.floats(allow_nan=False) | st.integers(-(2**300), 2**300),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(hashable, inner, max_size=4)
        | st.tuples(inner, inner)
        | st.sets(hashable, max_size=3)
    ),
    max_leaves=12,
)


@st.composite
def origins(draw):
    return Origin(
        how=draw(st.sampled_from(["reshard", "export"])),
        run_id=draw(st.none() | component),
        checkpoint=draw(name),
        step=draw(st.none() | st.integers(0, 10**10 - 1)),
        micro_step=draw(st.integers(0, 999_999)),
        generation=draw(st.integers(0, 999_999)),
        manifest_sha256=draw(hex64),
        world_size=draw(st.integers(1, 10**6)),
        carried=tuple(draw(names)),
    )


@st.composite
def manifests(draw):
    world_size = draw(st.integers(1, 5))
    attempt = draw(hex32)
    is_of_run = draw(st.booleans())
    files = []
    for rank in range(world_size):
        for part in range(draw(st.integers(0, 2))):
            size, reused = draw(st.integers(0, 2**62 - 1)), draw(st.integers(0, 999_999)) if is_of_run else 0
            place = checkpoint_name(draw(st.integers(0, 3)), 1) if reused and draw(st.booleans()) else None
            path = f"{draw(hex32) if place else attempt}/{shard_file_name(rank, part)}"
            files.append(FileEntry(path, size, draw(hex32), "shard", rank, place, reused))
            sums_bytes = sums_file_bytes(size, draw(st.integers(0, 2**22)))
            files.append(FileEntry(sums_file_name(path), sums_bytes, draw(hex32), "sums", rank, place))
    digest = draw(hex32)
    files.append(FileEntry(index_file_name(digest), draw(st.integers(0, 2**40)), digest, "index", None))
    has_mesh = draw(st.booleans())
    return Manifest(
        run_id=draw(component) if is_of_run else None,
        step=draw(st.integers(0, 10**10 - 1)) if is_of_run else draw(st.none() | st.integers(0, 100)),
        micro_step=draw(st.integers(0, 999_999)),
        generation=draw(st.integers(2, 999_999)) if is_of_run else 0,  # above those of the references
        attempt=attempt,
        created_unix_s=draw(st.floats(0, 1e12)),
        world_size=world_size,
        mesh=Mesh(("a", "b"), (world_size, 1)) if has_mesh else None,
        coordinates=tuple((rank, 0) for rank in range(world_size)) if has_mesh else None,
        parts=tuple(draw(names)),
        values=draw(st.dictionaries(name, json_value, max_size=3)),
        planner_data=draw(json_value),
        rank_tensors=tuple(draw(names)),
        rank_values=tuple(draw(names)),
        aliases=draw(st.dictionaries(name, st.text(), max_size=3)),
        rng=draw(st.dictionaries(name, names.map(tuple), max_size=3)),
        facts=draw(st.dictionaries(name, json_value, max_size=3)),
        metrics=draw(st.dictionaries(name, st.floats(allow_nan=False), max_size=3)),
        writer=draw(st.dictionaries(name, st.text(), max_size=3)),
        lineage=draw(st.none() | origins()),
        files=tuple(draw(st.permutations(files))),
    )


@st.composite
def generations(draw):
    number = draw(st.integers(1, 999_999))
    parent = None
    if number > 1 and draw(st.booleans()):
        step, micro_step, of = (
            draw(st.integers(0, 10**10 - 1)),
            draw(st.integers(0, 9)),
            draw(st.integers(1, number - 1)),
        )
        parent = Parent(checkpoint_name(step, of, micro_step), step, micro_step, of, draw(hex64))
    return Generation(
        number=number,
        run_id=draw(component),
        parent=parent,
        reason=draw(st.sampled_from(["start", "resume", "walk-back", "rollback", "load", "leg", "repair", "reshard"])),
        world_size=draw(st.integers(1, 10**6)),
        created_unix_s=draw(st.floats(0, 1e12)),
        nonce=draw(component),
    )


@st.composite
def shard_tensors(draw):
    shape = draw(st.lists(st.integers(1, 9), max_size=4))
    offsets = draw(st.lists(st.integers(0, 2**40), min_size=len(shape), max_size=len(shape)))
    return ShardTensor(draw(name), draw(st.sampled_from(sorted(DTYPES))), tuple(shape), tuple(offsets))


@st.composite
def indexes(draw):
    """Tensors cut at random, each chunk in a file of its own."""
    tensors = {}
    begins = [4096] * 9
    for tensor in draw(st.lists(name, unique=True, max_size=5)):
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
        boxes = [((0,) * len(shape), shape)]
        for _ in range(draw(st.integers(0, 8)) if shape else 0):
            offset, size = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
            axis = draw(st.integers(0, len(shape) - 1))
            at = draw(st.integers(0, size[axis]))
            boxes.append((offset, (*size[:axis], at, *size[axis + 1 :])))
            moved = (*offset[:axis], offset[axis] + at, *offset[axis + 1 :])
            boxes.append((moved, (*size[:axis], size[axis] - at, *size[axis + 1 :])))
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        chunks = []
        for file, (offset, size) in enumerate(boxes):
            nbytes = int(np.prod(size, dtype=np.int64)) * DTYPES[dtype]
            chunks.append(Chunk(offset, size, file, begins[file]) if nbytes else Chunk(offset, size, -1, 0))
            begins[file] += nbytes
        tensors[tensor] = (dtype, shape, chunks)
    return build_index(names_of_shards(9), tensors), tensors


@fuzz
@given(manifests())
def test_manifests_round_trip(manifest):
    assert parse_manifest(encode_manifest(manifest), key="k") == manifest


@fuzz
@given(generations())
def test_generations_round_trip(generation):
    assert parse_generation(encode_generation(generation), key="k") == generation


@fuzz
@given(st.integers(0, 20 * BLOCK_BYTES), hex32, st.lists(st.integers(0, 2**128 - 1)), st.randoms())
def test_sums_round_trip(size, digest, fingerprints, rng):
    blocks = np.array([rng.getrandbits(64) for _ in range(-(-size // BLOCK_BYTES))], dtype=np.uint64)
    sums = Sums(size, digest, blocks, tuple(fingerprints))

    assert parse_sums(encode_sums(sums), key="k") == sums


@fuzz
@given(indexes())
def test_indexes_round_trip(drawn):
    index, tensors = drawn
    found = parse_index(encode_index(index), key="k")

    assert found == index
    assert set(found.names()) == set(tensors)
    for tensor, (dtype, shape, chunks) in tensors.items():
        meta = found.meta(tensor)
        assert (meta.dtype, meta.shape) == (dtype, shape)
        assert sorted(found.chunks(tensor), key=repr) == sorted(chunks, key=repr)


@fuzz
@given(st.lists(shard_tensors(), unique_by=lambda tensor: tensor.name, max_size=6))
def test_shard_headers_round_trip(tensors):
    plan = plan_shard_file("rank00000.safetensors", tensors)
    found = parse_shard_header(plan.header, file_bytes=plan.size, key="k")

    assert (found.tensors, found.begins, found.data_begin) == (plan.tensors, plan.begins, len(plan.header))


@fuzz
@given(python_value)
def test_values_round_trip(value):
    found = decode_value(load_json(dump_json(encode_value(value, path="x")), key="k", limit=2**20), key="k", path="x")

    assert found == value
    assert repr(type(found)) == repr(type(value))


@fuzz
@given(json_value)
def test_decoding_any_json_gives_a_value_or_a_typed_error(found):
    decode_or_refuse(found)


TAGS = (
    "tuple", "dict", "set", "frozenset", "Counter", "OrderedDict", "bytes", "int", "float", "dtype", "tensor", "size",
    "ndarray", "npscalar", "other",
)  # fmt: skip
array_fields = {
    "dtype": st.sampled_from(["float32", "uint8", "object", "x"]),
    "shape": st.lists(integer, max_size=3) | json_value,
}


def tagged(inner):
    """Objects that look like tagged values and mostly are none."""
    content = inner | st.lists(st.lists(inner, min_size=2, max_size=2), max_size=3)
    return st.fixed_dictionaries({"$t": st.sampled_from(TAGS), "v": content}, optional=array_fields)


@fuzz
@given(st.recursive(json_value, tagged, max_leaves=8))
def test_decoding_forged_tags_gives_a_value_or_a_typed_error(found):
    decode_or_refuse(found)


def decode_or_refuse(found):
    """Any exception but a dckpt error fails the test."""
    try:
        value = decode_value(found, key="k", path="x")
    except DckptError:
        return
    encode_value(value, path="x")


FILES = {
    "manifest": (encode_manifest(a_manifest()), lambda data: parse_manifest(data, key="k")),
    "generation": (encode_generation(a_generation()), lambda data: parse_generation(data, key="k")),
    "sums": (encode_sums(a_sums()), lambda data: parse_sums(data, key="k")),
    "index": (encode_index(an_index()), lambda data: parse_index(data, key="k")),
}


@st.composite
def damages(draw, data):
    """`data` with flipped bytes, cut, or with a piece repeated or replaced."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(changed) - 1)))
        kind = draw(st.sampled_from(["flip", "set", "cut", "drop", "repeat", "insert"]))
        if kind == "flip" and changed:
            changed[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set":
            changed[place : place + 1] = draw(
                st.sampled_from([b"\0", b"\xff", b"9", b'"', b"[", b"{", b"-", b"\\", b","])
            )
        elif kind == "cut":
            del changed[place:]
        elif kind == "drop":
            del changed[place : place + draw(st.integers(1, 40))]
        elif kind == "repeat":
            changed[place:place] = changed[place : place + draw(st.integers(1, 40))]
        else:
            changed[place:place] = draw(st.binary(max_size=20))
    return bytes(changed)


@fuzz
@given(st.sampled_from(sorted(FILES)), st.data())
def test_a_damaged_file_with_a_checksum_is_always_refused(kind, data):
    content, parse = FILES[kind]
    damaged = data.draw(damages(content))
    if damaged != content:
        refused(parse, damaged)


def parsed_or_refused(parse):
    """What `parse` returns, or None after a dckpt error of one line; any other exception fails the test."""
    try:
        return parse()
    except DckptError as caught:
        message = str(caught)
    assert "\n" not in message
    return None


def refused(parse, data):
    """`parse` refuses `data` with a dckpt error."""
    try:
        parse(data)
    except DckptError:
        return
    raise AssertionError("damage was not found")


@settings(fuzz, max_examples=600)
@given(st.sampled_from(sorted(FILES)), st.data())
def test_a_forged_file_with_a_right_checksum_is_a_record_or_a_typed_error(kind, data):
    """Behind the checksum every other check stands alone: no other exception, and no long time."""
    content, parse = FILES[kind]
    if kind in ("manifest", "generation"):
        body = content[: content.index(b',"sha256":"')] + b"}"
        forged = forge_sealed(data.draw(damages(body)) or b"}")
    else:
        forged = forge_trailer(data.draw(damages(content[:-8])))
    parsed_or_refused(lambda: parse(forged))


PLAN = a_shard_plan()
# The part that says something; the rest of the header is padding.
TEXT = PLAN.header[8:].rstrip()


@settings(fuzz, max_examples=600)
@given(st.data())
def test_a_damaged_shard_header_is_refused_or_parses_to_something_that_fits_the_file(data):
    """It has no checksum of its own (the sums file has it): what it says must still be within the file."""
    text = data.draw(damages(TEXT))
    framed = len(text).to_bytes(8, "little") + text
    header = framed if data.draw(st.booleans()) else data.draw(damages(PLAN.header))
    file_bytes = len(header) + PLAN.size - len(PLAN.header)
    found = parsed_or_refused(lambda: parse_shard_header(header, file_bytes=file_bytes, key="k"))
    if found is None:
        return
    end = found.data_begin
    for tensor, begin in zip(found.tensors, found.begins, strict=True):
        assert begin == end
        end = begin + tensor.nbytes
    assert end == file_bytes


@fuzz
@given(st.binary(max_size=300), st.sampled_from([*sorted(FILES), "shard"]))
def test_noise_is_refused(noise, kind):
    if kind == "shard":
        refused(lambda data: parse_shard_header(data, file_bytes=len(data) + 1, key="k"), noise)
    else:
        refused(FILES[kind][1], noise)
