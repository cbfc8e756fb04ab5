"""`Selection.merge`: which token joins which, with what share."""

from __future__ import annotations

import pytest
import torch

from vtoken import Selection

KEEP, OWNER = torch.tensor([1, 3, 4]), torch.tensor([1, 1, -1, 3, -1, 3])


def test_without_weights_a_kept_token_is_the_mean_of_those_that_join():
    x = torch.arange(6.0)[:, None] ** 2
    merged = Selection.merge(KEEP, OWNER).check(6)
    assert merged.into.tolist() == [0, 0, -1, 1, -1, 1]
    assert (merged.dense(6) @ x)[:, 0].tolist() == [(0 + 1) / 2, (9 + 25) / 2, 16]  # token 4 stays as it is


def test_weights_are_taken_as_they_are():
    weight = torch.tensor([0.5, 2.0, 0.0, 1.0, 0.0, 3.0])
    merged = Selection.merge(KEEP, OWNER, weight).check(6)
    assert torch.equal(merged.weight, weight)
    assert merged.dense(6).tolist() == [[0.5, 2, 0, 0, 0, 0], [0, 0, 0, 1, 0, 3], [0, 0, 0, 0, 1, 0]]


@pytest.mark.parametrize("owner", [[1, 2, -1, 3, -1, 3], [0, 0, 0, 3, 4, 5]])
def test_an_owner_that_goes_is_refused(owner):
    with pytest.raises(ValueError, match=r"needs owners that are kept, found \[[02]"):
        Selection.merge(KEEP, torch.tensor(owner))


def test_nothing_to_merge():
    assert Selection.merge(torch.arange(0), torch.full((4,), -1)).check(4).weight.tolist() == [0] * 4


def test_groups_of_the_last_release_say_what_to_write():
    group = torch.tensor([0, 0, -1, 1, 2, 1])
    with pytest.warns(DeprecationWarning, match="Selection.merge"):
        old = Selection.groups(KEEP, group)
    assert torch.equal(old.into, group) and old.weight.tolist() == [0.5, 0.5, 0, 0.5, 1, 0.5]
