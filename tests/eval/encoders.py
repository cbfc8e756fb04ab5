"""Tiny random encoders, a strategy that drops tokens by hooks, and small data sets on disk.

As a program (`python -m tests.eval.encoders DATA OUT`) it evaluates, also under `accelerate launch`.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

import vtoken
from tests.video.media import write
from vtoken.eval.benchmarks.encoder_models import EncoderModel
from vtoken.eval.benchmarks.example_encoder_data import write_msrvtt
from vtoken.eval.benchmarks.imagenet import ImageNet, load
from vtoken.eval.running.encoder_runs import plan
from vtoken.eval.running.encoders import EncoderEvaluation
from vtoken.eval.running.runner import Processes
from vtoken.strategies import registry

SIZE, CLASSES = 32, 5


def preprocess(image: Image.Image) -> torch.Tensor:
    assert image.mode == "RGB"
    return to_tensor(image.resize((SIZE, SIZE))) - 0.5


def classifier(classes: int = CLASSES) -> EncoderModel:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(1)
    model = VisionTransformer(
        img_size=SIZE, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=classes
    )
    return EncoderModel("timm:tiny", model.eval(), preprocess)


def dual_encoder() -> EncoderModel:
    import open_clip

    torch.manual_seed(1)
    vision = {"image_size": SIZE, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    model = open_clip.CLIP(16, vision, text).eval()
    return EncoderModel("open_clip:tiny", model, preprocess, open_clip.get_tokenizer("ViT-B-32"))


@contextlib.contextmanager
def registered():
    """The strategy `last_go` with r and frames, and the baseline `last_go_too`, for a `with` block."""

    @dataclass
    class LastGo(vtoken.Strategy):
        r: int = 3
        frames: int = 1

        def select(self, tokens):
            raise NotImplementedError

    @dataclass
    class LastGoToo(vtoken.Strategy):
        def select(self, tokens):
            raise NotImplementedError

    vtoken.register("last_go", summary="Drops the last r tokens after each block.", stages=("encoder",))(
        LastGo
    )
    vtoken.register("last_go_too", summary="The same.", stages=("encoder",), baseline=True)(LastGoToo)
    try:
        yield
    finally:
        for name in ("last_go", "last_go_too"):
            del registry._registry[name]


@contextlib.contextmanager
def applied(model, strategy, budget=None, r=3, frames=1, **options):
    """What `vtoken.applied` does, of a strategy that drops the last r tokens after each block."""
    if options.get("refuse"):
        raise ValueError("no thank you")
    tower = getattr(model, "visual", model)
    blocks = tower.blocks if hasattr(tower, "blocks") else tower.transformer.resblocks
    counts = []

    def hook(module, given, out):
        counts.append(given[0].shape[1])
        return out[:, : out.shape[1] - (0 if budget else r)]

    handles = [block.register_forward_hook(hook) for block in blocks]
    model.last_report = lambda: SimpleNamespace(
        gflops=sum(counts[-len(blocks) :]) / 1000,
        gflops_dense=counts[-len(blocks)] * len(blocks) / 1000,
        tokens_per_layer=counts[-len(blocks) :],
        frames=frames,
    )
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def report(model):
    return model.last_report()


def colour(seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((24, 20))


def image_folder(root: Path, classes: int = CLASSES, images: int = 3) -> Path:
    for c in range(classes):
        (root / f"class_{c}").mkdir(parents=True)
        for i in range(images):
            colour(10 * c + i).save(root / f"class_{c}" / f"{i}.png")
    return root


CAPTIONS = {
    "video7020": "a woman creating a fondant baby, and flower",
    "video7021": "a boy plays grand theft auto 5",
    "video7024": "a man is giving a review on a vehicle",
    "video7025": "a man speaks to children in a classroom",
    "video7026": "one micky mouse is talking to other",
}


def video_folder(root: Path) -> Path:
    """Five numbered-picture clips of different length, at 4 frames per second."""
    write_msrvtt(root, CAPTIONS, {})
    for i, video in enumerate(CAPTIONS):
        write(root / "videos" / "all" / f"{video}.mp4", range(40 * i, 40 * i + 6 + 4 * i), fps=4)
    return root


def main(data: str, out: str) -> None:
    with registered():
        encoder, processes = classifier(), Processes.found()
        vtoken.applied, vtoken.report = applied, report
        task = ImageNet(load(data, CLASSES), preprocess)
        evaluation = EncoderEvaluation(task, encoder, out, batch_size=2, processes=processes)
        for outcome in evaluation.run(plan(["last_go"], {"r": [2, 5]})):
            print(outcome.run.name, outcome.breakdown.scores["top-1"]["right"], outcome.gflops)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
