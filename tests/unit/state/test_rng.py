from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from dckpt.errors import ConfigError, CorruptCheckpointError
from dckpt.format.streams import rekey_stream, run_seed_of, stream_digest, stream_key, torch_cpu_state
from dckpt.format.values import decode_value, dump_json, encode_value, load_json
from dckpt.planning.streams import classify_streams, plan_rng
from dckpt.state.rng import available_streams, capture_rng, restore_rng

BIT_GENERATORS = [np.random.MT19937, np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64]


@pytest.fixture(autouse=True)
def _leave_the_streams_as_they_were():
    held = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(held[0])
    np.random.set_state(held[1])
    torch.set_rng_state(held[2])


def through_json(streams):
    return load_json(dump_json(streams), key="manifest.json", limit=2**22)


def draw(generators=()):
    found = [random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn())]
    found += torch.rand(3).tolist() + torch.randn(1).tolist()
    for generator in generators:
        is_torch = isinstance(generator, torch.Generator)
        found.append(torch.rand(1, generator=generator).item() if is_torch else float(generator.random()))
    return found


def words_of(state: torch.Tensor) -> np.ndarray:
    return np.frombuffer(state.numpy().tobytes()[24 : 24 + 624 * 8], dtype="<u8")


def test_every_stream_continues_exactly_in_the_middle_of_its_numbers():
    generators = {kind.__name__: np.random.Generator(kind(3)) for kind in BIT_GENERATORS}
    generators["t"] = torch.Generator().manual_seed(2**63 + 5)
    draw(generators.values())
    streams = through_json(capture_rng(generators))
    expected = [draw(generators.values()) for _ in range(3)]
    others = {kind.__name__: np.random.Generator(kind(9)) for kind in BIT_GENERATORS} | {"t": torch.Generator()}
    restore_rng(streams, others)
    assert [draw(others.values()) for _ in range(3)] == expected


def test_capture_advances_nothing():
    generators = {"n": np.random.default_rng(0), "t": torch.Generator()}
    first = capture_rng(generators)
    assert capture_rng(generators) == first


def test_a_seeded_torch_state_is_the_documented_layout_and_numpys_generator():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    raw = state.numpy().tobytes()
    assert len(raw) == 5056
    assert int.from_bytes(raw[:8], "little") == 5
    assert np.frombuffer(raw[8:24], "<i4").tolist() == [1, 1, 0, 0]  # left, seeded, next
    legacy = np.random.RandomState(5)
    assert np.array_equal(words_of(state), legacy.get_state()[1].astype("<u8"))
    # torch's float32 takes the low 24 bits of each word that numpy's generator gives.
    words = legacy.randint(0, 2**32, size=4, dtype=np.uint64)
    assert torch.rand(4).tolist() == [float(np.float32((int(w) & 0xFFFFFF) / 2**24)) for w in words]


def test_a_built_state_equals_the_one_that_torch_seeds():
    torch.manual_seed(11)
    words = np.random.RandomState(11).get_state()[1]
    assert torch_cpu_state(words, seed=11) == torch.get_rng_state().numpy().tobytes()


def test_a_stream_that_this_process_lacks_is_refused_before_any_is_touched():
    streams = capture_rng({"g": np.random.default_rng(0)})
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with pytest.raises(ConfigError, match=r"random streams \['generator:g'\]"):
        restore_rng(streams, {})
    with pytest.raises(ConfigError, match="saved as numpy"):
        restore_rng(streams, {"g": torch.Generator()})
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("stream", ["python", "numpy", "torch", "generator:g", "generator:t"])
@pytest.mark.parametrize("damage", ["short", "type", "gone", "kind"])
def test_a_damaged_state_is_refused_before_any_is_touched(stream, damage):
    generators = {"g": np.random.default_rng(0), "t": torch.Generator()}
    streams = capture_rng(generators)
    record = decode_value(streams[stream], key="k", path="p")
    name = "words" if stream == "python" else "state"
    match damage:
        case "short":
            record[name] = record[name][:-9] if isinstance(record[name], bytes) else {"bit_generator": "PCG64"}
        case "type":
            record[name] = 3
        case "gone":
            del record[name]
        case "kind":
            record["kind"] = "dice"
    before = capture_rng(generators)
    with pytest.raises((CorruptCheckpointError, ConfigError), match=stream):
        restore_rng(streams | {stream: encode_value(record, path="p")}, generators)
    assert capture_rng(generators) == before


def test_digests_are_equal_exactly_for_equal_states():
    torch.manual_seed(1)
    first = capture_rng({})
    torch.rand(1)
    second = capture_rng({})
    assert stream_digest(first["torch"]) != stream_digest(second["torch"])
    assert stream_digest(first["python"]) == stream_digest(through_json(second)["python"])
    assert len(stream_digest(first["torch"])) == 32


def test_streams_are_classified_by_the_axes_along_which_they_vary():
    places = [{"dp": dp, "tp": tp} for dp, tp in itertools.product(range(3), range(2))]
    digests = [
        {"same": "x", "data": f"d{p['dp']}", "model": f"t{p['tp']}", "all": f"{p}"}
        | ({"some": "y"} if p["dp"] == 0 else {})
        for p in places
    ]
    assert classify_streams(digests, places) == {
        "same": (),
        "data": ("dp",),
        "model": ("tp",),
        "all": ("dp", "tp"),
        "some": ("dp",),
    }
    assert classify_streams([{"s": "a"}, {"s": "b"}]) == {"s": ("rank",)}
    assert classify_streams([{"s": "a"}, {"s": "a"}], []) == {"s": ()}
    with pytest.raises(ConfigError, match="2 ranks gave digests, 6"):
        classify_streams(digests[:2], places)


def test_the_plan_is_exact_on_the_same_mesh_and_copies_or_rekeys_on_another():
    saved = {"python": (), "torch": ("dp",), "cuda": ("dp",), "cuda:3": (), "generator:old": ()}
    begun = {"epoch.python": (), "epoch.torch": ("dp",), "epoch.generator:old": ("dp",)}
    live = ["python", "torch", "cuda", "cuda:0", "generator:new"]
    assert plan_rng(saved, same_mesh=True, available=live) == {
        "python": "exact", "torch": "exact", "cuda": "exact", "cuda:3": "drop", "generator:old": "drop",
        "generator:new": "fresh",
    }  # fmt: skip
    assert plan_rng(saved, same_mesh=False, available=live) == {
        "python": "copy", "torch": "rekey", "cuda": "rekey", "cuda:3": "drop", "generator:old": "drop",
        "generator:new": "fresh",
    }  # fmt: skip
    live += [f"epoch.{stream}" for stream in live]
    actions = [plan_rng(begun, same_mesh=same, available=live) for same in (True, False)]
    assert {name: how for name, how in actions[0].items() if name.startswith("epoch.")} == {
        "epoch.python": "exact", "epoch.torch": "exact", "epoch.generator:old": "drop",
    }  # fmt: skip
    assert {name: how for name, how in actions[1].items() if name.startswith("epoch.")} == {
        "epoch.python": "copy", "epoch.torch": "void", "epoch.generator:old": "drop",
    }  # fmt: skip


def test_the_run_seed_is_the_first_seed_of_torchs_cpu_stream():
    torch.manual_seed(2**40 + 7)
    torch.rand(1000)
    assert run_seed_of(capture_rng({})) == 2**40 + 7
    with pytest.raises(CorruptCheckpointError, match="CPU stream"):
        run_seed_of({})


PLACE = {"run_seed": 42, "generation": 3, "step": 1200, "coordinates": {"dp": 5, "cp": 0}}


def test_the_key_is_the_documented_text_and_never_changes():
    key = stream_key("torch", **PLACE)
    assert key.hex() == "b6cc07801cf0d8e62bce83191894dd5ce08243c31fe550634d13c25c4a331a12"
    assert stream_key("torch", **PLACE | {"coordinates": {"cp": 0, "dp": 5}}) == key


@pytest.mark.parametrize(
    "change", [{"run_seed": 43}, {"generation": 4}, {"step": 1201}, {"coordinates": {"dp": 4, "cp": 0}}]
)
def test_every_part_of_the_key_changes_every_stream(change):
    for stream in ("python", "numpy", "torch", "cuda"):
        first, second = (rekey_stream(stream, **place) for place in (PLACE, PLACE | change))
        assert stream_digest(first) != stream_digest(second)
        assert first == rekey_stream(stream, **PLACE)


def test_rekeyed_streams_are_valid_states_with_the_documented_fields():
    generators = {"n": np.random.Generator(np.random.PCG64(0)), "s": np.random.Generator(np.random.SFC64(0)),
                  "t": torch.Generator()}  # fmt: skip
    saved = capture_rng(generators)
    streams = {name: rekey_stream(name, **PLACE, like=saved[name]) for name in saved}
    restore_rng(through_json(streams), generators)
    key = stream_key("torch", **PLACE)
    raw = torch.get_rng_state().numpy().tobytes()
    assert torch.initial_seed() == int.from_bytes(key[:8], "little")
    assert words_of(torch.get_rng_state())[0] == 0x80000000
    expected = np.random.SeedSequence(int.from_bytes(key, "big")).generate_state(624, np.uint32)
    assert np.array_equal(words_of(torch.get_rng_state())[1:], expected[1:])
    assert np.frombuffer(raw[8:24], "<i4").tolist() == [1, 1, 0, 0]
    assert random.getstate() == random.Random(int.from_bytes(stream_key("python", **PLACE), "big")).getstate()
    assert np.random.get_state()[1][0] == 0x80000000
    assert np.random.get_state()[2] == 624
    number = int.from_bytes(stream_key("generator:n", **PLACE), "big")
    assert generators["n"].bit_generator.state == np.random.PCG64(number).state
    values = draw(generators.values())
    assert len(set(values)) == len(values)


def test_a_rekeyed_torch_stream_gives_numpys_numbers_and_looks_uniform():
    restore_rng({"torch": rekey_stream("torch", **PLACE)})
    twin = np.random.RandomState()
    twin.set_state(("MT19937", words_of(torch.get_rng_state()).astype(np.uint32), 624))
    words = twin.randint(0, 2**32, size=4, dtype=np.uint64)
    sample = torch.rand(20_000)
    assert sample[:4].tolist() == [float(np.float32((int(w) & 0xFFFFFF) / 2**24)) for w in words]
    assert abs(sample.mean().item() - 0.5) < 0.01


def test_a_rekeyed_cuda_stream_is_a_seed_and_offset_zero():
    record = decode_value(rekey_stream("cuda", **PLACE), key="k", path="p")
    assert record["device"] == "cuda"
    assert record["state"] == stream_key("cuda", **PLACE)[:8] + bytes(8)


def test_a_generators_kind_must_be_known_to_rekey_it():
    with pytest.raises(ConfigError, match="pass like="):
        rekey_stream("generator:g", **PLACE)
    other = encode_value({"kind": "torch", "device": "xpu", "state": b""}, path="p")
    with pytest.raises(ConfigError, match="xpu"):
        rekey_stream("generator:g", **PLACE, like=other)
    odd = encode_value({"kind": "numpy", "state": {"bit_generator": "os"}}, path="p")
    with pytest.raises(CorruptCheckpointError, match="MT19937"):
        rekey_stream("generator:g", **PLACE, like=odd)


def test_streams_of_this_process_are_listed():
    assert available_streams({"g": None})[:3] == ["python", "numpy", "torch"]
    assert available_streams({"g": None})[-1] == "generator:g"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_streams_continue_exactly_and_the_current_device_has_one_name():
    torch.cuda.init()
    torch.cuda.manual_seed(3)
    own = torch.Generator("cuda").manual_seed(4)
    torch.rand(5, device="cuda"), torch.rand(5, device="cuda", generator=own)
    streams = through_json(capture_rng({"g": own}))
    assert {name for name in streams if name.startswith("cuda")} >= {"cuda"}
    expected = torch.rand(5, device="cuda"), torch.rand(5, device="cuda", generator=own)
    torch.rand(7, device="cuda")
    restore_rng(streams, {"g": own})
    again = torch.rand(5, device="cuda"), torch.rand(5, device="cuda", generator=own)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
    restore_rng({"cuda": rekey_stream("cuda", **PLACE)})
    assert torch.cuda.initial_seed() == int.from_bytes(stream_key("cuda", **PLACE)[:8], "little")
    assert stream_digest(capture_rng()["cuda"]) == stream_digest(rekey_stream("cuda", **PLACE))
