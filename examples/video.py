"""Ask about a video file with all visual tokens and with a share of them.

python examples/video.py
python examples/video.py --model Qwen/Qwen2.5-VL-7B-Instruct --video clip.mp4 --question "What happens?"
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

import vtoken
from vtoken import tiny
from vtoken.video import open_video, sample_uniform


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", help="Hub id or folder of a model that reads video; default: a shipped tiny one"
    )
    parser.add_argument(
        "--video", default="synthetic://7?fps=2&frames=24", help="file or address; default: synthetic"
    )
    parser.add_argument("--question", default="which digit came first?")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--strategy", default="vidcom2")
    parser.add_argument("--budget", type=float, default=0.25)
    args = parser.parse_args(arguments)

    if args.model:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto").to(device).eval()
        processor = AutoProcessor.from_pretrained(args.model)
    else:
        model, processor = tiny.load("qwen2_5_vl")

    with open_video(args.video) as video:
        frames = sample_uniform(video, args.frames)
        print(
            f"{len(frames)} of {len(video)} frames over {video.duration:.1f} s, "
            f"read by {video.backend} ({video.why})"
        )
        # the times of the frames, for models such as Qwen2.5-VL that read them
        facts = {"fps": video.fps, "total_num_frames": len(video), "duration": video.duration}
    facts["frames_indices"] = [frame.index for frame in frames]

    content = [{"type": "video"}, {"type": "text", "text": args.question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    clip = np.stack([frame.image for frame in frames])
    media = {"videos": [clip], "video_metadata": [facts], "do_sample_frames": False}
    inputs = processor(text=[prompt], **media, return_tensors="pt").to(model.device, model.dtype)

    def answer() -> str:
        out = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    print("all tokens:", answer())
    vtoken.patch(model, args.strategy, budget=args.budget)
    print(f"{args.strategy} {args.budget}:", answer())
    print(vtoken.report(model))
    vtoken.unpatch(model)


if __name__ == "__main__":
    main()
