"""Tiny random encoders of three libraries, their blocks as plain weights, and their heads in explicit steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from . import oracle
from .oracle import Block, Linear, Norm

SIZE, PATCH, GRID = 35, 7, 5  # 25 patches, an odd number
WIDTH, DEPTH, HEADS = 32, 4, 4


def scrambled(model: Any, seed: int = 1) -> Any:
    """The model in eval mode with weights that matter: no zeros, no tiny biases, all norms different."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            scale_like = p.ndim == 1 and (
                "weight" in name or "gamma" in name or "lambda" in name or "ls" in name
            )
            if scale_like:
                p.copy_(0.8 + 0.2 * noise)
            elif p.ndim >= 2 and p.shape[-1] == WIDTH and p.shape[0] == 1:
                p.copy_(0.5 * noise)  # class tokens, positions
            elif p.ndim >= 2:
                p.copy_(noise * (1.5 / p[0].numel() ** 0.5))
            elif p.ndim:
                p.copy_(0.2 * noise)
    return model.eval()


@dataclass
class Case:
    """An encoder under test.

    Attributes:
        build: makes the model.
        prefix: tokens before the patches.
        call: (model, images) -> the output that is compared.
        head: (model, tokens after the last block (n, C), sizes) -> the output in explicit steps.
        layers: (model) -> the modules of the blocks.
        block: (module) -> plain weights.
        rope: (model) -> sines and cosines (patches, 2 * head_dim), None without.
        half: whether the rotary embedding turns the halves of a head.
    """

    build: Callable[[], Any]
    prefix: int
    call: Callable[[Any, Tensor], Tensor]
    head: Callable[[Any, Tensor, Tensor], Tensor]
    layers: Callable[[Any], list[Any]]
    block: Callable[[Any], Block]
    rope: Callable[[Any], Tensor] | None = None
    half: bool = False
    transposed: bool = False

    def blocks(self, model: Any) -> list[Block]:
        return [self.block(m) for m in self.layers(model)]

    def entering(self, model: Any, images: Tensor) -> Tensor:
        """(images, N, C), what the first block reads."""
        seen: list[Tensor] = []
        handle = self.layers(model)[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        self.call(model, images)
        handle.remove()
        return seen[0].transpose(0, 1) if self.transposed else seen[0]

    def leaving(self, model: Any, images: Tensor) -> Tensor:
        """(images, N, C), what follows the last block reads."""
        seen: list[Tensor] = []
        handle = self.layers(model)[-1].register_forward_hook(lambda _, args, out: seen.append(out))
        self.call(model, images)
        handle.remove()
        return seen[0].transpose(0, 1) if self.transposed else seen[0]

    def oracle(self, model: Any, images: Tensor, r: list[int], **options: Any) -> list[oracle.Result]:
        """One Result per image; the gradient flows back to the model's parameters."""
        rope = None if self.rope is None else self.rope(model)
        x = self.entering(model, images)
        return [
            oracle.tome(self.blocks(model), each, r, self.prefix, rope=rope, half=self.half, **options)
            for each in x
        ]

    def expected(self, model: Any, results: list[oracle.Result]) -> Tensor:
        """The model's output from the merged tokens."""
        return torch.stack([self.head(model, each.x, each.sizes) for each in results])


def images(n: int = 2, size: int | tuple[int, int] = SIZE, seed: int = 3) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def norm_of(m: Any) -> Norm | None:
    if not isinstance(m, nn.LayerNorm):
        assert m is None or isinstance(m, nn.Identity), m
        return None
    return Norm(m.weight, m.bias, m.eps)


def linear_of(m: Any) -> Linear:
    return Linear(m.weight, m.bias)


def applied_norm(m: Any, x: Tensor) -> Tensor:
    norm = norm_of(m)
    return x if norm is None else norm(x)


def act_of(m: Any) -> str:
    kind = type(m).__name__
    if kind in ("QuickGELU", "QuickGELUActivation"):
        return "quick_gelu"
    return "gelu_tanh" if kind in ("GELUTanh", "GELUTanhActivation", "PytorchGELUTanh") else "gelu"


# -- timm ----------------------------------------------------------------------------------------------------
def timm_block(m: Any) -> Block:
    a = m.attn
    if a.qkv is None:
        q, k, v = (linear_of(x) for x in (a.q_proj, a.k_proj, a.v_proj))
    else:
        weights = a.qkv.weight.chunk(3)
        if a.qkv.bias is not None:
            biases = a.qkv.bias.chunk(3)
        elif getattr(a, "q_bias", None) is not None:
            biases = (a.q_bias, torch.zeros_like(a.q_bias) if a.k_bias is None else a.k_bias, a.v_bias)
        else:
            biases = (None, None, None)
        q, k, v = (Linear(w, b) for w, b in zip(weights, biases))
    ls = [getattr(m, f"gamma_{i}", None) for i in (1, 2)]
    for i in (1, 2):
        ls[i - 1] = getattr(getattr(m, f"ls{i}", None), "gamma", ls[i - 1])
    norms = dict(q_norm=norm_of(a.q_norm), k_norm=norm_of(a.k_norm))
    ends = dict(fc1=linear_of(m.mlp.fc1), fc2=linear_of(m.mlp.fc2), heads=a.num_heads, ls1=ls[0], ls2=ls[1])
    return Block(
        norm_of(m.norm1), q, k, v, linear_of(a.proj), norm_of(m.norm2), act=act_of(m.mlp.act), **ends, **norms
    )


def timm_head(model: Any, x: Tensor, sizes: Tensor) -> Tensor:
    x, p = applied_norm(model.norm, x), model.num_prefix_tokens
    if hasattr(model, "head_dist"):
        return (linear_of(model.head)(x[0]) + linear_of(model.head_dist)(x[1])) / 2
    if model.global_pool == "token":
        pooled = x[0]
    elif model.global_pool == "avg":
        pooled = oracle.mean_pool(x, sizes, p)
    elif model.global_pool == "avgmax":
        pooled = (oracle.mean_pool(x, sizes, p) + x[p:].amax(0)) / 2
    else:
        pooled = timm_map(model.attn_pool, x[p:], sizes[p:])
    return linear_of(model.head)(applied_norm(model.fc_norm, pooled))


def timm_map(pool: Any, x: Tensor, sizes: Tensor) -> Tensor:
    q = linear_of(pool.q)(pool.latent[0].double())
    k, v = linear_of(pool.kv)(x).chunk(2, 1)
    out = linear_of(pool.proj)(oracle.attention_pool(q, k, v, sizes, pool.num_heads))
    h = oracle.activation(act_of(pool.mlp.act), linear_of(pool.mlp.fc1)(norm_of(pool.norm)(out)))
    return (out + linear_of(pool.mlp.fc2)(h))[0]


def timm_vit(**options: Any) -> Any:
    timm = pytest.importorskip("timm")
    kind = options.pop("kind", "VisionTransformer")
    module = (
        timm.models.deit
        if "Distilled" in kind
        else timm.models.eva
        if kind == "Eva"
        else timm.models.vision_transformer
    )
    shape = dict(
        img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=6
    )
    return scrambled(getattr(module, kind)(**shape, mlp_ratio=2.0, **options))


def timm_case(prefix: int, **options: Any) -> Case:
    return Case(
        lambda: timm_vit(**options),
        prefix,
        lambda m, x: m(x),
        timm_head,
        lambda m: list(m.blocks),
        timm_block,
    )


def eva_case(prefix: int, half: bool = False, **options: Any) -> Case:
    case = timm_case(prefix, kind="Eva", use_rot_pos_emb=True, rope_rotate_half=half, **options)
    case.rope, case.half = (lambda m: m.rope.get_embed()), half
    return case


TIMM = {
    "plain": timm_case(1),
    "layer_scale": timm_case(1, init_values=0.3),
    "qk_norm": timm_case(1, qk_norm=True),
    "registers": timm_case(5, reg_tokens=4),
    "registers_outside": timm_case(5, reg_tokens=4, no_embed_class=True),
    "distilled": timm_case(2, kind="VisionTransformerDistilled"),
    "no_cls_avg": timm_case(0, class_token=False, global_pool="avg"),
    "no_cls_map": timm_case(0, class_token=False, global_pool="map"),
    "cls_avg": timm_case(1, global_pool="avg"),
    "cls_avgmax": timm_case(1, global_pool="avgmax"),
    "cls_map": timm_case(1, global_pool="map"),
    "pre_norm": timm_case(1, pre_norm=True),
    "no_bias": timm_case(1, qkv_bias=False),
    "eva": eva_case(1),
    "eva_half": eva_case(1, half=True),
    "eva_split": eva_case(1, qkv_fused=False, init_values=0.2),
    "eva_registers": eva_case(4, num_reg_tokens=3),
    "eva_qk_norm": eva_case(1, attn_type="rope", qk_norm=True),
}


# -- open_clip -----------------------------------------------------------------------------------------------
def clip_block(m: Any) -> Block:
    a = m.attn
    q, k, v = (Linear(w, b) for w, b in zip(a.in_proj_weight.chunk(3), a.in_proj_bias.chunk(3)))
    ls1, ls2 = (getattr(ls, "gamma", None) for ls in (m.ls_1, m.ls_2))
    ends = dict(
        fc1=linear_of(m.mlp.c_fc), fc2=linear_of(m.mlp.c_proj), heads=a.num_heads, act=act_of(m.mlp.gelu)
    )
    return Block(norm_of(m.ln_1), q, k, v, linear_of(a.out_proj), norm_of(m.ln_2), **ends, ls1=ls1, ls2=ls2)


def clip_head(model: Any, x: Tensor, sizes: Tensor) -> Tensor:
    v = model.visual
    if v.attn_pool is not None:
        pool, keys = v.attn_pool, norm_of(v.attn_pool.ln_k)(x)
        a, q = pool.attn, norm_of(pool.ln_q)(pool.query.double())
        weights = (
            a.in_proj_weight.chunk(3)
            if a.q_proj_weight is None
            else (a.q_proj_weight, a.k_proj_weight, a.v_proj_weight)
        )
        (wq, wk, wv), (bq, bk, bv) = weights, a.in_proj_bias.chunk(3)
        read = oracle.attention_pool(
            Linear(wq, bq)(q), Linear(wk, bk)(keys), Linear(wv, bv)(keys), sizes, a.num_heads
        )
        x, sizes = norm_of(v.ln_post)(linear_of(a.out_proj)(read)), torch.ones(len(q)).double()
    elif v.final_ln_after_pool:
        pooled = x[0] if v.pool_type == "tok" else oracle.mean_pool(x, sizes, 1)
        return norm_of(v.ln_post)(pooled) @ v.proj.double()
    else:
        x = norm_of(v.ln_post)(x)
    return (x[0] if v.pool_type == "tok" else oracle.mean_pool(x, sizes, 1)) @ v.proj.double()


def open_clip_model(batch_first: bool = True, quick_gelu: bool = False, **options: Any) -> Any:
    open_clip = pytest.importorskip("open_clip")
    text = dict(context_length=8, vocab_size=50, width=16, heads=2, layers=1)
    vision = dict(
        image_size=SIZE, patch_size=PATCH, width=WIDTH, layers=DEPTH, head_width=WIDTH // HEADS, mlp_ratio=2.0
    )
    model = open_clip.CLIP(16, vision | options, text, quick_gelu=quick_gelu)
    if not batch_first:  # as towers of earlier releases were built
        transformer = model.visual.transformer
        transformer.batch_first = False
        for block in transformer.resblocks:
            block.attn.batch_first = False
    return scrambled(model)


def open_clip_case(batch_first: bool = True, **options: Any) -> Case:
    return Case(
        lambda: open_clip_model(batch_first, **options),
        1,
        lambda m, x: m.encode_image(x),
        clip_head,
        lambda m: list(m.visual.transformer.resblocks),
        clip_block,
        transposed=not batch_first,
    )


OPEN_CLIP = {
    "tok": open_clip_case(),
    "quick_gelu": open_clip_case(quick_gelu=True),
    "layer_scale": open_clip_case(ls_init_value=0.3),
    "avg": open_clip_case(pool_type="avg", final_ln_after_pool=True),
    "coca": open_clip_case(attentional_pool=True, attn_pooler_queries=3, attn_pooler_heads=2),
    "sequence_first": open_clip_case(batch_first=False),
}


# -- transformers --------------------------------------------------------------------------------------------
def hf_block(m: Any) -> Block:
    def first(*names: str) -> Any:
        return next((getattr(m, n) for n in names if hasattr(m, n)), None)

    a, act = first("self_attn", "attention"), getattr(m.mlp, "activation_fn", None) or m.mlp.activation
    heads = getattr(a, "num_heads", None) or getattr(a, "num_attention_heads", HEADS)
    out = getattr(a, "out_proj", None) or getattr(a, "o_proj", None)
    q = getattr(a, "q_proj", None)
    if q is None:  # DINOv2 of earlier releases
        out, (q, k, v) = a.output.dense, (a.attention.query, a.attention.key, a.attention.value)
    else:
        k, v = a.k_proj, a.v_proj
    ls1, ls2 = (getattr(getattr(m, f"layer_scale{i}", None), "lambda1", None) for i in (1, 2))
    ends = dict(fc1=linear_of(m.mlp.fc1), fc2=linear_of(m.mlp.fc2), heads=int(heads), act=act_of(act))
    norms = (
        norm_of(first("layer_norm1", "layernorm_before", "norm1")),
        norm_of(first("layer_norm2", "layernorm_after", "norm2")),
    )
    return Block(norms[0], *map(linear_of, (q, k, v, out)), norms[1], **ends, ls1=ls1, ls2=ls2)


def hf_head(model: Any, x: Tensor, sizes: Tensor) -> Tensor:
    if hasattr(model, "head"):  # SigLIP
        h, a = applied_norm(model.post_layernorm, x), model.head.attention
        parts = [Linear(w, b) for w, b in zip(a.in_proj_weight.chunk(3), a.in_proj_bias.chunk(3))]
        q, k, v = parts[0](model.head.probe[0].double()), parts[1](h), parts[2](h)
        out = linear_of(a.out_proj)(oracle.attention_pool(q, k, v, sizes, a.num_heads))
        mlp = model.head.mlp
        inside = linear_of(mlp.fc1)(norm_of(model.head.layernorm)(out))
        return (out + linear_of(mlp.fc2)(oracle.activation("gelu_tanh", inside)))[0]
    if hasattr(model, "post_layernorm"):
        return norm_of(model.post_layernorm)(x[0])
    normed = norm_of(model.layernorm)(x)[0]
    pooler = getattr(model, "pooler", None)
    return normed if pooler is None else linear_of(pooler.dense)(normed).tanh()


def hf_layers(model: Any) -> list[Any]:
    return list(next(m for m in model.modules() if isinstance(m, nn.ModuleList)))


def hf_model(kind: str, attention: str = "sdpa", **options: Any) -> Any:
    import transformers as tf

    name = kind.replace("Model", "").replace("Vision", "") + (
        "VisionConfig" if "Vision" in kind else "Config"
    )
    shape = dict(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        image_size=SIZE,
        patch_size=PATCH,
    )
    mlp = dict(mlp_ratio=2) if "Dinov2" in kind else dict(intermediate_size=2 * WIDTH)
    config = getattr(tf, name)(**shape, **mlp, **options)
    config._attn_implementation = attention
    return scrambled(getattr(tf, kind)(config))


def hf_case(kind: str, prefix: int, attention: str, **options: Any) -> Case:
    return Case(
        lambda: hf_model(kind, attention, **options),
        prefix,
        lambda m, x: m(pixel_values=x).pooler_output,
        hf_head,
        hf_layers,
        hf_block,
    )


HF = {
    f"{kind}-{attention}": hf_case(kind, prefix, attention, **options)
    for attention in ("sdpa", "eager")
    for kind, prefix, options in (
        ("CLIPVisionModel", 1, {}),
        ("SiglipVisionModel", 0, {}),
        ("ViTModel", 1, {}),
        ("DeiTModel", 2, {}),
        ("Dinov2Model", 1, {}),
        ("Dinov2WithRegistersModel", 5, {"num_register_tokens": 4}),
    )
}
CASES = {
    f"{name}-{k}": v
    for name, some in (("timm", TIMM), ("open_clip", OPEN_CLIP), ("hf", HF))
    for k, v in some.items()
}
