"""One prompt with all visual tokens and with a fifth of them.

python examples/quickstart.py
python examples/quickstart.py --model llava-hf/llava-1.5-7b-hf --image photo.jpg --question "What is this?"
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtoken
from vtoken import tiny
from vtoken.images import open_image
from vtoken.tiny.scenes import make_scene


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default=str(tiny.path("llava")), help="Hub id or folder; default: the shipped tiny LLaVA"
    )
    parser.add_argument("--image", help="default: a generated scene")
    parser.add_argument("--question", default="where is the yellow one?")
    parser.add_argument("--strategy", default="hired")
    parser.add_argument("--budget", type=float, default=0.2)
    args = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto").to(device).eval()
    processor = AutoProcessor.from_pretrained(args.model)
    image = open_image(args.image) if args.image else make_scene(0, "test").image

    content = [{"type": "image"}, {"type": "text", "text": args.question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=image, text=prompt, return_tensors="pt").to(device, model.dtype)

    def answer() -> str:
        out = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    print("all tokens:", answer())
    vtoken.patch(model, args.strategy, budget=args.budget)  # in place, reversible
    print(f"{args.strategy} {args.budget}:", answer())
    print(vtoken.report(model))
    vtoken.unpatch(model)  # bit-identical to before


if __name__ == "__main__":
    main()
