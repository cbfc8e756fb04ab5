"""Building blocks of the tiny models: tokenizer, chat template, configurations, starting weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vtoken.tiny.scenes import vocabulary

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
CHAT_WORDS = ("user", "assistant", "system", ":", ".", ",", "!", "object", "please")


def chat_template(video: bool = False) -> str:
    """``user: <image>\\nquestion assistant:``; with ``video`` also for items of the type ``video``."""
    mark = "{{ '<video>' if item['type'] == 'video' else '<image>' }}" if video else "<image>"
    media = "item['type'] in ('image', 'video')" if video else "item['type'] == 'image'"
    return (
        "{% for message in messages %}{{ message['role'] }}: "
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for item in message['content'] if "
        + media
        + " %}"
        + mark
        + "\n{% endfor %}{% for item in message['content'] if item['type'] == 'text' %}{{ item['text'] }}{%"
        " endfor %}{% endif %}{% if message['role'] == 'assistant' %}</s>{% endif %}{{ ' ' }}{% endfor %}{%"
        " if add_generation_prompt %}assistant:{% endif %}"
    )


def build_tokenizer(special: Iterable[str] = (), words: Iterable[str] = ()) -> Any:
    """A word-level fast tokenizer: lower case, split at spaces and punctuation, left padding.

    It adds no tokens. ``special`` tokens and ``words`` come after those of the image questions, whose ids are
    the same in every model.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = dict.fromkeys([*SPECIAL, *CHAT_WORDS, *vocabulary(), *special, *words])
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", *special],
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def language_config(
    kind: Callable[..., Any], tokenizer: Any, width: int, layers: int, heads: int, theta: float = 1000.0
) -> Any:
    """A small ``LlamaConfig``, ``Qwen2Config``, ... whose weights fit those of the other tiny models."""
    return kind(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        initializer_range=0.05,
        **special_ids(tokenizer),
    )


def clip_llava(
    kind: Callable[..., Any],
    tokenizer: Any,
    width: int,
    layers: tuple[int, int],
    heads: int,
    side: int,
    patch: int = 8,
    theta: float = 1000.0,
) -> Any:
    """A ``LlavaConfig`` or its like: a Llama on a CLIP tower's last layer but one, no CLS.

    ``layers`` of tower and language model, ``side`` of the tower's images and of a patch in px; ``width`` and
    ``heads`` of both; ``theta`` of the Llama's rotary positions.
    """
    from transformers import CLIPVisionConfig, LlamaConfig

    image = tokenizer.convert_tokens_to_ids("<image>")
    tower = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        projection_dim=width,
        num_hidden_layers=layers[0],
        num_attention_heads=heads,
        image_size=side,
        patch_size=patch,
    )
    return kind(
        vision_config=tower,
        text_config=language_config(LlamaConfig, tokenizer, width, layers[1], heads, theta),
        image_token_id=image,
        image_token_index=image,
        image_seq_length=(side // patch) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        **special_ids(tokenizer),
    )


def build_llava(
    words: Iterable[str],
    width: int,
    layers: tuple[int, int],
    heads: int,
    side: int,
    patch: int = 8,
    theta: float = 1000.0,
) -> tuple[Any, Any]:
    """An untrained LLaVA of `clip_llava` and its processor, float32; ``words`` come after the known ones."""
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    tokenizer = build_tokenizer(words=words)
    config = clip_llava(LlavaConfig, tokenizer, width, layers, heads, side, patch, theta)
    model = LlavaForConditionalGeneration(config).float()
    model.generation_config = generation_config(tokenizer)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(**clip_pixels(side)), tokenizer=tokenizer, **clip_reading(patch)
    )
    return model, processor


def start_from(own: Iterable[tuple[str, Any]], known: Mapping[str, Any]) -> None:
    """Copy known tensors where names and shapes agree, in place; of embeddings the rows of known words."""
    import torch

    with torch.no_grad():
        for name, value in own:
            rows = known.get(name, value)
            if rows.shape[1:] == value.shape[1:] and len(rows) <= len(value):
                value[: len(rows)] = rows


def clip_pixels(side: int) -> dict[str, Any]:
    """Options of the image processor of such a tower: ``side`` px, values in -1..1."""
    return {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def clip_reading(patch: int = 8) -> dict[str, Any]:
    """Options of such a model's processor: the count of visual tokens and the form of a prompt."""
    return {
        "patch_size": patch,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": chat_template(),
    }


def special_ids(tokenizer: Any) -> dict[str, int]:
    """Padding, begin and end, as configurations name them."""
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}


def generation_config(tokenizer: Any) -> Any:
    """Greedy decoding of up to eight tokens."""
    from transformers import GenerationConfig

    return GenerationConfig(**special_ids(tokenizer), max_new_tokens=8, do_sample=False)


def start_tower(tower: Any) -> None:
    """Starting weights for a small CLIP tower, in place: 2-D sine positions, weights of unit scale.

    The usual ones (0.02) suit a hundred times as many steps: the positions start far weaker than the patches,
    and a patch takes long to find its neighbours.
    """
    import torch

    tower = getattr(tower, "vision_model", tower)
    width = tower.config.hidden_size
    side = tower.config.image_size // tower.config.patch_size
    rates = 30.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    with torch.no_grad():
        tower.embeddings.position_embedding.weight[1:] = 0.5 * torch.cat([rows, columns], -1).flatten(0, 1)
        tower.embeddings.patch_embedding.weight.normal_(std=0.05)
        for layer in tower.encoder.layers:
            for part in ("q_proj", "k_proj", "v_proj"):
                getattr(layer.self_attn, part).weight.normal_(std=width**-0.5)
            layer.self_attn.out_proj.weight.normal_(std=0.3 * width**-0.5)
