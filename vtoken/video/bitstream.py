"""What the first bytes of a packet tell and libav does not."""

from __future__ import annotations

from typing import Any

_IDR = {"h264": ((5,), 0, 0x1F), "hevc": ((19, 20), 1, 0x3F)}  # types of NAL units; where and how wide the type stands
_LENGTH = {"h264": 4, "hevc": 21}  # where avcC and hvcC records say how long a NAL unit's length is
_WHOLE = {"vp8", "vp9", "av1"}  # codecs in which nothing after a key frame refers to what was before it


def hidden(packet: Any) -> bool:
    """Whether a VP8 packet holds a reference that is never shown: bit 4 of its frame tag (RFC 6386, 9.1)."""
    return codec_of(packet) == "vp8" and not bytes(packet)[0] >> 4 & 1


def is_closed(packet: Any) -> bool:
    """Whether a key packet of an mp4 or mkv surely starts a group of pictures that needs nothing before it: VP8, VP9 and
    AV1 key frames, and instantaneous refreshes of H.264 (ITU-T H.264, 7.4.1) and HEVC (H.265, 7.4.2.2). Their other key
    packets start open groups, or pictures that are refreshed bit by bit."""
    codec = codec_of(packet)
    if codec not in _IDR:
        return codec in _WHOLE
    (idr, shift, mask), extra = _IDR[codec], packet.stream.codec_context.extradata or b""
    if len(extra) <= _LENGTH[codec] or extra[0] != 1:
        return False  # start codes instead of lengths
    data, width, at = bytes(packet), (extra[_LENGTH[codec]] & 3) + 1, 0
    while at + width < len(data):
        if data[at + width] >> shift & mask in idr:
            return True
        at += width + int.from_bytes(data[at : at + width], "big")
    return False


def codec_of(packet: Any) -> str:
    """Name of a packet's codec, whichever decoder serves it."""
    return packet.stream.codec_context.codec.canonical_name
