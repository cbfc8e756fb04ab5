"""What the first bytes of a packet tell and libav does not."""

from __future__ import annotations

from typing import Any

_IDR = 5  # type of the NAL units of an instantaneous refresh
_LENGTH = 4  # byte of an avcC record that says how long the length of a NAL unit is
_WHOLE = {"vp8", "vp9", "av1"}  # codecs in which nothing after a key frame refers to what was before it


def hidden(packet: Any) -> bool:
    """Whether a VP8 packet holds a reference that is never shown: bit 4 of its frame tag (RFC 6386, 9.1)."""
    return codec_of(packet) == "vp8" and not bytes(packet)[0] >> 4 & 1


def is_closed(packet: Any) -> bool:
    """Whether a key packet of an mp4 or mkv surely starts a group of pictures that needs nothing before it: key frames of
    VP8, VP9 and AV1, and instantaneous refreshes of H.264 (ITU-T H.264, 7.4.1). Its other key packets start open groups, or
    pictures that are refreshed bit by bit."""
    codec, extra = codec_of(packet), packet.stream.codec_context.extradata or b""
    if codec != "h264" or len(extra) <= _LENGTH or extra[0] != 1:  # without the record, NAL units have start codes
        return codec in _WHOLE
    data, width, at = bytes(packet), (extra[_LENGTH] & 3) + 1, 0
    while at + width < len(data):
        if data[at + width] & 31 == _IDR:
            return True
        at += width + int.from_bytes(data[at : at + width], "big")
    return False


def codec_of(packet: Any) -> str:
    """Name of a packet's codec, whichever decoder serves it."""
    return packet.stream.codec_context.codec.canonical_name
