"""Scores of retrieval and classification against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vtoken.eval.benchmarks.encoder_task import Sample, spread
from vtoken.eval.benchmarks.imagenet import ImageNet
from vtoken.eval.benchmarks.msrvtt import MSRVTT, frame_indices, packed, unpacked
from vtoken.eval.protocols.retrieval import dual_softmax, ranks, scores, ties


def test_a_permutation_has_known_ranks():
    """Row i scores its right entry lower than exactly i others, so that the ranks are 0 to 11."""
    n = 12
    matrix = np.stack([[1.0 if (j - i - 1) % n < i else 0.0 for j in range(n)] for i in range(n)])
    matrix[np.arange(n), np.arange(n)] = 0.5
    assert ranks(matrix).tolist() == list(range(n))
    found = scores(matrix)
    assert (found["R@1"], found["R@5"], found["R@10"]) == pytest.approx((100 / 12, 500 / 12, 1000 / 12))
    assert found["R-sum"] == pytest.approx(1600 / 12)
    assert found["median rank"] == 6.5 and found["mean rank"] == 6.5 and found["ties"] == 0


def test_the_two_directions_differ():
    matrix = np.array([[0.5, 0.9, 0.1], [0.2, 0.8, 0.1], [0.7, 0.6, 0.3]])
    assert ranks(matrix).tolist() == [1, 0, 2] and ranks(matrix.T).tolist() == [1, 1, 0]


def test_a_perfect_matrix():
    found = scores(np.eye(7))
    assert found["R@1"] == found["R@10"] == 100 and found["median rank"] == found["mean rank"] == 1


def test_ties_count_for_the_query_and_are_told():
    matrix = np.array([[0.5, 0.5, 0.5], [0.9, 0.5, 0.5], [0.1, 0.2, 0.3]])
    assert ranks(matrix).tolist() == [0, 1, 0] and ties(matrix) == 2
    found = scores(matrix)  # one rank per row, as many as queries
    assert found["R@1"] == pytest.approx(200 / 3) and found["ties"] == 2


@pytest.mark.parametrize("wrong", [np.zeros((2, 3)), np.zeros(4), np.zeros((0, 0)), np.array([[math.nan]])])
def test_matrices_without_ranks_are_refused(wrong):
    with pytest.raises(ValueError, match=r"square matrix|not finite"):
        scores(wrong)


def test_dual_softmax_by_hand():
    """Video 0 suits both texts; the softmax over texts takes it away from the text that suits it less."""
    matrix = np.array([[0.9, 0.1], [0.8, 0.7]])
    e = math.exp
    columns = [(e(9), e(8)), (e(1), e(7))]
    by_hand = [[matrix[i, j] * columns[j][i] / sum(columns[j]) for j in range(2)] for i in range(2)]
    found = dual_softmax(matrix, 0.1)
    assert found == pytest.approx(np.array(by_hand))
    assert ranks(matrix).tolist() == [0, 1] and ranks(found).tolist() == [0, 0]
    assert np.isfinite(dual_softmax(matrix, 1e-4)).all()
    for wrong in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            dual_softmax(matrix, wrong)


@pytest.mark.parametrize(
    ("total", "fps", "frames", "wanted"),
    [
        (300, 25.0, 12, [0, 25, 50, 75, 100, 125, 150, 175, 200, 225, 250, 275]),  # exactly 12 seconds
        (500, 25.0, 4, [0, 150, 300, 475]),  # linspace over 20 positions: 0, 6.33, 12.67, 19
        (100, 29.97, 4, [0, 30, 60, 90]),
        (90, 30.0, 12, [0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 89]),  # 3 s: linspace over all frames
        (3, 25.0, 6, [0, 0, 0, 1, 1, 2]),
        (1, 25.0, 3, [0, 0, 0]),
        (5, 0.2, 5, [0, 1, 2, 3, 4]),  # a step of less than a frame is a frame
    ],
)
def test_frames_that_are_read(total, fps, frames, wanted):
    assert frame_indices(total, fps, frames) == wanted


@pytest.mark.parametrize("given", [(0, 25.0, 12), (10, 0.0, 12), (10, math.nan, 12), (10, 25.0, 0)])
def test_frames_of_nothing_are_refused(given):
    with pytest.raises(ValueError, match="cannot take"):
        frame_indices(*given)


def retrieval(duals=(False,)) -> MSRVTT:
    samples = [Sample(f"video{i}", f"caption {i}", None) for i in range(3)]
    return MSRVTT(samples, preprocess=None, frames=2, duals=duals, temperature=0.1)


def test_a_video_is_the_mean_of_its_normalised_frames():
    output = torch.tensor([[3.0, 0.0], [0.0, 0.5], [0.0, 2.0], [0.0, 7.0]])  # two videos of two frames
    first, second = (unpacked(value) for value in retrieval().values(output, 2))
    assert first == pytest.approx([math.sqrt(0.5)] * 2) and second == pytest.approx([0, 1])


def test_scores_of_both_directions_and_duals():
    task = retrieval(duals=(False, True))
    task.texts = np.eye(3, dtype=np.float32)
    matrix = np.array([[0.5, 0.2, 0.7], [0.9, 0.8, 0.6], [0.1, 0.1, 0.3]], np.float32)  # texts x videos
    values = {f"video{i}": packed(matrix[:, i]) for i in range(3)}
    found = task.breakdown(values)
    plain, dual = found.scores["plain"], found.scores["dual softmax"]
    assert plain["text to video"]["R@1"] == pytest.approx(100 / 3)  # ranks 1, 1, 0
    assert plain["text to video"]["mean rank"] == pytest.approx(5 / 3)
    assert plain["video to text"]["R@1"] == pytest.approx(100 / 3)  # ranks 1, 0, 2
    assert plain["video to text"]["mean rank"] == pytest.approx(2)
    for direction, one in (("text to video", matrix), ("video to text", matrix.T)):
        assert dual[direction] == pytest.approx(scores(dual_softmax(one.astype(np.float64), 0.1)))
    assert found.scores["temperature"] == 0.1 and task.point(found)[0] == pytest.approx(100 / 3 + 200)
    assert found.columns["t2v R-sum"] == "233.3" and len(found.rows) == 5
    only_dual = retrieval(duals=(True,))
    only_dual.texts = task.texts
    assert only_dual.point(only_dual.breakdown(values))[0] == dual["text to video"]["R-sum"]


def test_equal_videos_tie_wherever_they_stand():
    task = MSRVTT([Sample(f"v{i}", "", None) for i in range(70)], preprocess=None)
    rng = np.random.default_rng(0)
    task.texts = rng.normal(size=(70, 37)).astype(np.float32)
    same = packed(rng.normal(size=37).astype(np.float32))
    found = task.breakdown({f"v{i}": same for i in range(70)}).scores["plain"]["text to video"]
    assert found["R@1"] == 100 and found["ties"] == 70


def test_top_1_and_top_5_by_hand():
    labels = [0, 1, 2, 3, 4, 5]
    task = ImageNet([Sample(f"i{n}", str(label), None) for n, label in enumerate(labels)], preprocess=None)
    logits = torch.full((5, 8), -1.0)
    for row, best in enumerate([[0, 7], [7, 1], [7, 6, 5, 4, 2], [7, 6, 5, 4, 2, 3], [4]]):
        for place, index in enumerate(best):
            logits[row, index] = 10.0 - place
    values = dict(zip(["i0", "i1", "i2", "i3", "i4"], task.values(logits, 5)))  # i5 cannot be opened
    assert values["i2"] == [7, 6, 5, 4, 2]
    found = task.breakdown(values)
    assert found.scores["top-1"]["right"] == 2 and found.scores["top-5"]["right"] == 4
    assert found.columns == {"top-1, %": "33.33", "top-5, %": "66.67"}
    accuracy, low, high = task.point(found)
    assert accuracy == pytest.approx(100 / 3) and low < accuracy < high
    assert task.whole(values["i2"]) and not any(task.whole(v) for v in ([], "x", [1.5], None, list(range(6))))


def test_a_limit_takes_equal_steps():
    assert spread(list(range(10)), 4) == [0, 2, 5, 7] and spread([1, 2], 5) == [1, 2] == spread([1, 2], None)
