"""Tiny random models that read images, with processors of their own, and pictures to show them."""

from __future__ import annotations

import base64
import functools
import io

import torch
from fake_worker import byte_tokenizer
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.llava.processing_llava import LlavaProcessor

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
_TEXT = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


@functools.cache
def idefics3():
    """`(model, processor)`; an image becomes 2 x 2 tiles, or fewer, and a small whole: 4 tokens each."""
    tokenizer = byte_tokenizer()
    rows = [f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)]
    special = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *rows]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    image = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = Idefics3Processor(image, tokenizer, image_seq_len=4, chat_template=TEMPLATE)
    config = Idefics3Config(
        text_config=LlamaConfig(**_TEXT).to_dict(),
        vision_config=dict(_VISION),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    return _model(Idefics3ForConditionalGeneration, config, tokenizer), processor


@functools.cache
def llava():
    """`(model, processor)`; an image becomes 16 tokens, one a patch."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        image,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    config = LlavaConfig(
        text_config=LlamaConfig(**_TEXT).to_dict(),
        vision_config=CLIPVisionConfig(**_VISION, projection_dim=32).to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return _model(LlavaForConditionalGeneration, config, tokenizer), processor


def _model(kind, config, tokenizer):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config).eval().requires_grad_(False)
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:  # far from uniform: a picture must change what is said
                weight.normal_(std=1.0 if "embed_tokens" in name else weight[0].numel() ** -0.5 * 1.5)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


@functools.cache
def picture(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """Coloured noise."""
    g = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (size[1], size[0], 3), generator=g, dtype=torch.uint8).numpy())


def encoded(image: Image.Image, format: str = "PNG", **how) -> bytes:
    """The bytes of a file."""
    out = io.BytesIO()
    image.save(out, format, **how)
    return out.getvalue()


def data_url(data: bytes | Image.Image, kind: str = "png") -> str:
    """`data` in a URL."""
    data = data if isinstance(data, bytes) else encoded(data)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
