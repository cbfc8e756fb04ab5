"""Answers of the shipped models from the KV caches of every cache strategy, beside those from the full cache.

    python benchmarks/cache_answers.py --out benchmarks/results/cache_answers.json

Three ways to ask: the question in the prompt, as on the board; the question after a picture that has been
read, so that every word of it reads what is stored; and a long answer, in which each strategy is given the
words that the model says with the full cache, and names the next one.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cache import rows
from torch import Tensor

import vtoken
from vtoken.asking import quiet
from vtoken.bench.report import save_run
from vtoken.mechanism.transformers_names import cache_argument, cache_in
from vtoken.tiny import clutter, load, long_clips, pages
from vtoken.tiny.questions import held_out, prepare

QUESTIONS: dict[str, Callable[[Any], list[Any]]] = {
    "llava_pages": pages.questions,
    "llava_clutter": lambda scene: [question for question, _ in clutter.questions(scene)],
    "qwen2_5_vl_long": partial(long_clips.questions, passing=False),
}
ROWS = rows(128)


def parts_of(processor: Any, example: Any, questions: list[Any]) -> tuple[dict[str, Any], list[Tensor]]:
    """Inputs that end where the prompts of all questions begin to differ, and the rest of each prompt."""
    inputs = [prepare(processor, [(example, question)]) for question in questions]
    prompts = [given["input_ids"][0].tolist() for given in inputs]
    shared = next(i for i, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)
    length = len(prompts[0])
    first = {k: v[:, :shared] if v.shape[:2] == (1, length) else v for k, v in inputs[0].items()}
    return first, [torch.tensor([prompt[shared:]]) for prompt in prompts]


class Reader:
    """A model that reads a picture once, and then answers from its cache."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.cache = cache_argument(type(model).forward)

    def read(self, inputs: dict[str, Any]) -> Any:
        return cache_in(self.model(**inputs, use_cache=True))

    def answer(self, ids: Tensor, words: Tensor, cache: Any) -> str:
        """The answer to `words`, after the tokens `ids` that a copy of `cache` holds."""
        whole = torch.cat([ids, words], 1)
        given = {
            "input_ids": whole,
            "attention_mask": torch.ones_like(whole),
            self.cache: copy.deepcopy(cache),
        }
        out = self.model.generate(**given, max_new_tokens=6, do_sample=False)
        return self.processor.decode(out[0, whole.shape[1] :], skip_special_tokens=True).strip()

    def say(self, inputs: dict[str, Any], steps: int) -> Tensor:
        """(steps,) what the model says, whether it has ended or not."""
        out = self.model.generate(**inputs, min_new_tokens=steps, max_new_tokens=steps, do_sample=False)
        return out[0, -steps:]

    def follow(self, inputs: dict[str, Any], said: Tensor) -> int:
        """How many of the words `said` the model names before it is told them."""
        agreed = 0

        def force(batch: int, ids: Tensor) -> list[int]:
            return [int(said[ids.shape[0] - length])]

        length = inputs["input_ids"].shape[1]
        out = self.model.generate(
            **inputs, min_new_tokens=len(said), max_new_tokens=len(said), do_sample=False,
            prefix_allowed_tokens_fn=force, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        scores = torch.cat(out.logits)
        scores[:, self.model.generation_config.eos_token_id] = -torch.inf  # as min_new_tokens does
        agreed += int((scores.argmax(-1) == said).sum())
        return agreed


def ask(reader: Reader, row: str, example: Any, questions: list[Any], said: Tensor) -> Counter[str]:
    """What one row has right about one example."""
    name, options = ROWS[row]
    first, words = parts_of(reader.processor, example, questions)
    whole = dict(prepare(reader.processor, [(example, questions[0])]))
    found: Counter[str] = Counter()
    with nullcontext() if name is None else vtoken.applied(reader.model, name, **options):
        cache = reader.read(first)
        if name is not None:
            report = vtoken.report(reader.model)
            found |= {"bytes": report.kv_bytes, "bytes_full": report.kv_bytes_dense}
        for question, rest in zip(questions, words, strict=True):
            found["after"] += reader.answer(first["input_ids"], rest, cache) == question.answer
            inputs = dict(prepare(reader.processor, [(example, question)]))
            length = inputs["input_ids"].shape[1]
            out = reader.model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, length:]
            found["prompt"] += (
                reader.processor.decode(out, skip_special_tokens=True).strip() == question.answer
            )
        found["long"] += reader.follow(whole, said)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(QUESTIONS), choices=list(QUESTIONS))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--n", type=int, default=50, help="pictures or clips of the board, per model")
    parser.add_argument("--questions", type=int, default=4, help="about each")
    parser.add_argument("--steps", type=int, default=64, help="words of a long answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    quiet()
    found_rows: list[dict[str, Any]] = []
    for name in a.models:
        model, processor = load(name)
        reader, sums = Reader(model, processor), {row: Counter[str]() for row in a.rows}
        draw = torch.Generator().manual_seed(a.seed)
        asked = 0
        with torch.inference_mode():
            for example, _ in held_out(name, a.n, a.seed):
                every = QUESTIONS[name](example)
                chosen = [
                    every[i] for i in torch.randperm(len(every), generator=draw)[: a.questions].tolist()
                ]
                if len(chosen) < 2:
                    continue
                asked += len(chosen)
                said = reader.say(dict(prepare(processor, [(example, chosen[0])])), a.steps)
                for row in a.rows:
                    sums[row] += ask(reader, row, example, chosen, said)
        for row, found in sums.items():
            told: dict[str, Any] = {"model": name, "row": row, "asked": asked}
            told |= {way: round(found[way] / asked, 4) for way in ("prompt", "after")}
            told["long"] = round(found["long"] / (a.steps * a.n), 4)
            if found["bytes"]:
                told["times_fewer_bytes"] = round(found["bytes_full"] / found["bytes"], 2)
            found_rows.append(told)
            print(json.dumps(told), flush=True)
    save_run(a, torch.device("cpu"), rows=found_rows)


if __name__ == "__main__":
    main()
