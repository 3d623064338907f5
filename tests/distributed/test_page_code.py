"""Code that the pages of the checks give does on real ranks what they say."""

from __future__ import annotations

from tests.support.vocabulary_jobs import train_with_the_mask_of_the_page


def test_the_mask_of_frozen_rows_holds_under_fully_shard(ranks):
    for base_stays, new_stays in ranks.run(train_with_the_mask_of_the_page, 2):
        assert (base_stays, new_stays) == (True, False)
