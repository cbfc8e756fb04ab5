"""Report of the last call: visual tokens, FLOPs, KV bytes and times."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .streams import TowerUse
from .tokens import Segment


@dataclass(frozen=True)
class LayersRead:
    """The tokens of one image or video that a range of LLM layers reads.

    Attributes:
        first, last: the layers, both included, counted from 0.
        keep: (n,) ascending indices of the tokens read, counted among those of the unpatched model.
    """

    first: int
    last: int
    keep: Tensor = field(repr=False)

    def __str__(self) -> str:
        return (
            f"LLM layer {self.first}" if self.first == self.last else f"LLM layers {self.first}-{self.last}"
        )


@dataclass(frozen=True)
class VisualReport:
    """Report on one image or video of the last call.

    Attributes:
        row: row of the batch.
        modality: "image" or "video".
        tokens_in: visual tokens that the unpatched model would feed.
        tokens_out: visual tokens that entered the LLM.
        segments: the crops, frames or the one image.
        cells: (tokens_in,) cell of each token, -1 for separators.
        keep: (tokens_out,) ascending indices of the tokens that entered the LLM.
        into: (tokens_in,) index in `keep` of the token that absorbed each token, -1 for none; None if nothing
            was merged.
        layers: the tokens read by the LLM's layers, in order; more than one entry if the LLM drops tokens.
    """

    row: int
    modality: str
    tokens_in: int
    tokens_out: int
    segments: tuple[Segment, ...]
    cells: Tensor = field(repr=False)
    keep: Tensor = field(repr=False)
    into: Tensor | None = field(default=None, repr=False)
    layers: tuple[LayersRead, ...] = field(default=(), repr=False)

    @property
    def kept_cells(self) -> Tensor:
        """Cells of the tokens that entered the LLM, ascending."""
        cells = self.cells[self.keep]
        return cells[cells >= 0]


@dataclass
class Report:
    """Report on one call of a patched model: visual tokens, FLOPs, KV bytes and times.

    Attributes:
        strategy: name and hyper-parameters.
        visuals: one entry per image or video.
        prompt_tokens: per batch row, tokens of the prompt without padding.
        tokens_per_layer: per LLM layer, tokens stored for the prompt, summed over the batch, without padding.
        visual_per_layer: per LLM layer, visual tokens that it reads, summed over the batch.
        flops_dense, flops: LLM prefill FLOPs of the unpatched model and of this call.
        flops_text: those among `flops` with which the LLM read the prompt's text for the choice.
        kv_bytes_dense, kv_bytes: KV-cache bytes of the prompt, of `kv_answer` tokens after it, and of
            `kv_earlier` ones before it.
        seconds: measured seconds by name: "tower", "select", "prefill"; GPU times are read when the report is
            made.
        tower: per modality, the work of a tower that reuses between frames, of its latest call; else empty.
        budget_counts: what the strategy's budget counts, in words; empty if unknown.
        kv_answer: tokens that were read after the prompt, per row, where a strategy evicts tokens from the
            KV cache; its bytes are those after the latest of them. None for other strategies.
        kv_earlier: tokens of earlier turns in the KV cache, per row, where a strategy holds it in a form of
            its own, whose bytes are counted as a whole; 0 for other strategies.
    """

    strategy: str
    visuals: list[VisualReport]
    prompt_tokens: list[int]
    tokens_per_layer: list[int]
    visual_per_layer: list[int]
    flops_dense: float
    flops: float
    kv_bytes_dense: int
    kv_bytes: int
    seconds: dict[str, float]
    tower: dict[str, TowerUse] = field(default_factory=dict)
    budget_counts: str = ""
    flops_text: float = 0.0
    kv_answer: int | None = None
    kv_earlier: int = 0

    @property
    def tokens_in(self) -> int:
        """Visual tokens of the unpatched model, over all images and videos."""
        return sum(v.tokens_in for v in self.visuals)

    @property
    def tokens_out(self) -> int:
        """Visual tokens that entered the LLM, over all images and videos."""
        return sum(v.tokens_out for v in self.visuals)

    @property
    def prompts(self) -> int:
        """Rows of the batch; copies for beams do not count if they were made after the encoding."""
        return max(1, len(self.prompt_tokens))

    @property
    def average_visual_tokens(self) -> float:
        """Visual tokens per prompt, averaged over the LLM's layers, as papers count multi-layer methods."""
        return sum(self.visual_per_layer) / max(1, len(self.visual_per_layer)) / self.prompts

    def to_dict(self) -> dict[str, Any]:
        """Numbers and strings, for JSON."""
        return {
            "strategy": self.strategy,
            "visuals": [
                {
                    "row": v.row,
                    "modality": v.modality,
                    "tokens_in": v.tokens_in,
                    "tokens_out": v.tokens_out,
                    "layers": [{"first": r.first, "last": r.last, "tokens": len(r.keep)} for r in v.layers],
                }
                for v in self.visuals
            ],
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "average_visual_tokens": self.average_visual_tokens,
            "prompt_tokens": self.prompt_tokens,
            "visual_per_layer": self.visual_per_layer,
            "flops_dense": self.flops_dense,
            "flops": self.flops,
            "flops_text": self.flops_text,
            "kv_bytes_dense": self.kv_bytes_dense,
            "kv_bytes": self.kv_bytes,
            "kv_answer": self.kv_answer,
            "kv_earlier": self.kv_earlier,
            "seconds": self.seconds,
            "tower": {modality: use.to_dict() for modality, use in self.tower.items()},
        }

    def __str__(self) -> str:
        def change(now: float, dense: float) -> str:
            return f"{now / dense:.1%}" if dense else "-"

        lines = [f"vtoken report: {self.strategy}"]
        if self.budget_counts:
            lines.append(f"  the budget counts {self.budget_counts}")
        for v in self.visuals:
            parts = f"{len(v.segments)} {v.segments[-1].kind}s, " if len(v.segments) > 1 else ""
            head = f"  {v.modality} in row {v.row}: {parts}{v.tokens_in}"
            if len(v.layers) < 2:
                lines.append(f"{head} -> {v.tokens_out} visual tokens ({change(v.tokens_out, v.tokens_in)})")
                continue
            lines.append(f"{head} visual tokens")
            read = [(r, len(r.keep)) for r in v.layers]
            lines += [f"    {r}: {n} of {v.tokens_in} ({change(n, v.tokens_in)})" for r, n in read]
        for modality, use in self.tower.items():
            lines.append(
                f"  {modality} tower: {len(use.tokens)} frame{'s' * (len(use.tokens) != 1)},"
                f" {use.references} of them in full,"
                f" {sum(use.recomputed)} of {sum(use.tokens)} tokens computed, {_si(use.flops)}FLOP instead"
                f" of {_si(use.flops_dense)}FLOP ({change(use.flops, use.flops_dense)})"
            )
        layers = self.visual_per_layer
        many, together = self.prompts > 1, f", {self.prompts} prompts together" if self.prompts > 1 else ""
        lines.append(
            f"  visual tokens{' per prompt' if many else ''}, average over {len(layers)} LLM layers: "
            f"{self.average_visual_tokens:.1f}"
        )
        if len(set(layers)) > 1:
            lines.append(f"  visual tokens per LLM layer{together}: {' '.join(map(str, layers))}")
        lines.append(
            f"  LLM prefill{together}: {_si(self.flops)}FLOP instead of {_si(self.flops_dense)}FLOP "
            f"({change(self.flops, self.flops_dense)})"
            + (f", {_si(self.flops_text)}FLOP of it to choose by the text" if self.flops_text else "")
        )
        more = f", {self.kv_earlier} tokens before" if self.kv_earlier else ""
        more += f" and {self.kv_answer} tokens of the answer" if self.kv_answer else ""
        lines.append(
            f"  KV cache of the prompt{'s' if many else ''}{more}: {_si(self.kv_bytes)}B instead of"
            f" {_si(self.kv_bytes_dense)}B ({change(self.kv_bytes, self.kv_bytes_dense)})"
        )
        times = ", ".join(f"{name} {1000 * s:.2f} ms" for name, s in self.seconds.items())
        lines.append(f"  time: {times}")
        return "\n".join(lines)


def _si(x: float) -> str:
    for factor, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= factor:
            return f"{x / factor:.2f} {unit}"
    return f"{x:.0f} "


@dataclass
class EncoderReport:
    """Report on one call of a patched encoder.

    GFLOPs count one per multiply-add of patch embedding and layers, as papers on vision transformers do.

    Attributes:
        strategy: name and hyper-parameters.
        images: images of the batch.
        frames: images that share a sequence after the last layer; 1 unless frames of videos were fused.
        prefix: tokens of an image that are no patches.
        patches: patches of an image.
        tokens_per_layer: per layer, tokens of an image that pass its MLP, prefix included.
        gflops_dense, gflops: per image, unpatched and as it ran.
        seconds: measured seconds of the layers, under "encoder"; empty for compiled calls.
        grid: (rows, columns) of the patches; None for images of another size than the model's own.
        owner: (images / frames, frames, patches) int64, the token that each patch ended up in, -1 for a
            dropped patch; None if nothing was merged.
    """

    strategy: str
    images: int
    frames: int
    prefix: int
    patches: int
    tokens_per_layer: list[float]
    gflops_dense: float
    gflops: float
    seconds: dict[str, float]
    grid: tuple[int, int] | None = None
    owner: Tensor | None = field(default=None, repr=False)

    @property
    def tokens_in(self) -> int:
        """Patch tokens of an image that the unpatched encoder computes."""
        return self.patches

    @property
    def tokens_out(self) -> float:
        """Patch tokens of an image after the last layer; of fused frames their mean."""
        return self.tokens_per_layer[-1] - self.prefix

    def to_dict(self) -> dict[str, Any]:
        """Numbers and strings, for JSON."""
        names = ("strategy", "images", "frames", "prefix", "patches", "tokens_per_layer", "gflops_dense")
        return {n: getattr(self, n) for n in (*names, "gflops", "seconds")}

    def __str__(self) -> str:
        tokens = " ".join(f"{round(n, 2):g}" for n in self.tokens_per_layer)
        images = f"{self.images} image{'s' * (self.images != 1)}"
        prefix = f", {self.prefix} prefix token{'s' * (self.prefix > 1)} included" * bool(self.prefix)
        fused = f", {self.frames} of them in a sequence" if self.frames > 1 else ""
        lines = [
            f"vtoken report: {self.strategy}",
            f"  {images}{fused}: {self.patches} -> {round(self.tokens_out, 2):g} patch tokens each"
            f" ({self.tokens_out / self.patches:.1%})",
            f"  tokens per layer{prefix}: {tokens}",
            f"  per image {self.gflops:.3g} GFLOPs instead of {self.gflops_dense:.3g}"
            f" ({self.gflops / self.gflops_dense:.1%}), a multiply-add counted once",
        ]
        lines += [f"  time: {name} {1000 * s:.2f} ms" for name, s in self.seconds.items()]
        return "\n".join(lines)
