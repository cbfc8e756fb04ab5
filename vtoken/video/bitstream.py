"""Facts read from the first bytes of a packet that libav does not tell."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

_IDR, _SPS = 5, 7  # types of NAL units: instantaneous refresh, sequence parameters (the size of the pictures)
_LENGTH = 4  # byte of an avcC record that says how long the length of a NAL unit is
_WHOLE = {"vp8", "vp9", "av1"}  # codecs in which nothing after a key frame refers to what was before it


def hides_frames(packet: Any) -> bool:
    """Whether packets of its stream may hold pictures that are never shown, see `hidden`."""
    return codec_of(packet) == "vp8"


def hidden(packet: Any) -> bool:
    """Whether a VP8 packet holds a reference that is never shown: bit 4 of its frame tag (RFC 6386, 9.1)."""
    return not bytes(packet)[0] >> 4 & 1


@dataclass(frozen=True)
class Regularity:
    """What the packets of a file say about all of its pictures.

    Attributes:
        closed: decoding starts cleanly at every key frame, see `is_closed`.
        steady: all pictures surely have the size that the file's header says, see `keeps_size`.
    """

    closed: bool
    steady: bool


def regularity(packets: Iterable[Any]) -> Regularity:
    """The `Regularity` of a file from all of its packets."""
    closed = steady = True
    for packet in packets:
        if packet.size:
            steady = steady and keeps_size(packet)
            shown = not packet.is_discard and not (hides_frames(packet) and hidden(packet))
            closed = closed and (not (shown and packet.is_keyframe) or is_closed(packet))
        if not (closed or steady):
            break
    return Regularity(closed, steady)


def is_closed(packet: Any) -> bool:
    """Whether a key packet of an mp4 or mkv surely starts a group of pictures that needs nothing before it.

    So do key frames of VP8, VP9 and AV1, and instantaneous refreshes of H.264 (ITU-T H.264, 7.4.1). Its other
    key packets start open groups, or pictures that are refreshed bit by bit.
    """
    codec, extra = codec_of(packet), packet.stream.codec_context.extradata or b""
    # without the record, NAL units have start codes
    if codec != "h264" or len(extra) <= _LENGTH or extra[0] != 1:
        return codec in _WHOLE
    return any(unit[0] & 31 == _IDR for unit in _units(memoryview(packet), (extra[_LENGTH] & 3) + 1))


def keeps_size(packet: Any) -> bool:
    """Whether a packet of an mp4 or mkv surely leaves the picture size as the file's header states it.

    In H.264: if it brings no parameters that the header does not have. In VP8: always. In VP9 and AV1 any
    frame may have another size.
    """
    if packet.has_sidedata("new_extradata"):
        return False
    codec, context = codec_of(packet), packet.stream.codec_context
    if codec == "vp8":
        data = bytes(packet)[:10]  # RFC 6386, 9.1
        size = (int.from_bytes(data[6:8], "little") & 0x3FFF, int.from_bytes(data[8:10], "little") & 0x3FFF)
        return bool(data[0] & 1) or size == (context.width, context.height)
    extra = context.extradata or b""
    if codec != "h264" or len(extra) <= _LENGTH + 1 or extra[0] != 1:
        return False
    stated = [unit for unit in _stated(extra) if unit[0] & 31 == _SPS]
    units = _units(memoryview(packet), (extra[_LENGTH] & 3) + 1)
    return len(stated) == 1 and all(bytes(unit) == stated[0] for unit in units if unit[0] & 31 == _SPS)


def _units(data: Any, width: int) -> Iterator[Any]:
    """The NAL units of a packet, each preceded by its length in so many bytes."""
    at = 0
    while at + width < len(data):
        end = at + width + int.from_bytes(data[at : at + width], "big")
        if end > at + width:
            yield data[at + width : end]
        at = end


def _stated(record: bytes) -> Iterator[bytes]:
    """The NAL units of an avcC record: two lists of (length, unit), see ISO/IEC 14496-15, 5.3.3.1."""
    at = _LENGTH + 1
    for mask in (31, 255):
        count, at = (record[at] & mask if at < len(record) else 0), at + 1
        for _ in range(count):
            end = at + 2 + int.from_bytes(record[at : at + 2], "big")
            if record[at + 2 : end]:
                yield record[at + 2 : end]
            at = end


def codec_of(packet: Any) -> str:
    """Name of a packet's codec, independent of the decoder."""
    return packet.stream.codec_context.codec.canonical_name
