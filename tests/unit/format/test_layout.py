"""Names on storage."""

import pytest

from dckpt.errors import ConfigError, CorruptCheckpointError
from dckpt.format import layout
from dckpt.format.layout import CheckpointId


@pytest.mark.parametrize(
    ("step", "generation", "micro_step", "name"),
    [
        (1200, 7, 0, "step-0000001200.g0007"),
        (0, 1, 0, "step-0000000000.g0001"),
        (1200, 7, 3, "step-0000001200.g0007.m3"),
        (9_999_999_999, 999_999, 999_999, "step-9999999999.g999999.m999999"),
    ],
)
def test_a_checkpoint_name_states_step_generation_and_micro_step(step, generation, micro_step, name):
    assert layout.checkpoint_name(step, generation, micro_step) == name
    found = layout.parse_checkpoint_name(name)

    assert found == CheckpointId(step=step, micro_step=micro_step, generation=generation)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize(
    "name",
    [
        "step-9",
        "step-9.g0001",
        "step-0000000009",
        "step-0000000009.g1",
        "step-0000000009.g0000",
        "step-0000000009.g00001",
        "step-0000000009.g1000000",
        "step-0000000009.g0001.m0",
        "step-0000000009.g0001.m03",
        "step-0000000009.g0001.bak",
        "step-0000000009.g0001\n",
        "xstep-0000000009.g0001",
        "step-00000000091.g0001",
        "step-\u0660000000009.g0001",
        ".tmp-step-0000000009.g0001",
        "",
    ],
)
def test_a_name_that_is_not_wholly_a_checkpoint_name_is_none(name):
    assert layout.parse_checkpoint_name(name) is None


@pytest.mark.parametrize("arguments", [(-1, 1), (10**10, 1), (1, 0), (1, 10**6), (1, 1, -1), (True, 1), (1.0, 1)])
def test_a_checkpoint_name_out_of_range_is_refused(arguments):
    with pytest.raises(ConfigError, match="expected an int"):
        layout.checkpoint_name(*arguments)


def test_checkpoints_order_by_step_then_micro_step_then_generation():
    ids = [CheckpointId(2, 0, 1), CheckpointId(1, 3, 1), CheckpointId(1, 0, 9), CheckpointId(1, 0, 2)]

    assert sorted(ids) == [CheckpointId(1, 0, 2), CheckpointId(1, 0, 9), CheckpointId(1, 3, 1), CheckpointId(2, 0, 1)]


def test_generation_records_have_six_digits_and_nothing_else():
    assert layout.generation_key(7) == "generations/000007.json"
    assert layout.parse_generation_file("000007.json") == 7
    for name in ("000000.json", "7.json", "000007.json.tmp", ".000007.json", "0000007.json", "000007.jso"):
        assert layout.parse_generation_file(name) is None
    with pytest.raises(ConfigError):
        layout.generation_key(0)


def test_a_pin_needs_a_full_checkpoint_name():
    assert layout.pin_key("step-0000001200.g0007") == "pins/step-0000001200.g0007"
    with pytest.raises(ConfigError, match="full name"):
        layout.pin_key("../step-0000001200.g0007")


def test_staging_and_trash_names_carry_their_hexadecimal_id():
    attempt = "0a" * 16

    assert layout.parse_staging_name(layout.staging_name(attempt)) == attempt
    assert layout.is_trash_name(layout.trash_name(attempt))
    for name in ("", attempt, ".tmp-", ".tmp-XYZ", f".tmp-{attempt}0", f".trash-{attempt}"):
        assert layout.parse_staging_name(name) is None
    assert not layout.is_trash_name(f".tmp-{attempt}")
    for bad in ("", "a/b", attempt.upper(), attempt + "0"):
        with pytest.raises(ConfigError):
            layout.staging_name(bad)
        with pytest.raises(ConfigError):
            layout.trash_name(bad)


def test_shard_and_sums_names():
    assert layout.shard_file_name(0) == "rank00000.safetensors"
    assert layout.shard_file_name(123_456, 2) == "rank123456-2.safetensors"
    assert layout.parse_shard_file_name("rank123456-2.safetensors") == (123_456, 2)
    assert layout.parse_shard_file_name("rank00000.safetensors") == (0, 0)
    for name in ("rank0.safetensors", "rank012345.safetensors", "rank00000-0.safetensors", "rank00000.sums"):
        assert layout.parse_shard_file_name(name) is None
    assert layout.sums_file_name("aa/rank00000-1.safetensors") == "aa/rank00000-1.sums"
    with pytest.raises(ConfigError):
        layout.sums_file_name("rank00000.bin")
    with pytest.raises(ConfigError):
        layout.shard_file_name(-1)


def test_an_index_is_named_by_its_content():
    digest = "0123456789abcdef" * 2

    assert layout.parse_index_file_name(layout.index_file_name(digest)) == digest
    assert layout.parse_index_file_name(f"layout-{digest}.index.tmp") is None
    with pytest.raises(ConfigError):
        layout.index_file_name("abc")


@pytest.mark.parametrize("path", ["a", "a/b", "A-1_.x/rank00000.sums", "..a/.b", "a" * 128])
def test_safe_paths_pass(path):
    layout.ensure_safe_path(path, key="manifest.json", field="files[0].path")


@pytest.mark.parametrize(
    "path",
    [
        "", "/", "/etc/passwd", "a//b", "a/", ".", "..", "a/../b", "../a", "a/./b", "a\\b", "C:\\a", "a\0b", "a\nb", "a b",
        "a" * 129, "/".join("a" * 9), "é", "~", "s3://a", "a" * 100_000_000,
    ],
)  # fmt: skip
def test_unsafe_paths_are_refused_and_name_file_and_field(path):
    with pytest.raises(CorruptCheckpointError) as caught:
        layout.ensure_safe_path(path, key="manifest.json", field="files[0].path")

    assert (caught.value.key, caught.value.field) == ("manifest.json", "files[0].path")
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["a", "model.layers.0.weight", "../../etc/x", "a b", "größe", "x" * 4096])
def test_tensor_names_may_be_any_printable_text(name):
    assert layout.is_tensor_name(name)


@pytest.mark.parametrize("name", ["", "a\0b", "a\nb", "\x7f", "__metadata__", "x" * 4097, "é" * 2049, "\ud800"])
def test_names_with_control_characters_or_without_end_are_no_tensor_names(name):
    assert not layout.is_tensor_name(name)
