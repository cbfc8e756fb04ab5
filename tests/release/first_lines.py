"""The first lines of the README, on a random LLaVA that is built from its config: no network, no extra.

python -I tests/release/first_lines.py --bare       # of the installed package, where no extra is installed
python tests/release/first_lines.py README.md       # of a file, where extras may be installed
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

# what pyproject's extras bring, and what they bring along
OPTIONAL = (
    *("av", "decord", "torchcodec", "matplotlib", "gradio", "timm", "open_clip", "torchvision", "pandas"),
    *("pyarrow", "pysubs2", "accelerate", "peft", "vllm", "lmms_eval", "skimage", "sklearn", "scipy"),
    *("trl", "torchao", "bitsandbytes", "datasets"),
)
SIDE, PATCH = 28, 7


def imported() -> set[str]:
    """The optional packages that are imported by now."""
    return {name for name in OPTIONAL if name in sys.modules}


def model_and_inputs() -> tuple[object, dict[str, object]]:
    """A LLaVA with a tower and an LLM of three layers each, random, and a prompt about one picture."""
    import torch
    import transformers as tf

    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**shape, image_size=SIDE, patch_size=PATCH, projection_dim=32),
        text_config=tf.LlamaConfig(**shape, num_key_value_heads=4, vocab_size=64, pad_token_id=0),
        image_token_id=63,
    )
    torch.manual_seed(0)
    model = tf.LlavaForConditionalGeneration(config).eval()
    model.generation_config.max_new_tokens = 4
    ids = torch.tensor([[1, *[63] * (SIDE // PATCH) ** 2, 5, 6, 7]])
    pixels = torch.rand(1, 3, SIDE, SIDE)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def first_lines(page: str) -> str:
    """The first block of Python on a Markdown page."""
    return re.findall(r"```python\n(.*?)```", page, re.S)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", nargs="?", help="default: the description of the installed package")
    parser.add_argument("--bare", action="store_true", help="fail where an optional package is installed")
    options = parser.parse_args()
    if options.bare and (there := [name for name in OPTIONAL if find_spec(name)]):
        sys.exit(f"This environment is not bare, it has {', '.join(there)}.")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import vtoken

    if found := imported():
        sys.exit(f"import vtoken imports {', '.join(sorted(found))}.")
    if options.page:
        page = Path(options.page).read_text(encoding="utf-8")
    else:
        page = str(metadata.metadata("vtoken").get_payload())
    model, inputs = model_and_inputs()
    all_tokens = model.generate(**inputs, do_sample=False)
    before = imported()  # what transformers imports for itself where it is installed
    lines = first_lines(page)
    assert "vtoken.patch(model" in lines and "vtoken.unpatch(model)" in lines, lines
    exec(compile(lines, "README.md", "exec"), {"model": model, "inputs": inputs})
    if found := imported() - before:
        sys.exit(f"The first lines import {', '.join(sorted(found))}.")
    assert model.generate(**inputs, do_sample=False).equal(all_tokens)
    print(f"vtoken {vtoken.__version__} from {Path(vtoken.__file__).parent}")


if __name__ == "__main__":
    main()
