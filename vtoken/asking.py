"""Load a model and ask it one question about one image."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

TINY_KNOWS = (
    "A tiny model knows generated scenes only: what it says about other pictures means nothing. Give --model."
)
TINY_QUESTION = "how many objects are there?"


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python or torch says that the machine or the GPU had no memory left."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    words = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in words or "out of memory" in words)


def quiet() -> None:
    """Silence transformers' progress bars and notices."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def ships(model_id: str | None) -> bool:
    """Whether `load` takes a tiny model that ships with vtoken."""
    from . import tiny

    return model_id is None or model_id in tiny.names()


def load(model_id: str | None, shipped: str = "llava") -> tuple[Any, Any]:
    """Load a model in eval mode, and its processor.

    Args:
        model_id: the name of a tiny model that ships with vtoken, a folder or a Hub id; None: the tiny model
            `shipped`.
        shipped: name of a tiny model.

    Raises:
        ValueError: if nothing of that name can be loaded.
    """
    from . import tiny

    quiet()
    if model_id is None or ships(model_id):
        return tiny.load(model_id or shipped)
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        model = AutoModelForImageTextToText.from_pretrained(model_id, dtype="auto")
        processor = AutoProcessor.from_pretrained(model_id)
    except Exception as error:  # any error that the files cause in transformers
        if out_of_memory(error):
            raise
        here = Path(model_id).is_dir()
        found = (
            "a folder without a loadable model"
            if here
            else "no tiny model, no folder, and the Hub did not give it"
        )
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"Cannot load the model {model_id!r} ({found}): {first}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), processor


def prompt(processor: Any, question: str, medium: str = "image") -> str:
    """The chat prompt of a question about one image or video; LLaVA's wording if there is no template."""
    content = [{"type": medium}, {"type": "text", "text": question}]
    if getattr(processor, "chat_template", None):
        return processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
    return f"USER: {getattr(processor, f'{medium}_token', f'<{medium}>')}\n{question} ASSISTANT:"


def prepare(model: Any, processor: Any, image: Image.Image, question: str) -> Any:
    """Model inputs of one question about one image, on the model's device and in its dtype."""
    inputs = processor(images=image, text=prompt(processor, question), return_tensors="pt")
    return to_model(model, inputs)


def to_model(model: Any, inputs: Any) -> Any:
    """Inputs on the model's device, pixels in its dtype; times keep theirs, from which positions are made."""
    inputs = inputs.to(model.device)
    for name in inputs:
        if name.startswith("pixel_values"):
            inputs[name] = inputs[name].to(model.dtype)
    return inputs


def ask(model: Any, processor: Any, inputs: Any, max_new_tokens: int) -> tuple[str, float]:
    """Generate greedily: the answer and the seconds it took."""
    start = time.perf_counter()
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    taken = time.perf_counter() - start
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip(), taken
