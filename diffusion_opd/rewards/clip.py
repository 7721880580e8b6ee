"""Scorers that compare the embeddings of CLIP: PickScore, CLIPScore, Aesthetic, HPSv2.

All but HPSv2 see a picture as CLIP's own processor has it: RGB, the shorter side resized to the model's size (224;
bicubic), cropped to the middle, normalised by CLIP's mean and std. Prompts are cut to the model's 77 tokens.

This file knows CLIP as transformers and open_clip name its weights, and no trainer.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize, pad

from ..errors import first_few, one_sentence
from .scorer import Scorer, read_pickle

CLIP_L = "openai/clip-vit-large-patch14"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class _CLIPScorer(Scorer):
    path: str
    tokenizer: str | None

    def load(self) -> nn.Module:
        from transformers import CLIPModel

        model = load_pretrained(CLIPModel, self.path, self.__name__)
        return _Embedder(model, self.tokenizer, self.__name__)


class PickScore(_CLIPScorer):
    """
    How much people would choose a picture for its prompt (Pick-a-Pic, arXiv 2305.01569): `exp(logit_scale) cos(text,
    picture)` of CLIP-H that was trained on such choices.

    `scale="table"`: that number, about 18 to 25, as the paper's table prints it. `scale="training"`: over 26.

    Args:
        path (`str`, *optional*, defaults to `"yuvalkirstain/PickScore_v1"`):
            Hub id or folder of the model.
        tokenizer (`str`, *optional*, defaults to `"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`):
            Hub id or folder.
        kwargs: For [`Scorer`].
    """

    __name__ = "pickscore"

    def __init__(self, path: str = "yuvalkirstain/PickScore_v1", tokenizer: str = CLIP_H, **kwargs: Any):
        super().__init__(**kwargs)
        self.path, self.tokenizer = path, tokenizer

    def score(self, prompts: Sequence[str], images: Sequence[Image], **columns: Any) -> list[float]:
        embedder: Any = self.model
        scores = embedder.logit_scale * embedder(prompts, images)
        return (scores / 26 if self.scale == "training" else scores).tolist()


class CLIPScore(_CLIPScorer):
    """
    How well a picture fits its prompt (arXiv 2103.00020): CLIP-L's image logit, `exp(logit_scale) cos(text, picture)`,
    over 100; about 0.2 to 0.35, in training and in the paper's table. (The CLIPScore of arXiv 2104.08718 is 2.5 times
    the cosine, not below 0.)

    Args:
        path (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            Hub id or folder of the model and its tokenizer.
        kwargs: For [`Scorer`].
    """

    __name__ = "clipscore"

    def __init__(self, path: str = CLIP_L, **kwargs: Any):
        super().__init__(**kwargs)
        self.path = self.tokenizer = path

    def score(self, prompts: Sequence[str], images: Sequence[Image], **columns: Any) -> list[float]:
        embedder: Any = self.model
        return (embedder.logit_scale * embedder(prompts, images) / 100).tolist()


class Aesthetic(_CLIPScorer):
    """
    How beautiful people find a picture, from 1 to 10, whatever its prompt (LAION's predictor V2,
    https://github.com/christophschuhmann/improved-aesthetic-predictor): an MLP on CLIP-L's normalised image embedding.

    `scale="table"`: its output, as the paper's table prints it (5.36). `scale="training"`: over 10.

    Args:
        path (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            Hub id or folder of CLIP.
        head (`str`, *optional*, defaults to `"trl-lib/ddpo-aesthetic-predictor"`):
            Hub id, folder or file of the MLP `sac+logos+ava1-l14-linearMSE.pth`, which that repository holds as
            `aesthetic-model.pth`.
        kwargs: For [`Scorer`].
    """

    __name__ = "aesthetic"

    def __init__(self, path: str = CLIP_L, head: str = "trl-lib/ddpo-aesthetic-predictor", **kwargs: Any):
        super().__init__(**kwargs)
        self.path, self.head = path, head
        self.tokenizer = None  # no text

    def load(self) -> nn.Module:
        model = super().load()
        model.head = score_head(read_pickle(self.head, "aesthetic-model.pth", self.__name__), self.__name__)
        return model

    def score(self, prompts: Sequence[str], images: Sequence[Image], **columns: Any) -> list[float]:
        embedder: Any = self.model
        scores = embedder.head(embedder.of_images(images).to(embedder.dtype)).float()[:, 0]
        return (scores / 10 if self.scale == "training" else scores).tolist()


class HPSv2(_CLIPScorer):
    """
    How much people prefer a picture for its prompt (HPS v2.1, arXiv 2306.09341): the cosine of text and picture of
    CLIP-H that was trained on such preferences; about 0.2 to 0.35, in training and in the paper's table.

    Preprocessing is that of the authors' package, and of DiffusionNFT: the longer side resized to 224, in floats, and
    black around it; what crops to the middle gives other numbers for pictures that are not square. Prompts are not
    mended by ftfy as theirs are (curly quotes, HTML).

    Args:
        path (`str`, *optional*, defaults to `"xswu/HPSv2"`):
            Hub id, folder or file of the checkpoint in open_clip's format.
        file (`str`, *optional*, defaults to `"HPS_v2.1_compressed.pt"`):
            Its name; `"HPS_v2_compressed.pt"` is v2.0.
        tokenizer (`str`, *optional*, defaults to `"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`):
            Hub id or folder.
        kwargs: For [`Scorer`].
    """

    __name__ = "hpsv2"

    def __init__(
        self,
        path: str = "xswu/HPSv2",
        file: str = "HPS_v2.1_compressed.pt",
        tokenizer: str = CLIP_H,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.path, self.file, self.tokenizer = path, file, tokenizer

    def load(self) -> nn.Module:
        state = read_pickle(self.path, self.file, self.__name__)
        model = _Embedder(clip_of_open_clip(state.get("state_dict", state)), self.tokenizer, self.__name__)
        model.pixels = hps_pixels
        return model

    def score(self, prompts: Sequence[str], images: Sequence[Image], **columns: Any) -> list[float]:
        embedder: Any = self.model
        return embedder(prompts, images).tolist()


class _Embedder(nn.Module):
    """CLIP with what prepares its inputs; embeddings are normalised, `[samples, width]`, float32."""

    head: nn.Module
    pixels: Callable[[Sequence[Image], int], Tensor]

    def __init__(self, clip: Any, tokenizer: str | None, name: str):
        from transformers import AutoTokenizer

        super().__init__()
        self.clip, self._size, self.pixels = clip, clip.config.vision_config.image_size, clip_pixels
        # Read before any cast: bfloat16 has 4.59 for 4.61, which is 1 % of a score
        self.logit_scale = clip.logit_scale.float().exp().item()
        if tokenizer is not None:
            with one_sentence(f"the tokenizer {tokenizer!r} of the scorer {name!r} cannot be loaded"):
                self._tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer)

    @property
    def dtype(self) -> torch.dtype:
        return self.clip.dtype

    def of_images(self, images: Sequence[Image]) -> Tensor:
        pixels = self.pixels(images, self._size).to(self.clip.device, self.clip.dtype)
        return normalize(self.clip.get_image_features(pixels).pooler_output.float(), dim=-1)

    def of_texts(self, texts: Sequence[str]) -> Tensor:
        length = self.clip.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        ).input_ids.to(self.clip.device)
        # Without a mask: what pads comes after the last token that is looked at, and attention is causal
        return normalize(self.clip.get_text_features(tokens).pooler_output.float(), dim=-1)

    def forward(self, prompts: Sequence[str], images: Sequence[Image]) -> Tensor:
        """Cosine of each prompt and its picture, `[samples]`."""
        return (self.of_texts(prompts) * self.of_images(images)).sum(-1)


def clip_pixels(images: Sequence[Image], size: int) -> Tensor:
    """`[pictures, 3, size, size]` as CLIP's published processors have them."""
    from transformers import CLIPImageProcessorPil

    process = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return process(images=list(images), return_tensors="pt")["pixel_values"]


def hps_pixels(images: Sequence[Image], size: int) -> Tensor:
    """`[pictures, 3, size, size]` as HPSv2's package has them: of floats, and without cutting anything off."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    pixels = []
    for image in images:
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        height, width = (round(side * size / max(image.size)) for side in x.shape[-2:])
        x = interpolate(x, (height, width), mode="bicubic", antialias=True)
        left, top = (size - width) // 2, (size - height) // 2
        pixels.append(pad(x, (left, size - width - left, top, size - height - top)))
    mean, std = (torch.tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (torch.cat(pixels) - mean) / std


def load_pretrained(cls: Any, path: str, name: str) -> Any:
    """A model of transformers, all of whose weights are there.

    Raises:
        ValueError: if it cannot be loaded, or lacks weights.
    """
    with one_sentence(f"the weights {path!r} of the scorer {name!r} cannot be loaded"):
        model, found = cls.from_pretrained(path, output_loading_info=True)
    if missing := found["missing_keys"]:
        raise ValueError(f"the weights {path!r} of the scorer {name!r} lack {first_few(missing)}.")
    return model


def fill(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Loads weights, all of them.

    Raises:
        ValueError: if some are missing, or unread, or of other shapes.
    """
    own = module.state_dict()
    wrong = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    for names, problem in ((own.keys() - state.keys(), "lack"), (state.keys() - own.keys(), "hold, unread,")):
        if names:
            raise ValueError(f"{what} {problem} {first_few(names)}.")
    if wrong:
        raise ValueError(f"{what} have other shapes than the model: {first_few(wrong)}.")
    module.load_state_dict(dict(state))


def score_head(state: Mapping[str, Tensor], name: str) -> nn.Module:
    """The MLP of Aesthetic and ImageReward: `layers.N`, linear alone, of the widths that are there."""
    layers = {int(key.split(".")[1]): w for key, w in state.items() if re.fullmatch(r"layers\.\d+\.weight", key)}
    head = _Head({place: (w.shape[1], w.shape[0]) for place, w in sorted(layers.items())})
    fill(head, state, f"the weights of the head of the scorer {name!r}")
    return head


class _Head(nn.Module):
    """Linear layers one after the other; between some the training dropped out, whose places are left."""

    def __init__(self, widths: Mapping[int, tuple[int, int]]):
        super().__init__()
        self.layers = nn.ModuleDict({str(place): nn.Linear(*width) for place, width in widths.items()})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


# open_clip's names of a block's layers, and transformers'
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OTHERS = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}


def clip_of_open_clip(state: Mapping[str, Tensor], num_heads: int = 16) -> nn.Module:
    """transformers' CLIP with the weights of open_clip's ViT-H-14, whose text and image models have 16 heads each.

    Widths and depths are those of the weights.

    Raises:
        ValueError: if weights are missing or unread.
    """
    from transformers import CLIPConfig, CLIPModel

    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        block = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", key)
        if block is None:
            if key in ("text_projection", "visual.proj"):
                part = "text_projection" if key == "text_projection" else "visual_projection"
                renamed[f"{part}.weight"] = tensor.T
            elif not key.endswith("attn_mask"):
                renamed[_OTHERS.get(key, key)] = tensor
            continue
        visual, number, name, kind = block.groups()
        layer = f"{'vision' if visual else 'text'}_model.encoder.layers.{number}"
        if name == "attn.in_proj":
            for part, own in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{layer}.self_attn.{part}_proj.{kind}"] = own
        else:
            renamed[f"{layer}.{_BLOCK.get(name, name)}.{kind}"] = tensor
    try:
        config = CLIPConfig(
            text_config=_sizes(renamed, "text_model", "embeddings.token_embedding.weight", num_heads)
            | {
                "vocab_size": len(renamed["text_model.embeddings.token_embedding.weight"]),
                "max_position_embeddings": len(renamed["text_model.embeddings.position_embedding.weight"]),
                "eos_token_id": 2,  # of transformers: the token of the highest number, as open_clip looks for it
            },
            vision_config=_sizes(renamed, "vision_model", "embeddings.class_embedding", num_heads)
            | _patches(
                renamed["vision_model.embeddings.patch_embedding.weight"],
                renamed["vision_model.embeddings.position_embedding.weight"],
            ),
            projection_dim=len(renamed["text_projection.weight"]),
        )
    except KeyError as error:
        raise ValueError(
            f"the weights of an open_clip model lack {error.args[0]!r} (as transformers names it)."
        ) from None
    model = CLIPModel(config)
    fill(model, {key: tensor.float() for key, tensor in renamed.items()}, "the weights of an open_clip model")
    return model


def _sizes(state: Mapping[str, Tensor], part: str, embedding: str, num_heads: int) -> dict[str, Any]:
    layers = [int(key.split(".")[3]) for key in state if key.startswith(f"{part}.encoder.layers.")]
    return {
        "hidden_size": state[f"{part}.{embedding}"].shape[-1],
        "intermediate_size": len(state[f"{part}.encoder.layers.0.mlp.fc1.weight"]),
        "num_hidden_layers": 1 + max(layers),
        "num_attention_heads": num_heads,
        "hidden_act": "gelu",
    }


def _patches(patch: Tensor, positions: Tensor) -> dict[str, int]:
    size = patch.shape[-1]
    return {"patch_size": size, "image_size": size * round((len(positions) - 1) ** 0.5)}
