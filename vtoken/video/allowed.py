"""Allow-lists for libav: the protocols and containers that each kind of source may open."""

from __future__ import annotations

from .source import PROTOCOLS, Source

# self-contained formats: none of these opens another file
FORMATS = (
    "mov,mp4,matroska,webm,avi,flv,live_flv,kux,asf,asf_o,wtv,rm,ogg,nut,mpegts,"
    "mpegtsraw,mpeg,mpegvideo,mxf,gxf,dv,nsv,nuv,swf,smjpeg,mpjpeg,pva,ty,dhav,ivr,"
    "y4m,yuv4mpegpipe,gif,apng,ivf,obu,av1,h261,h263,h264,hevc,vvc,evc,m4v,mjpeg,"
    "mjpeg_2000,vc1,vc1test,dirac,dnxhd,cavsvideo,avs2,avs3,ipu,mp3,aac,ac3,eac3,flac,"
    "wav,w64,aiff,au,caf,amr,loas,srt,ass,webvtt,image2,bmp_pipe,gif_pipe,ico,j2k_pipe,"
    "jpeg_pipe,jpegls_pipe,jpegxl_pipe,jpegxl_anim,pam_pipe,pbm_pipe,pcx_pipe,pgm_pipe,"
    "ppm_pipe,png_pipe,psd_pipe,qoi_pipe,sgi_pipe,dds_pipe,exr_pipe,dpx_pipe,hdr_pipe,"
    "tiff_pipe,webp_pipe"
)
_NESTED = {  # of an address: demuxers that open more addresses, over the same protocols
    "http": ("hls", "dash"),
    "https": ("hls", "dash"),
    "rtsp": ("rtsp", "rtp"),
    "rtsps": ("rtsp", "rtp"),
    "rtp": ("rtp",),
}
_EBML = b"\x1a\x45\xdf\xa3"
_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")


def restrictions(source: Source) -> dict[str, str]:
    """Options of libav that restrict a source to the file or address that its user named.

    A `format` that was asked for is one more allowed container; a playlist asked for by its `format` may name
    files, if it is a file itself. The user's own options come first.
    """
    options = {"enable_drefs": "0"}  # tracks of a mov that lie in other files
    if source.format is None:
        options["pattern_type"] = "none"  # a file called a%03d.png is that file
    scheme = source.target.split(":", 1)[0] if source.kind == "network" else ""
    protocols = PROTOCOLS.get(scheme, ("none",))
    if source.kind in ("file", "device"):
        protocols = ("file", "crypto") if source.format else ("file",)
    formats = (FORMATS, *_NESTED.get(scheme, ()), *((source.format,) if source.format else ()))
    options["protocol_whitelist"], options["format_whitelist"] = ",".join(protocols), ",".join(formats)
    return options | source.options


def by_itself(path: str | None) -> bool:
    """Whether a file surely is an mp4 or mkv to every FFmpeg, so that decord and torchcodec may open it.

    It begins as one, and no text that marks a playlist comes before the first zero byte.
    """
    try:
        with open(path or "", "rb") as file:
            head = file.read(4096)
    except OSError:
        return False
    return (head[:1] == b"\0" and head[4:8] in _BOXES) or (
        head[:4] == _EBML and b"<" not in head.split(b"\0", 1)[0]
    )
