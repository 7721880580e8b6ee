"""ImageReward: BLIP that was trained on people's choices.

This file knows BLIP as its authors and transformers name its weights, and no trainer.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from PIL.Image import Image, Resampling
from torch import Tensor, nn

from ..errors import one_sentence
from .clip import clip_pixels, fill, score_head
from .scorer import Scorer, read_pickle

# Mean and std of the MLP's output over the authors' data, by which their package normalises it
MEAN, STD = 0.16717362830052426, 1.0333394966054072
LENGTH = 35  # tokens of a prompt


class ImageReward(Scorer):
    """
    How much people prefer a picture for its prompt (ImageReward, arXiv 2304.05977), about -2 to 2, in training and in
    the paper's table: an MLP on the first token of BLIP's text model, which looks at the picture, normalised to mean 0
    and std 1 over the authors' data. The number is that of `inference_rank` and `score` of their package.

    A picture is seen as their package has it: as CLIP's processor does (224, bicubic, the shorter side and the middle),
    but for torchvision's middle, which is rounded, not cut off. Prompts are cut to 35 tokens.

    Args:
        path (`str`, *optional*, defaults to `"THUDM/ImageReward"`):
            Hub id, folder or file of the checkpoint.
        file (`str`, *optional*, defaults to `"ImageReward.pt"`):
            Its name.
        tokenizer (`str`, *optional*, defaults to `"google-bert/bert-base-uncased"`):
            Hub id or folder of the tokenizer.
        kwargs: For [`Scorer`].
    """

    __name__ = "imagereward"

    def __init__(
        self,
        path: str = "THUDM/ImageReward",
        file: str = "ImageReward.pt",
        tokenizer: str = "google-bert/bert-base-uncased",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.path, self.file, self.tokenizer = path, file, tokenizer

    def load(self) -> nn.Module:
        from transformers import AutoTokenizer

        model = _Judge(read_pickle(self.path, self.file, self.__name__))
        with one_sentence(f"the tokenizer {self.tokenizer!r} of the scorer {self.__name__!r} cannot be loaded"):
            model.tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        return model

    def score(self, prompts: Sequence[str], images: Sequence[Image], **columns: Any) -> list[float]:
        judge: Any = self.model
        return judge(prompts, images).tolist()


class _Judge(nn.Module):
    tokenizer: Any

    def __init__(self, state: Mapping[str, Tensor]):
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        image_state, text_state = _image_model(state), _under(state, "blip.text_encoder.")
        text_state.pop("embeddings.position_ids", None)  # a buffer of older versions
        width, _, patch, _ = image_state["embeddings.patch_embedding.weight"].shape
        side = round((image_state["embeddings.position_embedding"].shape[1] - 1) ** 0.5)
        self.size = patch * side
        # Heads are 64 wide in both; the epsilons are those of timm and BERT
        self.image_model = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=width,
                intermediate_size=len(image_state["encoder.layers.0.mlp.fc1.weight"]),
                num_hidden_layers=_depth(image_state, r"encoder\.layers\.(\d+)\."),
                num_attention_heads=width // 64,
                image_size=self.size,
                patch_size=patch,
                layer_norm_eps=1e-6,
            )
        )
        vocabulary, text_width = text_state["embeddings.word_embeddings.weight"].shape
        self.text_model = BlipTextModel(
            BlipTextConfig(
                vocab_size=vocabulary,
                hidden_size=text_width,
                encoder_hidden_size=width,
                intermediate_size=len(text_state["encoder.layer.0.intermediate.dense.weight"]),
                num_hidden_layers=_depth(text_state, r"encoder\.layer\.(\d+)\."),
                num_attention_heads=text_width // 64,
                max_position_embeddings=len(text_state["embeddings.position_embeddings.weight"]),
                bos_token_id=None,
                eos_token_id=None,
                sep_token_id=None,
            ),
            add_pooling_layer=False,
        )
        self.head = score_head(_under(state, "mlp."), ImageReward.__name__)
        fill(self.image_model, image_state, "the weights of ImageReward's image model")
        fill(self.text_model, text_state, "the weights of ImageReward's text model")

    def forward(self, prompts: Sequence[str], images: Sequence[Image]) -> Tensor:
        device, dtype = self.text_model.device, self.text_model.dtype
        middles = [_middle(image, self.size) for image in images]
        seen = self.image_model(clip_pixels(middles, self.size).to(device, dtype)).last_hidden_state
        text = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        ).to(device)
        read = self.text_model(text.input_ids, attention_mask=text.attention_mask, encoder_hidden_states=seen)
        return (self.head(read.last_hidden_state[:, 0]).float()[:, 0] - MEAN) / STD


def _middle(image: Image, size: int) -> Image:
    """torchvision's `Resize` and `CenterCrop`."""
    width, height = (int(size * side / min(image.size)) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), Resampling.BICUBIC).crop((left, top, left + size, top + size))


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): tensor.float() if tensor.is_floating_point() else tensor
        for key, tensor in state.items()
        if key.startswith(prefix)
    }


def _depth(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max(int(match[1]) for key in state if (match := re.match(pattern, key)))


# timm's names of a vision transformer, and those of transformers' BLIP
_TIMM = [
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
]


def _image_model(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, tensor in _under(state, "blip.visual_encoder.").items():
        for pattern, name in _TIMM:
            key = re.sub(pattern, name, key)
        renamed[key] = tensor
    return renamed
