"""Serving with vLLM: vtoken against plain vLLM and vLLM's own pruning of videos, with random weights.

    python benchmarks/serving.py --out serving.json       # the shapes of a CPU, in the environment of vLLM
    python benchmarks/serving.py --only llava --requests 16 --turns 3

Every contestant has engines in processes of its own, which take turns (A B C A B C). All requests of an
engine arrive at once, with pictures of their own; prefix and processor caches are off. Reported are medians
over the turns of requests/s, by the wall clock and by processor time, which other work on the machine
disturbs less, of the time to the first token, of prompt tokens and of KV blocks; and the ratios to plain
vLLM. On the CPU vLLM's runner does not switch its pruning of videos on, so this script sets that flag.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from vtoken import tiny
from vtoken.integrations.vllm import overrides

BLOCK = 32
QUESTION = "how many objects are there?"
LLM = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
LLM |= {"num_key_value_heads": 12, "head_dim": 64, "max_position_embeddings": 4096}
CONTESTANTS: dict[str, dict[str, dict[str, Any]]] = {
    "llava": {
        "vLLM": {},
        "hired 0.2": {"vtoken": ["hired", 0.2, {}]},
        "hired 0.2, renumber": {"vtoken": ["hired", 0.2, {"positions": "renumber"}]},
    },
    "qwen2_5_vl": {
        "vLLM": {},
        "vLLM, EVS 0.75": {"evs": 0.75},
        "uniform 0.25": {"vtoken": ["uniform", 0.25, {}]},
        "divprune 0.25": {"vtoken": ["divprune", 0.25, {}]},
        "vidcom2 0.25": {"vtoken": ["vidcom2", 0.25, {"exact": True}]},
    },
}


def build(name: str, folder: Path) -> None:
    """Save a model of random weights with the processor of a tiny one: 576 tokens an image, 512 a clip."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    config, processor = (c.from_pretrained(tiny.path(name)) for c in (AutoConfig, AutoProcessor))
    text, vision = config.get_text_config(), config.vision_config
    for key, value in LLM.items():
        setattr(text, key, value)
    if getattr(text, "layer_types", None):
        text.layer_types = ["full_attention"] * LLM["num_hidden_layers"]
    if name == "llava":
        changed = {
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 7,
            "num_attention_heads": 6,
        }
        changed |= {"image_size": 336, "patch_size": 14}
        images = processor.image_processor
        images.size, images.crop_size, processor.patch_size = (
            {"shortest_edge": 336},
            {"height": 336, "width": 336},
            14,
        )
    else:
        changed = {"hidden_size": 384, "intermediate_size": 1024, "depth": 6, "num_heads": 6}
        changed |= {"out_hidden_size": LLM["hidden_size"], "fullatt_block_indexes": [2, 5]}
        vision.rope_parameters = dict(vision.rope_parameters, rope_theta=10000.0)
        text.rope_parameters = dict(text.rope_parameters, mrope_section=[8, 12, 12])
        processor.video_processor.size = {"shortest_edge": 1, "longest_edge": 2**30}
    for key, value in changed.items():
        setattr(vision, key, value)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    if name == "llava":
        rename(folder / "model.safetensors")


def rename(file: Path) -> None:
    """Write the names of a CLIP tower as plain vLLM reads them; transformers 5 leaves out a level."""
    from safetensors.torch import load_file, save_file

    old, new = "vision_tower.", "vision_tower.vision_model."
    tensors = {k if new in k else k.replace(old, new): v for k, v in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


def requests(name: str, folder: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Prompts with random pictures, no two alike."""
    from PIL import Image
    from transformers import AutoProcessor

    processor, random = AutoProcessor.from_pretrained(folder), np.random.default_rng(seed)
    kind = "image" if name == "llava" else "video"
    content = [{"type": kind}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    out = []
    for _ in range(count):
        if kind == "image":
            media: Any = Image.fromarray(random.integers(0, 256, (336, 336, 3), np.uint8))
        else:
            frames = random.integers(
                0, 256, (16, 8 * 2 * patch_size(folder), 8 * 2 * patch_size(folder), 3), np.uint8
            )
            about = {"total_num_frames": 16, "fps": 2.0, "frames_indices": list(range(16))}
            media = (frames, about | {"video_backend": "opencv", "do_sample_frames": False})
        out.append({"prompt": prompt, "multi_modal_data": {kind: media}})
    return out


def patch_size(folder: Path) -> int:
    """Side of a patch of Qwen2.5-VL's tower, px."""
    return int(json.loads((folder / "config.json").read_text())["vision_config"]["patch_size"])


def serve(name: str, folder: Path, spec: dict[str, Any], count: int, new: int, device: str) -> dict[str, Any]:
    """One engine: its speed on `count` requests at once, after as many that are not counted."""
    from vllm import LLM as Engine
    from vllm import SamplingParams

    kind = "image" if name == "llava" else "video"
    options = overrides(str(folder), *spec["vtoken"][:2], **spec["vtoken"][2]) if "vtoken" in spec else {}
    if "evs" in spec:
        options["video_pruning_rate"] = spec["evs"]
    engine = Engine(
        str(folder),
        dtype="float32" if device == "cpu" else "bfloat16",
        enforce_eager=device == "cpu",
        max_model_len=2048,
        max_num_seqs=8,
        max_num_batched_tokens=2048,
        block_size=BLOCK,
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        limit_mm_per_prompt={kind: 1},
        disable_log_stats=False,
        **options,
    )
    if "evs" in spec and device == "cpu":
        core: Any = engine.llm_engine.engine_core
        core.engine_core.model_executor.driver_worker.worker.model_runner.is_multimodal_pruning_enabled = True
    settings = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    engine.generate(requests(name, folder, count, 1), settings, use_tqdm=False)
    asked = requests(name, folder, count, 2)
    wall, cpu = time.perf_counter(), time.process_time()
    outs = engine.generate(asked, settings, use_tqdm=False)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    first = sorted(o.metrics.first_token_latency for o in outs)
    prompt = [len(o.prompt_token_ids) for o in outs]
    return {
        "prompt tokens": statistics.mean(prompt),
        "requests/s": count / wall,
        "requests per processor second": count / cpu,
        "first token s p50": first[len(first) // 2],
        "first token s p95": first[min(len(first) - 1, int(0.95 * len(first)))],
        "KV blocks": sum(-(-(n + new) // BLOCK) for n in prompt),
    }


def median(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def run(name: str, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All contestants of one model, in turns."""
    rows: dict[str, list[dict[str, Any]]] = {label: [] for label in CONTESTANTS[name]}
    with tempfile.TemporaryDirectory() as folder:
        build(name, Path(folder))
        for turn in range(arguments.turns):
            for label, spec in CONTESTANTS[name].items():
                told = {"name": name, "folder": folder, "spec": spec, "count": arguments.requests}
                told |= {"new": arguments.new, "device": arguments.device}
                out = Path(folder) / "row.json"
                command = [sys.executable, __file__, "--serve", json.dumps(told), "--out", str(out)]
                with (Path(folder) / "log").open("w+") as log:
                    if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode:
                        log.seek(0)
                        raise SystemExit(f"{name}, {label}:\n{log.read()[-3000:]}")
                rows[label].append(json.loads(out.read_text()))
                print(f"turn {turn + 1}, {name}, {label}: {rows[label][-1]}", flush=True)
    found = {label: median(each) for label, each in rows.items()}
    for row in found.values():
        for key in ("requests/s", "requests per processor second"):
            row[f"{key}, ratio"] = row[key] / found["vLLM"][key]
    return found


def draw(report: dict[str, Any], path: Path) -> None:
    """Requests per processor second, relative to plain vLLM, by contestant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots(1, len(report["models"]), squeeze=False)[0]
    for axis, (name, rows) in zip(axes, report["models"].items()):
        ratios = {label: row["requests per processor second, ratio"] for label, row in rows.items()}
        bars = axis.barh(list(ratios), list(ratios.values()))
        axis.bar_label(bars, fmt="%.1f")
        axis.invert_yaxis()
        axis.set(title=name, xlabel="requests per processor second, plain vLLM = 1")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=sorted(CONTESTANTS), help="one model; both if left out")
    parser.add_argument("--requests", type=int, default=12, help="per engine, all at once")
    parser.add_argument("--new", type=int, default=8, help="generated tokens")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, default=Path("serving.json"))
    parser.add_argument("--plot", type=Path, help="draw what is in --out into this picture, run nothing")
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plot:
        draw(json.loads(arguments.out.read_text()), arguments.plot)
        return
    if arguments.device == "cpu":
        os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if arguments.serve:
        told = arguments.serve | {"folder": Path(arguments.serve["folder"])}
        arguments.out.write_text(json.dumps(serve(**told)))
        return
    import torch

    from vtoken.bench.report import machine

    names = [arguments.only] if arguments.only else list(CONTESTANTS)
    facts = {"requests": arguments.requests, "new tokens": arguments.new, "turns": arguments.turns}
    report: dict[str, Any] = {"machine": machine(torch.device(arguments.device))}
    report["about"] = dict.fromkeys(names, facts)
    report["models"] = {name: run(name, arguments) for name in names}
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
