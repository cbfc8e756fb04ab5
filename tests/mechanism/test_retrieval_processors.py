"""Pages and queries from the processors of retrieval models, built without files: from pictures to scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

import vtoken
from tests.models.common import IMG, PAD
from tests.models.retrieval import RETRIEVERS

from .common import assert_close
from .fixed import patched
from .test_retrieval import assert_rows, expected

pytestmark = pytest.mark.skipif(not RETRIEVERS, reason="this transformers has no retrieval models")
MARKS = {
    "colpali": "<image>",
    "colqwen2": "<|image_pad|>",
    "colqwen2_5": "<|image_pad|>",
    "colmodernvbert": "<image>",
}


def tokenizer(image: str):
    """One word per id."""
    words = {f"w{i}": i for i in range(4, IMG)} | {image: IMG, "<bos>": 1, "<pad>": PAD, "<unk>": 3}
    tags = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<|vision_start|>")
    words |= {tag: IMG + 2 + i for i, tag in enumerate(tags)}
    words |= {f"<row_{r}_col_{c}>": 106 + 3 * r + c for r in range(1, 4) for c in range(1, 4)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", unk_token="<unk>", bos_token="<bos>")
    extra = [image, *tags, *(w for w in words if w.startswith("<row"))]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, additional_special_tokens=extra, **special
    )


def processor(name: str):
    words = tokenizer(MARKS[name])
    words.image_token, words.image_token_id = MARKS[name], IMG
    if name == "colpali":
        pixels = transformers.SiglipImageProcessor(size=dict(height=28, width=28))
        pixels.image_seq_length = 16
        return transformers.ColPaliProcessor(image_processor=pixels, tokenizer=words)
    if name == "colmodernvbert":
        size = dict(size=dict(longest_edge=112), max_image_size=dict(longest_edge=56))
        pixels = transformers.Idefics3ImageProcessor(**size)
        return transformers.ColModernVBertProcessor(image_processor=pixels, tokenizer=words, image_seq_len=16)
    sides = dict(min_pixels=14 * 14, max_pixels=98 * 98)
    pixels = transformers.Qwen2VLImageProcessor(patch_size=7, merge_size=2, temporal_patch_size=2, **sides)
    return transformers.ColQwen2Processor(image_processor=pixels, tokenizer=words)


def page(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", RETRIEVERS)
@torch.no_grad()
def test_from_pictures_to_scores(name):
    model, tools = RETRIEVERS[name].build(), processor(name)
    inputs = dict(tools.process_images(images=[page(40, 60, 1), page(84, 42, 2), page(60, 60, 3)]))
    queries = dict(tools.process_queries(text=["w5 w6 w7", "w9"]))
    asked, dense = model(**queries).embeddings, model(**inputs).embeddings
    visual = int((inputs["input_ids"] == IMG).sum())
    with patched(model) as spy:
        pages = model(**inputs).embeddings
        report = vtoken.report(model)
        assert report.tokens_in == visual and report.tokens_out < 0.7 * visual
        assert torch.equal(model(**queries).embeddings, asked)
    assert_rows(pages, expected(name, inputs, spy))
    scores = tools.score_retrieval(asked, pages)
    assert scores.shape == (2, 3) and pages.shape[1] < dense.shape[1]
    assert_close(scores, torch.einsum("bnd,csd->bcns", asked, pages).amax(3).sum(2))
