"""Other packages compared with vtoken: same shape, same number of kept tokens, same clock (processor time).

`peers.sh` makes their environments and calls this once in each.

    python benchmarks/peers.py llm --out peers.json         # sparsevlm, eager attention, vtoken: in turns
    python benchmarks/peers.py tower --out peers.json       # vtoken's VisionZip: tower, scoring, selection
    python benchmarks/peers.py visionzip --out peers.json   # the published VisionZip, on its own transformers
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

BUDGET, STEPS = 0.2, 32
TOWER = dict(
    hidden_size=256, intermediate_size=1024, num_hidden_layers=24, num_attention_heads=4
)  # VisionZip: 24 layers
Times = dict[str, float]


def turns(contestants: dict[str, Callable[[], Times]], repeats: int) -> dict[str, Any]:
    """Medians in ms of every contestant, in turns; the error of one that fails."""
    out: dict[str, Any] = {}
    taken: dict[str, list[Times]] = {name: [] for name in contestants}
    for i in range(repeats + 1):
        for name, call in contestants.items():
            if name in out:
                continue
            try:
                times = call()
            except Exception as error:  # whatever another package raises is the result
                out[name] = {"failed": f"{type(error).__name__}: {error}"[:400]}
                continue
            if i:  # the first round warms up
                taken[name].append(times)
    for name, rounds in taken.items():
        if rounds:
            out[name] = {k: 1e3 * statistics.median(t[k] for t in rounds) for k in rounds[0]}
    return out


def llm(repeats: int) -> dict[str, Any]:
    """Prompt and generation with 20 % of the visual tokens of the Qwen2.5-VL shape."""
    import vtoken
    from vtoken.bench.shapes import build
    from vtoken.bench.timing import decode

    work = replace(build("qwen2.5-vl-7b-image", "cpu"), clock="cpu")
    total = work.about["visual_tokens"]
    kept = round(BUDGET * total)

    def generated(
        attention: str, strategy: str | None = None, call: Callable[[], Any] | None = None
    ) -> Times:
        work.model.set_attn_implementation(attention)
        if strategy is None:
            times = decode(work, STEPS, call)
        else:
            with vtoken.applied(work.model, strategy, budget=BUDGET):
                times = decode(work, STEPS)
        return {"prefill": times["total"] - times["decode"], **times}

    def maps() -> Times:
        """Most published code's way: the attention maps of every layer, for the scores of one."""
        config = dict(do_sample=False, min_new_tokens=STEPS + 1, max_new_tokens=STEPS + 1)
        asked = dict(output_attentions=True, return_dict_in_generate=True)
        return generated("eager", call=lambda: work.model.generate(**work.inputs, **config, **asked))

    # sparsevlm brings a package with the name of a script in this folder
    sys.path[:] = [
        folder for folder in sys.path if Path(folder or ".").resolve() != Path(__file__).resolve().parent
    ]

    def peer() -> Times:
        from sparsevlm import sparsevlm_generate

        return generated(
            "eager",
            call=lambda: sparsevlm_generate(
                work.model,
                None,
                work.inputs,
                n_vis=total,
                keep_n_vis=kept,
                max_new_tokens=STEPS,
                device="cpu",
            ),
        )

    field = {
        "transformers, SDPA": lambda: generated("sdpa"),
        "transformers, eager, output_attentions=True": maps,
        "sparsevlm 0.1.3": peer,
        "vtoken fastv": lambda: generated("sdpa", "fastv"),
        "vtoken sparsevlm": lambda: generated("sdpa", "sparsevlm"),
    }
    return {"about": work.about | {"kept": kept, "steps": STEPS}, "ms": turns(field, repeats)}


def tower(repeats: int) -> dict[str, Any]:
    """Tower, projector, scoring and selection of 20 % of 576 tokens, by vtoken's VisionZip."""
    import vtoken
    from vtoken.bench.shapes import SHAPES
    from vtoken.bench.timing import prefill

    shape = SHAPES["llava-1.5-7b"]
    work = replace(shape, tower={"cpu": tuple(TOWER.values())}, llm={"cpu": (64, 128, 1, 1, 1)}).build(
        "", "cpu"
    )
    work = replace(work, clock="cpu")

    def ours() -> Times:
        with vtoken.applied(work.model, "visionzip", budget=BUDGET):
            times = prefill(work)
        return {"tower and choosing": times["tower"] + times["choose"]}

    field = {
        "transformers, SDPA": lambda: {"tower and choosing": prefill(work)["tower"]},
        "vtoken visionzip": ours,
    }
    return {"about": {"tower": TOWER, "kept": round(BUDGET * 576)}, "ms": turns(field, repeats)}


def visionzip(repeats: int) -> dict[str, Any]:
    """The same by the published code.

    It patches the `llava` package, which no index has: the tower is run by itself.
    """
    import transformers
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.models.clip import modeling_clip

    about: dict[str, Any] = {
        "transformers": transformers.__version__,
        "tower": TOWER,
        "kept": round(BUDGET * 576),
    }
    try:
        importlib.import_module("visionzip")
    except ImportError as error:
        about["import visionzip"] = f"{type(error).__name__}: {error}"
        for name in [n for n in sys.modules if n.partition(".")[0] == "visionzip"]:
            del sys.modules[name]
        found = importlib.util.find_spec("visionzip")
        package = types.ModuleType("visionzip")
        package.__path__ = list(found.submodule_search_locations)
        sys.modules["visionzip"] = package
    from visionzip.clip_encoder import CLIPVisionTower_VisionZip
    from visionzip.utils import CLIP_EncoderLayer_forward, CLIPAttention_forward, apply_info

    torch.manual_seed(0)
    config = CLIPVisionConfig(**TOWER, image_size=336, patch_size=14)
    plain, zipped = (CLIPVisionModel(config).eval() for _ in range(2))
    images = torch.randn(1, 3, 336, 336)
    forwards = modeling_clip.CLIPEncoderLayer.forward, modeling_clip.CLIPAttention.forward
    contextual = round(about["kept"] * 30 / 221)  # the published 191 dominant and 30 contextual tokens
    apply_info(zipped, dominant_num=about["kept"] - contextual - 1, contextual_num=contextual)
    holder = CLIPVisionTower_VisionZip()
    holder.vision_tower, holder.device, holder.dtype = zipped, images.device, images.dtype

    def timed(call: Callable[[], Any], *methods: Any) -> Times:
        modeling_clip.CLIPEncoderLayer.forward, modeling_clip.CLIPAttention.forward = methods
        with torch.no_grad():
            start = time.process_time()
            call()
            return {"tower and choosing": time.process_time() - start}

    field = {
        f"transformers {transformers.__version__}, eager": lambda: timed(lambda: plain(images), *forwards),
        "visionzip 0.1.3": lambda: timed(
            lambda: holder(images), CLIP_EncoderLayer_forward, CLIPAttention_forward
        ),
    }
    return {"about": about, "ms": turns(field, repeats)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["llm", "tower", "visionzip"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="JSON; a file that exists gains this part")
    args = parser.parse_args()
    report = json.loads(args.out.read_text()) if args.out.exists() else {}
    result = report[args.part] = {"llm": llm, "tower": tower, "visionzip": visionzip}[args.part](args.repeats)
    result["threads"], result["torch"] = torch.get_num_threads(), torch.__version__
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    for name, times in result["ms"].items():
        print(f"{name:45s}", "  ".join(f"{k} {v:.1f} ms" if k != "failed" else v for k, v in times.items()))


if __name__ == "__main__":
    main()
