"""Which runs beside a new root are named as what may have been meant."""

from __future__ import annotations

import pytest

from dckpt.engine.arguments import neighbouring_runs


@pytest.mark.parametrize(
    ("new", "other", "is_named"),
    [
        ("gtp", "gpt", True),
        ("gp", "gpt", True),
        ("gpt2", "gpt", True),
        ("got", "gpt", True),
        ("int", "fin", False),
        ("fz2", "frz", False),
        ("fz2", "freeze2", False),
        ("pretrain-large", "pretrain-lagre", True),
        ("pretrain-large", "pretrain_large2", True),
        ("pretrain", "finetune", False),
    ],
)
def test_a_run_is_named_whose_name_differs_by_a_slip(tmp_path, new, other, is_named):
    (tmp_path / other / "generations").mkdir(parents=True)

    found = neighbouring_runs(str(tmp_path / new))

    assert found == ([str(tmp_path / other)] if is_named else [])
