"""Untrained tiny models and their processors, one builder per architecture (``BUILDERS``)."""

from __future__ import annotations

from typing import Any

from .scenes import SIZE, vocabulary

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
CHAT_WORDS = ("user", "assistant", "system", ":", ".", ",", "!", "object", "please")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] if item['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for item in message['content'] if item['type'] == 'text' %}{{ item['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def build_tokenizer() -> Any:
    """A word-level fast tokenizer: lower case, split at whitespace and punctuation, left padding, no added tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = dict.fromkeys([*SPECIAL, *CHAT_WORDS, *vocabulary()])
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def start_tower(tower: Any) -> None:
    """Starting weights for a small CLIP tower, in place: positions as 2-D sines, patches and attention of unit scale.

    The usual ones (0.02) suit a hundred times the steps: positions start as a whisper beside the patches, and it takes
    long until a patch finds its neighbours.
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


def build_llava(width: int = 128, tower_layers: int = 6, llm_layers: int = 4, heads: int = 4) -> tuple[Any, Any]:
    """An untrained LLaVA with 144 visual tokens (96 px, patch 8, CLS dropped) and its processor.

    Args:
        width: hidden size of the tower and of the language model; a multiple of ``2 * heads``.
        tower_layers: layers of the CLIP tower; the language model reads the output of the last but one.
        llm_layers: layers of the Llama.
        heads: attention heads of both.

    Returns:
        ``(LlavaForConditionalGeneration, LlavaProcessor)`` in float32.
    """
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        GenerationConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = build_tokenizer()
    pad, bos, eos, image = tokenizer.convert_tokens_to_ids(["<pad>", "<s>", "</s>", "<image>"])
    tower = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        projection_dim=width,
        num_hidden_layers=tower_layers,
        num_attention_heads=heads,
        image_size=SIZE,
        patch_size=8,
    )
    llm = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=llm_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        initializer_range=0.05,
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
    )
    config = LlavaConfig(
        vision_config=tower,
        text_config=llm,
        image_token_id=image,
        image_token_index=image,
        image_seq_length=(SIZE // 8) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
    )
    model = LlavaForConditionalGeneration(config).float()
    start_tower(model.model.vision_tower)
    model.generation_config = GenerationConfig(
        pad_token_id=pad, bos_token_id=bos, eos_token_id=eos, max_new_tokens=8, do_sample=False
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": SIZE},
            crop_size={"height": SIZE, "width": SIZE},
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.5, 0.5, 0.5],
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    return model, processor


BUILDERS = {"llava": build_llava}
