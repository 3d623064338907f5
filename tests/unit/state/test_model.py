from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from dckpt.errors import ConfigError, IncompatibleStateError
from dckpt.state.train_state import TrainState
from tests.unit.state.memory_checkpoint import load, read, same, save


class Zoo(nn.Module):
    """Every kind of parameter and buffer that a module may hold."""

    def __init__(self, seed=0):
        super().__init__()
        gen = torch.Generator().manual_seed(seed)
        self.scalar = nn.Parameter(torch.rand((), generator=gen))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.brain = nn.Parameter(torch.rand(3, generator=gen).bfloat16())
        self.strided = nn.Parameter(torch.rand(3, 4, generator=gen).t())
        self.register_buffer("flag", torch.tensor([seed == 0, True]))
        self.register_buffer("count", torch.tensor(seed, dtype=torch.int16))
        self.register_buffer("eight", torch.rand(4, generator=gen).to(torch.float8_e4m3fn))
        self.register_buffer("complex", torch.rand(2, dtype=torch.complex64, generator=gen))
        self.register_buffer("scratch", torch.full((2,), float(seed)), persistent=False)
        self.norm = nn.BatchNorm1d(3)
        self.register_parameter("none", None)
        self.register_buffer("nothing", None)


def test_parameters_and_persistent_buffers_of_every_dtype_come_back_bit_for_bit():
    source, target = TrainState(model=Zoo(0)), TrainState(model=Zoo(7))
    checkpoint = save(source)
    assert "model.scratch" not in checkpoint.stored
    assert checkpoint.stored["model.empty"].shape == (0, 3)
    load(target, checkpoint)
    same(source, target)
    assert target.model.scratch[0] == 7


def test_capture_hands_out_the_live_memory_and_does_not_copy_it():
    model = nn.Linear(2, 2)
    found = {item.name: item.tensor for item in TrainState(model=model).capture().tensors}
    assert found["model.weight"].data_ptr() == model.weight.data_ptr()
    assert not found["model.weight"].requires_grad


def test_a_plan_touches_nothing_live_and_reads_go_into_the_live_parameters():
    source, target = TrainState(model=Zoo(0)), TrainState(model=Zoo(7))
    checkpoint = save(source)
    before = {name: tensor.clone() for name, tensor in save(target).stored.items()}
    parameter = target.model.scalar
    plan = target.plan_restore(checkpoint)
    assert all(torch.equal(tensor.float(), before[name].float()) for name, tensor in save(target).stored.items()
               if tensor.dtype != torch.complex64)  # fmt: skip
    read(plan, checkpoint)
    plan.apply()
    assert target.model.scalar is parameter
    assert parameter.requires_grad


class Tied(nn.Module):
    def __init__(self, is_tied=True):
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        if is_tied:
            self.head.weight = self.embedding.weight


def test_a_tied_parameter_is_stored_once_and_stays_tied():
    source, target = TrainState(model=Tied()), TrainState(model=Tied())
    captured = source.capture()
    assert [item.name for item in captured.tensors] == ["model.embedding.weight"]
    assert captured.aliases == {"model.head.weight": "model.embedding.weight"}
    load(target, save(source))
    same(source, target)
    assert target.model.head.weight is target.model.embedding.weight


def test_an_untied_model_reads_both_names_of_a_tied_checkpoint():
    source, target = TrainState(model=Tied()), TrainState(model=Tied(is_tied=False))
    load(target, save(source))
    assert torch.equal(target.model.head.weight, source.model.embedding.weight)
    assert torch.equal(target.model.embedding.weight, source.model.embedding.weight)
    assert target.model.head.weight is not target.model.embedding.weight


def test_a_tied_model_refuses_an_untied_checkpoint():
    plan = TrainState(model=Tied()).plan_restore(save(TrainState(model=Tied(is_tied=False))))
    assert len(plan.differences) == 1
    assert plan.differences[0].startswith("model.head.weight: tied to model.embedding.weight in the model")


def test_ties_survive_when_the_canonical_name_changes():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 4, bias=False)
            self.embedding = nn.Embedding(4, 3)
            self.embedding.weight = self.head.weight

    source, target = TrainState(model=Tied()), TrainState(model=Reversed())
    load(target, save(source))
    assert torch.equal(target.model.head.weight, source.model.head.weight)


def test_every_difference_is_listed_at_once_and_nothing_is_restored():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 3)
            self.only_live = nn.Parameter(torch.ones(1))

    class Saved(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 4).half()
            self.only_saved = nn.Parameter(torch.ones(1))

    target = TrainState(model=Other())
    plan = target.plan_restore(save(TrainState(model=Saved())))
    assert plan.differences == [
        "model.only_live: in the model, not in the checkpoint",
        "model.a.weight: shape (4, 2) in the checkpoint, (3, 2) live",
        "model.a.bias: shape (4,) in the checkpoint, (3,) live",
        "model.only_saved: in the checkpoint, not in the model",
    ]
    with pytest.raises(IncompatibleStateError, match="in 4 places") as caught:
        plan.apply()
    assert caught.value.differences == plan.differences


def test_allowed_names_keep_the_live_value_and_drop_the_saved_one():
    source = TrainState(model=nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}))
    target = TrainState(model=nn.ModuleDict({"a": nn.Linear(2, 2), "c": nn.Linear(2, 2)}))
    kept = target.model["c"].weight.clone()
    load(target, save(source), allow_missing=("model.c.*",), allow_unexpected=("model.b.*",))
    assert torch.equal(target.model["a"].weight, source.model["a"].weight)
    assert torch.equal(target.model["c"].weight, kept)


def test_a_dtype_difference_is_refused_or_converted_on_request():
    source, target = TrainState(model=nn.Linear(2, 2)), TrainState(model=nn.Linear(2, 2).bfloat16())
    checkpoint = save(source)
    assert target.plan_restore(checkpoint).differences == [
        "model.weight: dtype F32 in the checkpoint, BF16 live; cast='allow' would convert it",
        "model.bias: dtype F32 in the checkpoint, BF16 live; cast='allow' would convert it",
    ]
    load(target, checkpoint, cast="allow")
    assert torch.equal(target.model.weight, source.model.weight.bfloat16())
    with pytest.raises(ConfigError, match="cast='yes'"):
        target.plan_restore(checkpoint, cast="yes")


class Extra(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.value = value

    def get_extra_state(self):
        return self.value

    def set_extra_state(self, state):
        self.value = state


class ScaleOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(3),
        {"scale": torch.tensor(2.0), "history": [1, torch.ones(2, 2)], 3: (None, "x")},
        b"raw",
        io.BytesIO(b"transformer engine"),
        7,
        None,
    ],
    ids=["tensor", "nested", "bytes", "stream", "int", "none"],
)
def test_extra_state_of_any_kind_comes_back(value):
    source = TrainState(model=nn.Sequential(Extra(value), nn.Linear(1, 1)))
    target = TrainState(model=nn.Sequential(Extra(None), nn.Linear(1, 1)))
    load(target, save(source))
    found = target.model[0].value
    assert type(found) is type(value)
    if isinstance(value, io.BytesIO):
        assert found.getvalue() == value.getvalue()
    elif isinstance(value, torch.Tensor):
        assert torch.equal(found, value)
    elif isinstance(value, dict):
        assert torch.equal(found["scale"], value["scale"])
        assert torch.equal(found["history"][1], value["history"][1])
        assert found[3] == (None, "x")
    else:
        assert found == value


def test_extra_state_on_one_side_only_is_a_difference():
    with_extra, without = TrainState(model=nn.Sequential(Extra({"t": torch.ones(1)}))), ScaleOnly()
    plain = TrainState(model=nn.Sequential(without))
    assert plain.plan_restore(save(with_extra)).differences == [
        "model.0._extra_state: extra state in the checkpoint, not in the model"
    ]
    assert with_extra.plan_restore(save(plain)).differences[-1] == (
        "model.0._extra_state: extra state of the model, not in the checkpoint"
    )


def test_extra_state_that_cannot_be_stored_is_refused_with_its_place():
    with pytest.raises(ConfigError, match=r"model.*_extra_state"):
        TrainState(model=nn.Sequential(Extra(object()))).capture()


def test_state_dict_hooks_run_on_the_way_out_and_load_hooks_on_the_way_in():
    class Fused(nn.Module):
        """Keeps one matrix, shows two."""

        def __init__(self):
            super().__init__()
            self.both = nn.Parameter(torch.rand(4, 2))
            self.register_state_dict_post_hook(self._split)
            self.register_load_state_dict_pre_hook(self._join)

        @staticmethod
        def _split(module, state, prefix, _):
            both = state.pop(f"{prefix}both")
            state[f"{prefix}first"], state[f"{prefix}second"] = both[:2] * 1, both[2:] * 1

        @staticmethod
        def _join(module, state, prefix, *_):
            state[f"{prefix}both"] = torch.cat([state.pop(f"{prefix}first"), state.pop(f"{prefix}second")])

    source, target = TrainState(model=nn.Sequential(Fused())), TrainState(model=nn.Sequential(Fused()))
    checkpoint = save(source)
    assert set(checkpoint.stored) == {"model.0.first", "model.0.second"}
    load(target, checkpoint)
    assert torch.equal(target.model[0].both, source.model[0].both)
    found = TrainState(model=nn.Sequential(Fused()).half()).plan_restore(checkpoint).differences
    assert [text.partition(";")[0] for text in found] == [
        "model.0.first: dtype F32 in the checkpoint, F16 live",
        "model.0.second: dtype F32 in the checkpoint, F16 live",
    ]


def test_a_hook_whose_names_do_not_go_back_in_is_reported_not_ignored():
    class OneWay(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(2))
            self.register_state_dict_post_hook(
                lambda m, state, prefix, _: state.update({f"{prefix}more": torch.ones(1)})
            )

    source, target = TrainState(model=OneWay()), TrainState(model=OneWay())
    checkpoint = save(source)
    plan = target.plan_restore(checkpoint)
    read(plan, checkpoint)
    with pytest.raises(IncompatibleStateError, match="more"):
        plan.apply()


def test_several_models_have_their_keys_in_the_names_and_ties_across_them_hold():
    generator, critic = nn.Linear(2, 2), nn.Linear(2, 2)
    critic.weight = generator.weight
    state = TrainState(model={"gen": generator, "critic": critic})
    captured = state.capture()
    assert [item.name for item in captured.tensors] == ["model.gen.weight", "model.gen.bias", "model.critic.bias"]
    assert captured.aliases == {"model.critic.weight": "model.gen.weight"}
    other = TrainState(model={"gen": nn.Linear(2, 2), "critic": nn.Linear(2, 2)})
    load(other, save(state))
    assert torch.equal(other.model["critic"].weight, generator.weight)


def test_a_sequence_of_models_is_refused_with_the_way_that_works():
    with pytest.raises(ConfigError, match=r"Pipeline parts|pipeline parts.*DckptWriter"):
        TrainState(model=[nn.Linear(1, 1)])
    with pytest.raises(ConfigError, match="expected a Module"):
        TrainState(model={"a": 3})
    with pytest.raises(ConfigError, match="empty"):
        TrainState(model={})


def test_a_model_on_the_meta_device_is_refused_when_captured_and_when_loaded():
    with torch.device("meta"):
        meta = TrainState(model=nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"model\.weight: the tensor is on the meta device"):
        meta.capture()
    with pytest.raises(ConfigError, match="to_empty"):
        meta.plan_restore(save(TrainState(model=nn.Linear(2, 2))))


def test_a_torn_record_in_the_checkpoint_is_named():
    from dckpt.errors import CorruptCheckpointError

    state = TrainState(model=nn.Linear(2, 2))
    checkpoint = save(state)
    checkpoint.stored_values["model"] = {"extra": 3}
    with pytest.raises(CorruptCheckpointError, match=r"values\.model"):
        state.plan_restore(checkpoint)
