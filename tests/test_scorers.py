"""Scorers of the CLIP and BLIP kind: random weights in the layout in which they are published, read by the published
names, against the same models written once more in torch's primitives on the published keys."""

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel

from diffusion_opd.rewards import Scorer, load_reward
from diffusion_opd.runs import hash_function
from tests.hub_server import HubServer, client
from tests.rl_training import CONFIGS, DATA, GRPO, trainer_of
from tests.tiny_pipelines import clip_tokenizer

PROMPTS = ["a cat", "two dogs and a very long tail of words " * 20, "a street at night"]
SIZE = 28
# As the preprocessor_config.json of openai/clip-vit-large-patch14 says, at a smaller size
PUBLISHED = CLIPImageProcessorPil(
    do_resize=True,
    size={"shortest_edge": SIZE},
    resample=3,
    do_center_crop=True,
    crop_size={"height": SIZE, "width": SIZE},
    do_rescale=True,
    do_normalize=True,
    image_mean=[0.48145466, 0.4578275, 0.40821073],
    image_std=[0.26862954, 0.26130258, 0.27577711],
    do_convert_rgb=True,
)


def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0)
    return [
        Image.fromarray(noise.integers(0, 256, (40, 61, 3), dtype=np.uint8)),
        Image.fromarray(noise.integers(0, 256, (56, 62), dtype=np.uint8)),
        Image.fromarray(noise.integers(0, 256, (90, 28, 4), dtype=np.uint8), mode="RGBA"),
    ]


def pixels() -> Tensor:
    return PUBLISHED(images=[picture.convert("RGB") for picture in pictures()], return_tensors="pt")["pixel_values"]


def normal(pictures: list[np.ndarray]) -> Tensor:
    """Of pictures from 0 to 255, `[height, width, 3]`."""
    x = (np.stack(pictures) / 255 - PUBLISHED.image_mean) / PUBLISHED.image_std
    return torch.from_numpy(x).float().permute(0, 3, 1, 2)


def padded_pixels() -> Tensor:
    """As HPSv2's package has them (`ResizeMaxSize` after `ToTensor`), by Pillow on each channel in floats."""
    found = []
    for picture in pictures():
        width, height = (round(side * SIZE / max(picture.size)) for side in picture.size)
        left, top = (SIZE - width) // 2, (SIZE - height) // 2
        canvas = np.zeros((SIZE, SIZE, 3))
        for place, channel in enumerate(picture.convert("RGB").split()):
            small = channel.convert("F").resize((width, height), Image.Resampling.BICUBIC)
            canvas[top : top + height, left : left + width, place] = np.array(small)
        found.append(canvas)
    return normal(found)


def torchvision_pixels() -> Tensor:
    """As ImageReward's package has them (`Resize`, `CenterCrop`, of which the second picture leaves half a pixel)."""
    found = []
    for picture, size, corner in zip(
        pictures(), [(42, 28), (31, 28), (28, 90)], [(7, 0), (2, 0), (0, 31)], strict=True
    ):
        small = np.array(picture.convert("RGB").resize(size, Image.Resampling.BICUBIC))
        found.append(small[corner[1] : corner[1] + SIZE, corner[0] : corner[0] + SIZE])
    return normal(found)


def tokens(tokenizer, length: int) -> Tensor:
    return tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=length, return_tensors="pt")


def random(*shapes: tuple[int, ...]):
    for shape in shapes:
        yield torch.randn(shape) / math.sqrt(shape[-1] if len(shape) > 1 else 10)


def save_clip(folder: Path, seed: int, width: int = 16) -> CLIPModel:
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = CLIPConfig(
        text_config=sizes | ids | {"vocab_size": len(tokenizer)},
        vision_config=sizes | {"image_size": SIZE, "patch_size": 14},
        projection_dim=width,
    )
    model = CLIPModel(config).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    model.logit_scale.data.fill_(math.log(100))  # as published
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


# HPS: open_clip's ViT-H-14, two layers of it


def open_clip_weights(vocabulary: int, heads_width: int = 2, dim: int = 24) -> dict[str, Tensor]:
    torch.manual_seed(7)
    state: dict[str, Tensor] = {"logit_scale": torch.tensor(4.6)}
    for prefix, width in (("", 16 * heads_width), ("visual.", 32 * heads_width)):
        for layer in range(2):
            block = f"{prefix}transformer.resblocks.{layer}"
            for name, shape in {
                "ln_1.weight": (width,),
                "ln_1.bias": (width,),
                "attn.in_proj_weight": (3 * width, width),
                "attn.in_proj_bias": (3 * width,),
                "attn.out_proj.weight": (width, width),
                "attn.out_proj.bias": (width,),
                "ln_2.weight": (width,),
                "ln_2.bias": (width,),
                "mlp.c_fc.weight": (4 * width, width),
                "mlp.c_fc.bias": (4 * width,),
                "mlp.c_proj.weight": (width, 4 * width),
                "mlp.c_proj.bias": (width,),
            }.items():
                (state[f"{block}.{name}"],) = random(shape)
    text, image = 16 * heads_width, 32 * heads_width
    for name, shape in {
        "positional_embedding": (77, text),
        "text_projection": (text, dim),
        "token_embedding.weight": (vocabulary, text),
        "ln_final.weight": (text,),
        "ln_final.bias": (text,),
        "visual.class_embedding": (image,),
        "visual.positional_embedding": (5, image),
        "visual.proj": (image, dim),
        "visual.conv1.weight": (image, 3, 14, 14),
        "visual.ln_pre.weight": (image,),
        "visual.ln_pre.bias": (image,),
        "visual.ln_post.weight": (image,),
        "visual.ln_post.bias": (image,),
    }.items():
        (state[name],) = random(shape)
    return state


def norm(state, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    logits = logits if mask is None else logits.masked_fill(mask, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


def open_clip_blocks(state, prefix: str, x: Tensor, mask: Tensor | None = None) -> Tensor:
    for layer in range(2):
        block = f"{prefix}transformer.resblocks.{layer}"
        y = norm(state, f"{block}.ln_1", x)
        y = F.linear(y, state[f"{block}.attn.in_proj_weight"], state[f"{block}.attn.in_proj_bias"])
        y = attend(*y.chunk(3, -1), 16, mask)
        x = x + F.linear(y, state[f"{block}.attn.out_proj.weight"], state[f"{block}.attn.out_proj.bias"])
        y = norm(state, f"{block}.ln_2", x)
        y = F.gelu(F.linear(y, state[f"{block}.mlp.c_fc.weight"], state[f"{block}.mlp.c_fc.bias"]))
        x = x + F.linear(y, state[f"{block}.mlp.c_proj.weight"], state[f"{block}.mlp.c_proj.bias"])
    return x


def hps(state, ids: Tensor) -> Tensor:
    """open_clip's `encode_image`, `encode_text` and their cosine."""
    x = F.conv2d(padded_pixels(), state["visual.conv1.weight"], stride=14).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + state["visual.positional_embedding"]
    x = open_clip_blocks(state, "visual.", norm(state, "visual.ln_pre", x))
    images = norm(state, "visual.ln_post", x[:, 0]) @ state["visual.proj"]
    y = state["token_embedding.weight"][ids] + state["positional_embedding"]
    y = norm(state, "ln_final", open_clip_blocks(state, "", y, torch.ones(77, 77).triu(1).bool()))
    texts = y[torch.arange(len(y)), ids.argmax(-1)] @ state["text_projection"]
    return F.cosine_similarity(images, texts)


# ImageReward: BLIP's ViT and its BERT with cross-attention


def blip_weights(vocabulary: int, image: int = 128, text: int = 64) -> dict[str, Tensor]:
    torch.manual_seed(8)
    shapes: dict[str, tuple[int, ...]] = {
        "blip.visual_encoder.cls_token": (1, 1, image),
        "blip.visual_encoder.pos_embed": (1, 5, image),
        "blip.visual_encoder.patch_embed.proj.weight": (image, 3, 14, 14),
        "blip.visual_encoder.patch_embed.proj.bias": (image,),
        "blip.visual_encoder.norm.weight": (image,),
        "blip.visual_encoder.norm.bias": (image,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (vocabulary, text),
        "blip.text_encoder.embeddings.position_embeddings.weight": (48, text),
        "blip.text_encoder.embeddings.LayerNorm.weight": (text,),
        "blip.text_encoder.embeddings.LayerNorm.bias": (text,),
    }

    def linear(name: str, out: int, into: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into), (out,)

    for layer in range(2):
        block = f"blip.visual_encoder.blocks.{layer}"
        for name in ("norm1", "norm2"):
            shapes[f"{block}.{name}.weight"] = shapes[f"{block}.{name}.bias"] = (image,)
        linear(f"{block}.attn.qkv", 3 * image, image)
        linear(f"{block}.attn.proj", image, image)
        linear(f"{block}.mlp.fc1", 4 * image, image)
        linear(f"{block}.mlp.fc2", image, 4 * image)
        block = f"blip.text_encoder.encoder.layer.{layer}"
        for kind, width in (("attention", text), ("crossattention", image)):
            linear(f"{block}.{kind}.self.query", text, text)
            linear(f"{block}.{kind}.self.key", text, width)
            linear(f"{block}.{kind}.self.value", text, width)
            linear(f"{block}.{kind}.output.dense", text, text)
            linear(f"{block}.{kind}.output.LayerNorm", text, text)
            shapes[f"{block}.{kind}.output.LayerNorm.weight"] = (text,)
        linear(f"{block}.intermediate.dense", 4 * text, text)
        linear(f"{block}.output.dense", text, 4 * text)
        shapes[f"{block}.output.LayerNorm.weight"] = shapes[f"{block}.output.LayerNorm.bias"] = (text,)
    state = {name: next(random(shape)) for name, shape in shapes.items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(48)[None]
    return state | {f"mlp.{name}": tensor for name, tensor in head_weights(text).items()}


def head_weights(width: int) -> dict[str, Tensor]:
    torch.manual_seed(9)
    widths = [width, 1024, 128, 64, 16, 1]
    state = {}
    for place, out, into in zip((0, 2, 4, 6, 7), widths[1:], widths, strict=False):
        state[f"layers.{place}.weight"], state[f"layers.{place}.bias"] = random((out, into), (out,))
    return state


def head(state, x: Tensor, prefix: str = "") -> Tensor:
    for place in (0, 2, 4, 6, 7):
        x = F.linear(x, state[f"{prefix}layers.{place}.weight"], state[f"{prefix}layers.{place}.bias"])
    return x[:, 0]


def image_reward(state, tokenizer) -> Tensor:
    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    vit, bert = "blip.visual_encoder", "blip.text_encoder"
    patch = f"{vit}.patch_embed.proj"
    x = F.conv2d(torchvision_pixels(), state[f"{patch}.weight"], state[f"{patch}.bias"], stride=14)
    x = torch.cat([state[f"{vit}.cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
    x = x + state[f"{vit}.pos_embed"]
    for layer in range(2):
        block = f"{vit}.blocks.{layer}"
        y = linear(f"{block}.attn.qkv", norm(state, f"{block}.norm1", x, 1e-6))
        x = x + linear(f"{block}.attn.proj", attend(*y.chunk(3, -1), 2))
        y = F.gelu(linear(f"{block}.mlp.fc1", norm(state, f"{block}.norm2", x, 1e-6)))
        x = x + linear(f"{block}.mlp.fc2", y)
    seen = norm(state, f"{vit}.norm", x, 1e-6)
    text = tokens(tokenizer, 35)
    y = state[f"{bert}.embeddings.word_embeddings.weight"][text.input_ids]
    y = y + state[f"{bert}.embeddings.position_embeddings.weight"][:35]
    y = norm(state, f"{bert}.embeddings.LayerNorm", y, 1e-12)
    padded = text.attention_mask[:, None, None] == 0
    for layer in range(2):
        block = f"{bert}.encoder.layer.{layer}"
        for kind, keys, mask in (("attention", None, padded), ("crossattention", seen, None)):
            name, keys = f"{block}.{kind}", y if keys is None else keys
            q, k, v = (linear(f"{name}.self.{part}", z) for part, z in (("query", y), ("key", keys), ("value", keys)))
            out = linear(f"{name}.output.dense", attend(q, k, v, 1, mask))
            y = norm(state, f"{name}.output.LayerNorm", out + y, 1e-12)
        out = linear(f"{block}.output.dense", F.gelu(linear(f"{block}.intermediate.dense", y)))
        y = norm(state, f"{block}.output.LayerNorm", out + y, 1e-12)
    return (head(state, y[:, 0], "mlp.") - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    """A folder for each repository, and by scorer what papers print for `pictures`."""
    root = tmp_path_factory.mktemp("published")
    pick = save_clip(root / "yuvalkirstain/PickScore_v1", 1)
    clip = save_clip(root / "openai/clip-vit-large-patch14", 2)
    tokenizer = clip_tokenizer()
    tokenizer.save_pretrained(root / "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "two", "dogs", "street", "night", "tail"]
    bert = BertTokenizer(vocab={word: place for place, word in enumerate(words)})
    bert.save_pretrained(root / "google-bert/bert-base-uncased")
    expected = {}
    with torch.no_grad():
        for name, model in (("pickscore", pick), ("clipscore", clip)):
            text = tokens(tokenizer, 77)
            logits = model(input_ids=text.input_ids, pixel_values=pixels()).logits_per_image.diag()
            expected[name] = logits if name == "pickscore" else logits / 100
        embedding = clip.visual_projection(clip.vision_model(pixels()).pooler_output)
        embedding = embedding / embedding.norm(dim=-1, keepdim=True)
        weights = head_weights(16)
        (root / "trl-lib/ddpo-aesthetic-predictor").mkdir(parents=True)
        torch.save(weights, root / "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth")
        expected["aesthetic"] = head(weights, embedding)
        weights = open_clip_weights(len(tokenizer))
        (root / "xswu/HPSv2").mkdir(parents=True)
        torch.save({"epoch": 3, "state_dict": weights}, root / "xswu/HPSv2/HPS_v2.1_compressed.pt")
        # open_clip pads with zeros after the last token
        ids = text.input_ids * (text.attention_mask.cumsum(-1) <= text.attention_mask.sum(-1, keepdim=True))
        expected["hpsv2"] = hps(weights, ids * text.attention_mask)
        weights = blip_weights(len(words))
        (root / "THUDM/ImageReward").mkdir(parents=True)
        torch.save(weights, root / "THUDM/ImageReward/ImageReward.pt")
        expected["imagereward"] = image_reward(weights, bert)
    return root, expected


ARGUMENTS = {
    "pickscore": {"path": "yuvalkirstain/PickScore_v1", "tokenizer": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"},
    "clipscore": {"path": "openai/clip-vit-large-patch14"},
    "aesthetic": {"path": "openai/clip-vit-large-patch14", "head": "trl-lib/ddpo-aesthetic-predictor"},
    "hpsv2": {"path": "xswu/HPSv2", "tokenizer": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"},
    "imagereward": {"path": "THUDM/ImageReward", "tokenizer": "google-bert/bert-base-uncased"},
}


def make(name: str, root: Path, **more):
    return load_reward({"name": name, **{key: str(root / value) for key, value in ARGUMENTS[name].items()}, **more})


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_number_is_that_of_the_published_model(name: str, published):
    root, expected = published
    wanted = expected[name].tolist()
    assert max(wanted) - min(wanted) > 1e-3  # the pictures are told apart
    table = make(name, root, scale="table", batch_size=2)
    assert table(prompts=PROMPTS, images=pictures()) == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    training = make(name, root)(prompts=PROMPTS, images=pictures())
    over = {"pickscore": 26, "aesthetic": 10}.get(name, 1)
    assert training == pytest.approx([value / over for value in wanted], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_video_has_the_mean_of_its_frames(name: str, published):
    scorer = make(name, published[0], num_frames=3)
    frames = [picture.convert("RGB") for picture in pictures()]
    (video,) = scorer(prompts=["a cat"], images=[[frames[0], frames[0], frames[1], frames[2], frames[2]]])
    apart = scorer(prompts=["a cat"] * 3, images=frames)
    assert video == pytest.approx(sum(apart) / 3, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_half_precision_is_near(name: str, published):
    half = make(name, published[0], dtype="bfloat16", scale="table", placement="device")
    scores = torch.tensor(half(prompts=PROMPTS, images=pictures()))
    assert next(half.model.parameters()).dtype == torch.bfloat16
    spread = published[1][name].abs().max()
    assert (scores - published[1][name]).abs().max() < 0.1 * spread


def test_the_scale_of_logits_is_never_rounded(tmp_path):
    """Embeddings of one number have a cosine of 1 or -1 in any precision; bfloat16 has 98.9 for 100."""
    save_clip(tmp_path, 3, width=1)
    scorer = load_reward({"name": "clipscore", "path": str(tmp_path), "dtype": "bfloat16"})
    assert [abs(score) for score in scorer(prompts=PROMPTS, images=pictures())] == pytest.approx([1, 1, 1], abs=1e-5)


def test_by_their_published_names(published, tmp_path):
    root, expected = published
    code = f"""
import pickle
from diffusion_opd.rewards import Scorer, load_reward
pictures = pickle.load(open({str(tmp_path / "pictures")!r}, "rb"))
result = {{}}
for name in {list(ARGUMENTS)!r}:
    result[name] = load_reward(name, scale="table")(prompts={PROMPTS!r}, images=pictures)
"""
    (tmp_path / "pictures").write_bytes(pickle.dumps(pictures()))
    with HubServer() as hub:
        for folder in root.glob("*/*"):
            hub.publish(folder.relative_to(root).as_posix(), folder)
        result = client(hub, tmp_path / "home", code)
    for name, wanted in expected.items():
        assert result[name] == pytest.approx(wanted.tolist(), rel=1e-4, abs=1e-5), name


def test_a_scorer_is_the_same_reward_wherever_it_runs(published):
    root = published[0]
    scorer = make("pickscore", root)
    before = hash_function(scorer)
    scorer(prompts=["a cat"], images=pictures()[:1])
    assert hash_function(scorer) == before
    assert hash_function(make("pickscore", root, device="cpu", batch_size=1, placement="device")) == before
    for more in ({"scale": "table"}, {"dtype": "bfloat16"}, {"num_frames": 2}, {"tokenizer": "another"}):
        arguments = {key: str(root / value) for key, value in ARGUMENTS["pickscore"].items()}
        assert hash_function(load_reward({"name": "pickscore", **arguments, **more})) != before


class Moving(nn.Module):
    """A model that notes where it is moved to."""

    def __init__(self):
        super().__init__()
        self.moves = []

    def to(self, place):
        self.moves += [place] if isinstance(place, str) else []
        return self


class Still(Scorer):
    __name__ = "still"

    def load(self):
        return Moving()

    def score(self, prompts, images, **columns):
        self.model.moves.append(len(images))
        return [float(index) for index in range(len(images))]


def test_a_model_moves_once_for_a_rollout_and_once_for_an_evaluation(tmp_path, monkeypatch):
    """Between them it is in main memory: while the policy learns, and when all is done."""
    scorer = Still(device="there", batch_size=1)
    learning = []

    class Watched(GRPO):
        _name = GRPO._name

        def training_step(self, *args):
            learning.append(scorer.model.moves[-1])
            return super().training_step(*args)

    monkeypatch.setitem(CONFIGS, Watched, CONFIGS[GRPO])
    trainer = trainer_of(
        Watched,
        tmp_path,
        rewards=scorer,
        max_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        num_generations=2,
        eval_dataset=DATA,
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=1,
    )
    trainer.train()
    assert learning == ["cpu"] * 4
    rounds = "".join(str(move)[0] for move in scorer.model.moves).split("c")
    assert rounds[:3] == ["t" + "t1" * 2, "t" + "t1" * 2, "t" + "t1" * len(DATA)] and rounds[-1] == ""


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_what_does_not_fit_is_refused_by_name(published, tmp_path, capsys):
    root = published[0]
    weights = torch.load(root / "xswu/HPSv2/HPS_v2.1_compressed.pt")["state_dict"]

    def hpsv2(state):
        torch.save({"state_dict": state}, tmp_path / "hps.pt")
        make("hpsv2", root, path=str(tmp_path / "hps.pt"))(prompts=["a cat"], images=pictures()[:1])

    with pytest.raises(ValueError, match="lack.*visual_projection.weight"):
        hpsv2({key: tensor for key, tensor in weights.items() if key != "visual.proj"})
    with pytest.raises(ValueError, match="hold, unread, extra.weight"):
        hpsv2(weights | {"extra.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match="'pickscore' gave nan for 'a cat'"):
        scorer = make("pickscore", root)
        scorer(prompts=["a dog"], images=pictures()[:1])
        scorer.model.clip.visual_projection.weight.data.fill_(math.nan)
        scorer(prompts=["a cat"], images=pictures()[:1])
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="for the scorer 'hpsv2' cannot be loaded"):
        make("hpsv2", root, path=str(tmp_path / "evil.pt"))(prompts=["a cat"], images=pictures()[:1])
    assert "executed" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="nowhere.*of the scorer 'clipscore' cannot be loaded"):
        load_reward({"name": "clipscore", "path": str(tmp_path / "nowhere")})(prompts=["a"], images=pictures()[:1])
    with pytest.raises(ValueError, match="'pickscore' takes no \\['pth'\\]"):
        load_reward({"name": "pickscore", "pth": "x"})
    wrongs = {"scale": "tables", "placement": "gpu", "batch_size": 0, "num_frames": 0, "dtype": "bf16"}
    for wrong in [{key: value} for key, value in wrongs.items()] + [{"dtype": torch.int8}]:
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` of pickscore must be"):
            load_reward({"name": "pickscore", **wrong})
