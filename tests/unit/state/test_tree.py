from __future__ import annotations

import io
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dckpt.errors import ConfigError
from dckpt.format.values import TensorRef, decode_value, dump_json, encode_value, load_json
from dckpt.state.tree import flatten, live_tensors, tensor_names, unflatten


def round_trip(value):
    flat = flatten(value, name="x", path="x")
    data = dump_json(encode_value(flat.tree, path="x"))
    decoded = decode_value(load_json(data, key="k", limit=2**20), key="k", path="x")
    return unflatten(decoded, lambda name: flat.tensors[name].clone())


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return type(b) is torch.Tensor and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, io.BytesIO):
        return a.getvalue() == b.getvalue()
    return a == b or (a != a and b != b)


def test_everything_a_state_dict_holds_comes_back_as_it_was():
    value = {
        0: torch.arange(3),
        "1": [torch.ones(2, dtype=torch.bfloat16), (1, -0.0, float("inf"), None, True)],
        "dtype": torch.float16,
        "size": torch.Size([2, 3]),
        "ordered": OrderedDict([("b", 1), ("a", torch.zeros(()))]),
        "counter": Counter({30: 1, 60: 2}),
        "sets": ({1, 2}, frozenset({"a"})),
        "big": 2**80,
        "raw": b"\x00\xff",
        "stream": io.BytesIO(b"te"),
        "array": np.arange(4, dtype=np.float32),
        ("tuple", 1): {"deep": [[torch.empty(0, 3)]]},
    }
    assert equal(round_trip(value), value)


TREES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=5).filter(lambda s: s.isprintable()),
        st.binary(max_size=5),
        st.integers(0, 3).map(lambda n: torch.arange(n)),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.integers(0, 9), st.sampled_from(["0", "a", "a.b", "$t"])), inner, max_size=3),
    ),
    max_leaves=12,
)


@settings(max_examples=80, deadline=None)
@given(TREES)
def test_any_nesting_comes_back_as_it_was(tree):
    assert equal(round_trip(tree), tree)


def test_tensors_are_named_by_their_path_detached_and_not_copied():
    weight = torch.ones(2, requires_grad=True)
    flat = flatten({"a": [weight]}, name="extra.k", path="extra.k")
    assert list(flat.tensors) == ["extra.k.a.0"]
    assert flat.tensors["extra.k.a.0"].data_ptr() == weight.data_ptr()
    assert not flat.tensors["extra.k.a.0"].requires_grad
    assert flat.tree == {"a": [TensorRef("extra.k.a.0")]}
    assert tensor_names(flat.tree) == ["extra.k.a.0"]
    assert live_tensors(weight, name="w", path="w").keys() == {"w"}


def test_keys_that_read_alike_get_different_names():
    flat = flatten(
        {1: torch.zeros(1), "1": torch.ones(1), "a.b": torch.ones(2), "a": {"b": torch.ones(3)}}, name="", path=""
    )
    assert list(flat.tensors) == ["1", "1~2", "a.b", "a.b~2"]


def test_a_value_that_cannot_be_stored_is_refused_with_its_path_and_remedy():
    flat = flatten({"hook": [print]}, name="x", path="x")
    with pytest.raises(ConfigError, match=r"x\.hook\[0\].*builtin"):
        encode_value(flat.tree, path="x")


def test_a_tree_that_holds_itself_is_refused():
    loop: list = []
    loop.append(loop)
    with pytest.raises(ConfigError, match="nested deeper"):
        flatten(loop, name="x", path="x")


def test_the_key_that_marks_a_stream_is_reserved():
    with pytest.raises(ConfigError, match="reserved"):
        flatten({"$BytesIO": b"1"}, name="x", path="x")


def test_a_dtype_that_this_torch_lacks_is_refused():
    decoded = decode_value({"$t": "dtype", "v": "float3"}, key="k", path="x")
    with pytest.raises(ConfigError, match="float3"):
        unflatten(decoded, lambda name: torch.empty(0))
    with pytest.raises(ConfigError, match="manual_seed"):
        unflatten(decode_value({"$t": "dtype", "v": "manual_seed"}, key="k", path="x"), lambda name: torch.empty(0))
