"""`sample`: the frames that each family's own processor takes, and what they cost."""

from __future__ import annotations

import copy
import importlib
import pickle
import pkgutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import transformers
from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import load_video

from tests.video.media import number, write
from vtoken.video import Limits, VideoError, fast_processor, open_video, sample, uniform_indices
from vtoken.video.random_access import RandomAccess

ROOT = Path(__file__).parents[2]
MAIN = (Qwen2VLVideoProcessor, Qwen3VLVideoProcessor, LlavaOnevisionVideoProcessor)
TICKS = [0, 3, 4, 10, 11, 12, 31, 50, 52, 75, 76, 99]  # hundredths of a second


def video_processors() -> list[Any]:
    """Every class of a video processor in transformers."""
    found = []
    for folder in pkgutil.iter_modules(transformers.models.__path__):
        name = f"transformers.models.{folder.name}.video_processing_{folder.name}"
        if folder.name != "auto" and importlib.util.find_spec(name):
            module = importlib.import_module(name)
            found += [getattr(module, n) for n in module.__all__ if n.endswith("VideoProcessor")]
    return found


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(write(tmp_path_factory.mktemp("sample") / "a.mp4", 96, fps=24, between=3, group=24))


class Loaded(Exception):
    """What a processor loaded by itself."""


def with_pyav(processor: Any, stop: bool = False) -> Any:
    """The processor, which loads files with transformers' PyAV back-end instead of torchcodec."""

    def fetch_videos(videos, sample_indices_fn=None):
        loaded = [load_video(v, backend="pyav", sample_indices_fn=sample_indices_fn) for v in videos]
        if stop:
            raise Loaded(*loaded[0])
        return list(zip(*loaded, strict=True))

    processor.fetch_videos = fetch_videos
    return processor


def loaded(kind: Any, clip: str, name: str | None, value: Any) -> tuple[np.ndarray, list[int]] | None:
    """Frames and indices that a processor loads by itself, None where it refuses."""
    asked = {} if name is None else {name: value, "do_sample_frames": True}
    other = {"num_frames": "fps", "fps": "num_frames"}.get(name or "")
    for extra in ({}, {other: None}) if other else ({},):
        try:
            with_pyav(kind(), stop=True)(videos=clip, **asked, **extra)
        except Loaded as result:
            video, metadata = result.args
            return video, [int(i) for i in metadata.frames_indices]
        except Exception:
            continue
    return None


@pytest.mark.parametrize("kind", video_processors(), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("name", "value"), [(None, None), ("num_frames", 16), ("fps", 2)])
def test_every_family_takes_the_same_frames(clip, kind, name, value):
    if kind().num_frames is not None and name == "fps":
        pytest.skip("transformers keeps to the number of its configuration, whatever rate is asked for")
    plain = loaded(kind, clip, name, value)
    asked = {"frames" if name == "num_frames" else "fps": value} if name else {}
    if plain is None:
        with pytest.raises(VideoError, match="cannot sample this video"):
            sample(clip, **asked, processor=kind())
        return
    got = sample(clip, **asked, processor=kind())
    assert list(got.indices) == plain[1] == list(got.metadata.frames_indices)
    np.testing.assert_array_equal(got.frames.permute(0, 2, 3, 1).numpy(), plain[0])
    assert [number(f) for f in np.ascontiguousarray(plain[0])] == plain[1]


def test_all_families_are_asked():
    assert {*MAIN} <= {*video_processors()} and len(video_processors()) > 25


@pytest.mark.parametrize("kind", MAIN)
@pytest.mark.parametrize("asked", [{"num_frames": 8, "fps": None}, {"fps": 2}])
def test_the_processor_makes_the_same_of_them(clip, kind, asked):
    plain = with_pyav(kind())(videos=clip, do_sample_frames=True, return_tensors="pt", **asked)
    got = sample(clip, asked.get("num_frames"), asked.get("fps"), processor=kind())
    assert got.frames.dtype == torch.uint8 and got.frames.permute(0, 2, 3, 1).is_contiguous()
    mine = kind()(**got.inputs, return_tensors="pt")
    assert mine.keys() == plain.keys()
    for key, value in plain.items():
        assert torch.equal(value, mine[key]), key
    assert got.metadata.timestamps == [i / 24 for i in got.indices]
    assert got.seconds == pytest.approx(got.metadata.timestamps)


def test_a_rate_wins_over_the_number_of_the_configuration(clip):
    assert len(sample(clip, fps=2, processor=LlavaOnevisionVideoProcessor(num_frames=3))) == 8
    assert len(sample(clip, 5, processor=LlavaOnevisionVideoProcessor(num_frames=3))) == 5
    configured = LlavaOnevisionVideoProcessor(num_frames=3, do_sample_frames=True)
    assert len(sample(clip, processor=configured)) == 3 and configured.num_frames == 3
    assert "fetch_videos" not in vars(configured) and "resize" not in vars(configured)


def test_without_a_processor(clip, tmp_path):
    got = sample(clip, 7)
    assert list(got.indices) == uniform_indices(96, 7)
    assert [number(f) for f in got.frames.permute(0, 2, 3, 1).numpy()] == uniform_indices(96, 7)
    assert got.backend == "pyav" and len(got) == 7 and got.metadata.total_num_frames == 96
    variable = write(tmp_path / "v.mp4", len(TICKS), times=TICKS, base=Fraction(1, 100))
    shown = [max(i for i, t in enumerate(TICKS) if t / 100 <= k / 5 + 1e-6) for k in range(5)]
    got = sample(variable, fps=5, limits=None)
    assert list(got.indices)[:5] == shown and list(got.seconds)[:5] == [TICKS[i] / 100 for i in shown]


class Wayward(LlavaOnevisionVideoProcessor):
    """Takes frames twice and out of order."""

    def sample_frames(self, metadata, num_frames=None, fps=None, **_):
        return torch.tensor([9, 2, 2, 40][:num_frames])


def test_frames_come_in_the_order_of_the_processor(clip):
    got = sample(clip, 4, processor=Wayward())
    assert got.indices == (9, 2, 2, 40)
    assert [number(f) for f in got.frames.permute(0, 2, 3, 1).numpy()] == [9, 2, 2, 40]
    assert got.seconds == pytest.approx([9 / 24, 2 / 24, 2 / 24, 40 / 24])


@pytest.mark.parametrize("kind", MAIN)
def test_scaled_while_decoding(clip, kind):
    full = sample(clip, 8, processor=kind(do_normalize=False))
    got = sample(clip, 8, processor=kind(do_normalize=False), scaled=True)
    assert got.indices == full.indices and got.frames.shape != full.frames.shape
    own, mine = (kind(do_normalize=False)(**v.inputs, return_tensors="pt") for v in (full, got))
    own, mine = own["pixel_values_videos"], mine["pixel_values_videos"]
    assert own.shape == mine.shape and (own - mine).abs().mean() < 3 / 255
    assert torch.equal(
        kind(do_resize=False, do_normalize=False)(**got.inputs, return_tensors="pt")["pixel_values_videos"],
        mine,
    )


def test_a_size(clip, tmp_path):
    got = sample(clip, 3, size=(24, 32))
    assert got.frames.shape == (3, 3, 24, 32) and (got.metadata.height, got.metadata.width) == (48, 128)
    turned = write(tmp_path / "t.mp4", 4, rotation=90)
    assert sample(turned, 2).frames.shape == (2, 3, 128, 48)
    turned = sample(turned, 2, size=(64, 24))
    assert turned.frames.shape == (2, 3, 64, 24) and (turned.metadata.height, turned.metadata.width) == (
        128,
        48,
    )


@pytest.mark.parametrize("kind", MAIN)
@pytest.mark.parametrize(
    "given", [{}, {"do_normalize": False}, {"do_resize": False}, {"rescale_factor": 1 / 128}]
)
def test_a_fast_processor_changes_no_bit(kind, given):
    draw = np.random.default_rng(3)
    sizes = (
        ((5, 3, 96, 160), (4, 3, 64, 64), (4, 3, 64, 64)) if "do_resize" not in given else ((4, 3, 448, 448),)
    )
    videos = [torch.from_numpy(draw.integers(0, 256, size, np.uint8)) for size in sizes]
    if kind is LlavaOnevisionVideoProcessor:
        videos = videos[:1]
    for some in (videos, [v.numpy().transpose(0, 2, 3, 1) for v in videos], [v.float() for v in videos]):
        own = kind(**given)
        fast = fast_processor(own)
        mine = fast(videos=some, return_tensors="pt", do_sample_frames=False)
        plain = own(videos=some, return_tensors="pt", do_sample_frames=False)
        assert mine.keys() == plain.keys() and all(torch.equal(mine[k], plain[k]) for k in plain)
    assert "_preprocess" not in vars(own) and (fast is own) == (kind is LlavaOnevisionVideoProcessor)


@pytest.mark.parametrize("kind", MAIN[:2])
def test_a_fast_processor_is_written_and_shown_as_the_original(kind, tmp_path):
    own = kind()
    fast = fast_processor(own)
    assert repr(fast) == repr(own) and fast.to_json_string() == own.to_json_string()
    fast.save_pretrained(tmp_path)
    assert kind.from_pretrained(tmp_path).to_dict() == own.to_dict()
    again = pickle.loads(pickle.dumps(copy.deepcopy(own)))
    video = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    mine, plain = (p(videos=[video], return_tensors="np", do_sample_frames=False) for p in (fast, again))
    assert all(np.array_equal(mine[k], plain[k]) and type(mine[k]) is type(plain[k]) for k in plain)


def test_a_step_that_rounds_to_one_past_the_last_frame(tmp_path):
    """Float steps of 367 frames at 24 per second end at 367.0."""
    path = write(tmp_path / "a.mp4", [i % 256 for i in range(367)], fps=24)
    got = sample(path, fps=2.0, processor=Qwen2VLVideoProcessor())
    assert got.indices[-1] < 367 and len(got.indices) == len(got.frames)
    assert list(got.indices) == loaded(Qwen2VLVideoProcessor, str(path), "fps", 2.0)[1][: len(got.indices)]


@pytest.mark.parametrize("cut", [0, 10, 12])
def test_a_trimmed_file_starts_inside_a_group(tmp_path, cut):
    """The frames before the cut are decoded, not shown: a copy without encoding starts at a key frame."""
    whole, path = write(tmp_path / "whole.mp4", 24, between=0, group=12), tmp_path / "cut.mp4"
    options = {"use_editlist": "1", "avoid_negative_ts": "disabled"}
    with av.open(str(whole)) as given, av.open(str(path), "w", options=options) as out:
        stream = given.streams.video[0]
        copied = out.add_stream_from_template(stream)
        late = int(cut * 0.04 / stream.time_base)
        for packet in given.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - late, packet.dts - late, copied
                out.mux(packet)
    with av.open(str(path)) as shown:
        want = [number(f.to_ndarray(format="rgb24")) for f in shown.decode(video=0)]
    assert want == list(range(cut, 24))
    with open_video(path) as reader:
        assert [number(f.image) for f in reader] == want
        assert [number(f.image) for f in reader.get_frames([0, 3])] == [want[0], want[3]]
    for frames in (1, 4, len(want)):
        got = sample(path, frames=frames)
        shown = [number(np.ascontiguousarray(f)) for f in got.frames.permute(0, 2, 3, 1).numpy()]
        assert shown == [want[i] for i in got.indices]


@pytest.mark.parametrize("between", [0, 3])
def test_pictures_that_nothing_refers_to_are_not_decoded(tmp_path, between):
    path = write(tmp_path / "a.mp4", 48, between=between, group=48)
    with open_video(path) as reader:
        all_of_them = {f.index: f.image for f in reader}
        for wanted in range(0, 48, 5):
            (got,) = reader.get_frames([wanted])
            np.testing.assert_array_equal(got.image, all_of_them[wanted])
        came = [i for i, _ in RandomAccess(reader.track, reader.table).frames_from(0, only=[40])]
        assert 40 in came and (len(came) < 40 if between else len(came) == 48)
        assert [f.index for f in reader] == list(range(48))


def test_memory_is_bounded_by_the_frames_asked_for(tmp_path):
    """A quarter of an hour of video, of which all frames would take 100 MB."""
    path = write(
        tmp_path / "long.mp4",
        [i % 256 for i in range(900)],
        fps=1,
        size=(256, 144),
        group=250,
        options={"preset": "ultrafast"},
    )
    code = f"""
import resource, sys, transformers.video_utils
from vtoken.video import sample
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
sample({str(path)!r}, 1)
before = peak()
got = sample({str(path)!r}, 32)
assert got.metadata.duration == 900 and len(got) == 32
print(peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 40, "MiB, for 3.4 MiB of frames"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "needs frames= or fps="),
        ({"frames": 2, "fps": 1.0}, "frames or fps"),
        ({"frames": 0}, "at least 1"),
        ({"fps": 0.0}, "above 0"),
        ({"frames": 2, "scaled": True}, "processor= for scaled"),
        ({"frames": 2, "size": (8, 8), "backend": "decord"}, "decord scales no frames"),
        ({"frames": 2, "processor": 3}, "int has no video processor"),
        ({"frames": 2, "size": (8, 8), "scaled": True, "processor": Qwen2VLVideoProcessor()}, "not both"),
        (
            {"frames": 97, "processor": LlavaOnevisionVideoProcessor()},
            "cannot sample this video: it does not take frames=97 of 96, ask for fewer, such as frames=96",
        ),
        ({"frames": 50, "limits": Limits(nbytes=2**19)}, "0.0 GiB"),
    ],
)
def test_refusals(clip, asked, message):
    with pytest.raises(VideoError, match=message):
        sample(clip, **asked)


def test_a_number_that_a_processor_rounds_up_is_told_with_one_that_works(tmp_path):
    path, processor = str(write(tmp_path / "clip.mp4", 7)), Qwen2VLVideoProcessor()
    for frames in (7, 32):
        with pytest.raises(VideoError, match=f"does not take frames={frames} of 7, .* such as frames=6"):
            sample(path, frames, processor=processor)
    assert len(sample(path, 6, processor=processor).indices) == 6


def test_other_sources(clip):
    with open(clip, "rb") as file:
        assert sample(file, 3).indices == (0, 47, 95)
    assert sample("synthetic://1?fps=2&frames=20", 4).frames.shape == (4, 3, 96, 96)
    assert sample("synthetic://1?fps=2&frames=20", fps=1).indices == tuple(range(0, 20, 2))
    with pytest.raises(VideoError, match="videos with an end"):
        sample("synthetic://1?fps=2", 4)
    assert sample(clip, 4, backend="decord").backend == "decord"


def test_a_rate_beyond_the_limits_is_refused_before_its_times_are_listed(tmp_path):
    path = write(tmp_path / "clip.mp4", 8)
    with pytest.raises(VideoError, match="more than 4,194,304 frames"):
        sample(str(path), fps=1e12)
