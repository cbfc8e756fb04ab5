"""How much faster the prefill becomes, next to what the FLOPs promise.

    python benchmarks/overhead.py                       # a mid-sized LLaVA shape, random weights, CPU or GPU
    python benchmarks/overhead.py --strategies hired fastv --budgets 0.5 0.2 --repeats 9 --output figures.json

Unpatched and patched calls alternate inside one process; every figure is the median of ratios of neighbouring calls.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vtoken

SHAPES = {
    "mid": dict(hidden=1024, intermediate=2752, layers=8, heads=16, tower=256, tower_layers=6),
    "7b": dict(hidden=4096, intermediate=11008, layers=32, heads=32, tower=1024, tower_layers=24),
}
IMAGE, TEXT_TOKENS = 31999, 48


def build(shape: dict[str, int], device: str, dtype: torch.dtype) -> Any:
    """A LLaVA of the given shape with random weights: 24 x 24 visual tokens per image."""
    vision = CLIPVisionConfig(
        hidden_size=shape["tower"],
        intermediate_size=4 * shape["tower"],
        num_hidden_layers=shape["tower_layers"],
        num_attention_heads=shape["tower"] // 64,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=32000,
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        max_position_embeddings=4096,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    torch.manual_seed(0)
    with torch.device(device):
        return LlavaForConditionalGeneration._from_config(config, dtype=dtype).eval()


def inputs_for(model: Any) -> dict[str, Any]:
    ids = torch.randint(5, 1000, (1, TEXT_TOKENS + 576), generator=torch.Generator().manual_seed(0))
    ids[:, 8 : 8 + 576] = IMAGE
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)
    return dict(input_ids=ids.to(model.device), pixel_values=pixels, use_cache=True, logits_to_keep=1)


def timed(model: Any, inputs: dict[str, Any]) -> tuple[float, float]:
    """Seconds of a whole prefill and of its language-model part, selection included."""
    marks: list[float] = []

    def mark(*_: Any) -> None:
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    decoder = model.get_decoder()
    handles = [decoder.register_forward_pre_hook(mark, prepend=True), decoder.register_forward_hook(mark)]
    try:
        with torch.inference_mode():
            mark()
            model(**inputs)
            mark()
    finally:
        for handle in handles:
            handle.remove()
    return marks[3] - marks[0], marks[2] - marks[1]


def measure(model: Any, inputs: dict[str, Any], strategy: str, budget: float, repeats: int) -> dict[str, Any] | None:
    """Ratios patched / unpatched of neighbouring calls, and the share of the unpatched prefill spent on choosing.

    None for a budget that the strategy cannot reach in a model of so few layers.
    """
    try:
        vtoken.unpatch(vtoken.patch(model, strategy, budget=budget))
    except ValueError as refusal:
        print(f"left out: {refusal}")
        return None
    whole, language, choosing = [], [], []
    for i in range(repeats + 1):
        dense = timed(model, inputs)
        vtoken.patch(model, strategy, budget=budget)
        short = timed(model, inputs)
        report = vtoken.report(model)
        vtoken.unpatch(model)
        if i:  # the first pair warms up
            whole.append(short[0] / dense[0])
            language.append(short[1] / dense[1])
            choosing.append(report.seconds["select"] / dense[1])
    promised = report.flops / report.flops_dense
    measured = statistics.median(language)
    return {
        "strategy": strategy,
        "budget": budget,
        "tokens": [report.tokens_in, report.average_visual_tokens],
        "promised_llm_ratio": promised,
        "measured_llm_ratio": measured,
        "measured_llm_ratio_spread": [min(language), max(language)],
        "speedup_measured_over_promised": promised / measured,
        "whole_prefill_ratio": statistics.median(whole),
        "select_share_of_unpatched_prefill": statistics.median(choosing),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--strategies", nargs="+", help="default: every strategy that fits the model")
    parser.add_argument("--budgets", nargs="+", type=float, default=[1.0, 0.5, 0.33, 0.2, 0.1])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device != "cpu" else torch.float32
    model = build(SHAPES[args.shape], args.device, dtype)
    inputs = inputs_for(model)
    names = args.strategies or vtoken.list_strategies(model=model)
    cases = [(s, b) for s in names for b in args.budgets]
    measured = [measure(model, inputs, s, b, args.repeats) for s, b in track(cases, description="prefill")]
    rows = [row for row in measured if row is not None]
    table = Table("strategy", "budget", "tokens", "LLM promised", "LLM measured", "speed-up kept", "whole", "choosing")
    for r in rows:
        table.add_row(
            r["strategy"],
            f"{r['budget']:.2f}",
            f"{r['tokens'][1]:.0f}/{r['tokens'][0]}",
            f"{r['promised_llm_ratio']:.3f}",
            f"{r['measured_llm_ratio']:.3f}",
            f"{r['speedup_measured_over_promised']:.2f}",
            f"{r['whole_prefill_ratio']:.3f}",
            f"{r['select_share_of_unpatched_prefill']:.1%}",
        )
    Console().print(table)
    result = {
        "device": torch.cuda.get_device_name() if args.device != "cpu" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "vtoken": vtoken.__version__},
        "shape": {"name": args.shape, **SHAPES[args.shape], "visual_tokens": 576, "text_tokens": TEXT_TOKENS},
        "repeats": args.repeats,
        "results": rows,
    }
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
