"""Only the named source is opened: checked with a canary file."""

from __future__ import annotations

import functools
import http.server
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import av
import pytest
from PIL import Image

from tests.video.hostile import PLAYLISTS, Canary, hls, with_reference
from tests.video.media import in_time, number, picture, write
from tests.video.servers import later
from vtoken.video import LiveReader, VideoError, open_video, sample_uniform

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="inotify tells who opens a file")


@pytest.fixture
def canary(tmp_path):
    made = Canary(tmp_path)
    yield made
    made.close()


def read(source: object, backend: str = "auto", **how: object) -> list[int]:
    """Numbers of the frames that are shown; a VideoError is an answer."""
    try:
        with open_video(source, backend, timeout=1, **how) as video:  # type: ignore[arg-type]
            return [number(f.image) for f in [*video, *sample_uniform(video, 4)]]
    except VideoError as error:
        assert "\n" not in str(error)
        return []


def live(source: object, **how: object) -> list[int]:
    try:
        with LiveReader(
            source, speed=None, drop=False, timeout=0.5, retries=1, backoff=0.01, **how
        ) as reader:  # type: ignore[arg-type]
            return [number(f.image) for f in reader]
    except VideoError as error:
        assert "\n" not in str(error)
        return []


def piped(path: Path) -> list[int]:
    out, into = os.pipe()
    later(lambda: (os.write(into, path.read_bytes()), os.close(into)))
    with os.fdopen(out, "rb") as file:
        return live(file)


def opened_as_file(path: Path) -> list[int]:
    with path.open("rb") as file:
        return read(file)


def by_command(path: Path) -> list[int]:
    """`vtoken demo stream` with a session that nobody needs."""
    from click.testing import CliRunner

    from vtoken.cli.main import cli

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vtoken.cli.demo.load", lambda *_: (None, None))
        patch.setattr("vtoken.cli.stream.make_session", lambda *_, **__: nullcontext())
        result = CliRunner().invoke(cli, ["demo", "stream", "--source", str(path), "--ask", "0", "what?"])
    assert result.exit_code != 0 and "is not a video" in " ".join(result.output.split()), result.output
    return []


WAYS: dict[str, Callable[[Path], list[int]]] = {
    "open_video": read,
    "as text": lambda p: read(str(p)),
    "as address": lambda p: read(p.as_uri()),
    "pyav": lambda p: read(p, "pyav"),
    "decord": lambda p: read(p, "decord"),
    "file object": opened_as_file,
    "bytes": lambda p: read(io.BytesIO(p.read_bytes())),
    "live": live,
    "live, file object": lambda p: live(io.BytesIO(p.read_bytes())),
    "growing": lambda p: live(p, growing=True),
    "pipe": piped,
    "command": by_command,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["list.m3u8", "list.mp4", "list.mkv", "list"])
def test_a_playlist_opens_nothing(canary, tmp_path, way, name):
    if way == "command" and name != "list.mp4":
        pytest.skip("one name is enough for the slowest way")
    slow = way in ("growing", "pipe", "command")  # one of them waits for more data, one loads a model
    for make in list(PLAYLISTS.values())[: 1 if slow else None]:
        for target in (
            "canary.ts",
            str(canary.path),
            f"file://{canary.path}",
            f"crypto+file://{canary.path}",
        ):
            path = tmp_path / name
            path.write_bytes(make(target))
            assert in_time(lambda path=path: WAYS[way](path)) == []
            assert not canary.opened(), (way, make.__name__, target)
            if slow:
                break


def test_the_canary_sings(canary, tmp_path):
    """What the others prove proves something: libav left to itself opens what these files name."""
    for kind in ("m3u8", "ffconcat"):
        (tmp_path / f"list.{kind}").write_bytes(PLAYLISTS[kind]("canary.ts"))
        with av.open(str(tmp_path / f"list.{kind}")) as container:
            assert len(list(container.decode(video=0))) == 8
        assert canary.opened()
    with av.open(f"concat://{canary.path}"):
        assert canary.opened()
    with av.open(str(with_reference(tmp_path, "canary.ts")), options={"enable_drefs": "1"}):
        assert canary.opened()


@pytest.mark.parametrize("way", ["open_video", "pyav", "decord", "file object", "live", "growing"])
def test_a_mov_that_refers_to_another_file(canary, tmp_path, way):
    path = with_reference(tmp_path, "canary.ts")
    canary.opened()
    in_time(lambda: WAYS[way](path))
    assert not canary.opened()


WRAPPED = (
    *(
        "concat",
        "concatf",
        "cache",
        "async",
        "crypto",
        "crypto+file",
        "subfile",
        "file+async",
        "hls+file",
        "ipfs",
        "unix",
    ),
    *(
        "CONCAT",
        "Cache",
        "aSync",
        "data",
        "fd",
        "pipe",
        "md5",
        "tee",
        "ftp",
        "gopher",
        "lavfi",
        "tls",
        "x",
        "applehttp",
    ),
)


@pytest.mark.parametrize("scheme", WRAPPED)
def test_an_address_opens_nothing_on_this_machine(canary, scheme):
    for form in ("{}://{}", "{}:{}", "{}:file:{}", "{}:///{}", "{}://file://{}", "{},,start,0,end,0,,:{}"):
        address = form.format(scheme, canary.path)
        assert in_time(lambda address=address: read(address)) == []
        assert in_time(lambda address=address: live(address)) == []
        with pytest.raises(VideoError, match=r"no such (protocol|file)|cannot open|another machine"):
            open_video(address, timeout=1)
    assert not canary.opened()


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:9/|{}",
        "http://127.0.0.1:9/\r\nfile:{}",
        "rtsp://127.0.0.1:9/x?\0{}",
        "ｃoncat://{}",
        "concat\u200b://{}",
        " concat://{}",
        "\u2028concat:{}",
        "C:\\concat:{}",
        "\\\\host\\{}",
        "data:application/vnd.apple.mpegurl,#EXTM3U\n#EXTINF:1,\n{}",
        "file://host{}",
    ],
)
def test_tricks_with_names(canary, address):
    address = address.format(canary.path)
    assert in_time(lambda: read(address)) == [] and in_time(lambda: live(address)) == []
    assert not canary.opened()


def test_file_addresses_name_one_file(canary):
    for address in (
        canary.path.as_uri(),
        f"FILE://{canary.path}",
        f"file://localhost{canary.path}",
        f"file:{canary.path}",
    ):
        assert read(address)[:8] == list(range(8)), address
    assert read(f"file:concat:{canary.path}") == []


def test_odd_names_are_the_files_that_are_called_so(tmp_path, monkeypatch):
    """No expansion, no protocol and no pattern in the name of a file that exists."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "concat:").mkdir()
    for name in (
        "~.mp4",
        "~root",
        "~nobody-of-that-name.mp4",
        "a:b.mp4",
        "concat:a|b.mp4",
        "%03d.mp4",
        "*.mp4",
        "-.mp4",
        "C:\\a.mp4",
    ):
        write(tmp_path / "clip.mp4", 3).rename(tmp_path / name)
        for backend in ("pyav", "auto"):
            assert read(name, backend)[:3] == [0, 1, 2], name
        assert live(name) == [0, 1, 2], name
    for name in ("~nobody-of-that-name/a.mp4", "~~"):
        with pytest.raises(VideoError, match="no such file"):
            open_video(name)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tga"])
def test_a_pattern_is_no_other_file(tmp_path, suffix):
    for i in range(3):
        Image.fromarray(picture(i)).save(tmp_path / f"{i:03d}{suffix}")
    with av.open(str(tmp_path / f"%03d{suffix}")) as container:  # what libav makes of it
        assert len(list(container.decode(video=0))) == 3
    assert read(tmp_path / f"%03d{suffix}") == []
    Image.fromarray(picture(9)).save(tmp_path / f"%03d{suffix}")
    assert set(read(tmp_path / f"%03d{suffix}")) == {9}


def test_a_playlist_that_is_asked_for(canary, tmp_path):
    """`format` allows one demuxer, and the files that its playlist names; `options` allow protocols."""
    for kind, format in (("m3u8", "hls"), ("ffconcat", "concat")):
        path = tmp_path / f"list.{kind}"
        path.write_bytes(PLAYLISTS[kind]("canary.ts"))
        with open_video(path, format=format) as video:
            assert [number(f.image) for f in video] == list(range(8))
        assert canary.opened()
    path.write_bytes(PLAYLISTS["ffconcat"](f"async:{canary.path}"))
    assert read(path, format="concat") == [] and not canary.opened()
    path = tmp_path / "list.m3u8"
    assert read(io.BytesIO(path.read_bytes()), format="hls") == [] and not canary.opened()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            if self.path.startswith("/to-file"):
                self.send_response(302)
                self.send_header("Location", f"file://{folder}/secret/canary.ts")
                return self.end_headers()
            with suppress(OSError):
                super().do_GET()

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    ) as server:
        later(server.serve_forever)
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def test_an_address_may_name_addresses_but_no_files(tmp_path):
    write(tmp_path / "part.ts", 8)
    (tmp_path / "secret").mkdir()
    canary = Canary(tmp_path / "secret")
    (tmp_path / "good.m3u8").write_bytes(hls("part.ts"))
    with served(tmp_path) as address:
        with open_video(f"{address}/good.m3u8", timeout=5) as video:
            assert [number(f.image) for f in video] == list(range(8))
        with open_video(
            address.upper() + "/part.ts", timeout=5
        ) as video:  # names of protocols are the same in capitals
            assert [number(f.image) for f in video] == list(range(8))
        for target in (
            str(canary.path),
            f"file://{canary.path}",
            f"file:{canary.path}",
            f"concat:{canary.path}",
        ):
            (tmp_path / "bad.m3u8").write_bytes(hls(target))
            assert read(f"{address}/bad.m3u8") == []
        (tmp_path / "bad.m3u8").write_bytes(PLAYLISTS["ffconcat"](f"file:{canary.path}"))
        assert read(f"{address}/bad.m3u8") == [] and read(f"{address}/to-file") == []
    assert not canary.opened() and threading.active_count() < 50
    canary.close()


def test_a_data_set_of_videos(canary, tmp_path):
    """Video-MME's clips go the same way."""
    from vtoken.eval.benchmarks.task import Item, Unreadable
    from vtoken.eval.benchmarks.videomme import VideoMME

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "one.mp4").write_bytes(hls(str(canary.path)))
    item = Item("001-1", "?", "A", "short", tmp_path, ("A. a", "B. b"), about={"videoID": "one"})
    task = VideoMME.__new__(VideoMME)
    task._last = None
    with pytest.raises(Unreadable, match="cannot be decoded"):
        task.clip(item, 4)
    assert not canary.opened()
