"""Which attention kernel denoisers use: the one that is asked for, in every party, and no other model's."""

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_opd import DiffusionNFTConfig, DiffusionNFTTrainer, DiffusionOPDTrainer, Teacher
from diffusion_opd.evaluation import evaluate
from diffusion_opd.policy import Policy
from tests.adapters import draw, save_diffusers
from tests.tiny_pipelines import BUILDERS, CALL
from tests.training import PROMPTS, config, history, lora, trained

FUSED = "_scaled_dot_product_flash_attention_for_cpu"  # what "native" is on a CPU; "_native_math" is its parts


class Kernels(TorchDispatchMode):
    """While it is active, counts the fused attention of a denoiser."""

    def __init__(self, *denoisers: nn.Module):
        super().__init__()
        self.fused, self.calls, self.inside = 0, 0, False
        for denoiser in denoisers:
            denoiser.register_forward_pre_hook(lambda *_: self.enters(True))
            denoiser.register_forward_hook(lambda *_: self.enters(False))

    def enters(self, inside: bool) -> None:
        self.inside = inside
        self.calls += inside

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.fused += self.inside and FUSED in str(function)
        return function(*args, **(kwargs or {}))


def backends(policy: Policy) -> set:
    processors = [getattr(module, "processor", None) for module in policy.denoiser.modules()]
    return {getattr(one._attention_backend, "value", None) for one in processors if hasattr(one, "_attention_backend")}


@pytest.mark.parametrize("full", [False, True])
def test_every_party_attends_by_the_kernel_that_is_asked_for(full: bool, tmp_path):
    """To the same result, within rounding. Nobody else does."""
    for seed, name in enumerate(("base", "whole")):
        BUILDERS["flux"](seed).save_pretrained(tmp_path / name)
    teachers = {
        "lora": str(save_diffusers(tmp_path / "style", "flux")),
        "pipeline": str(tmp_path / "whole"),
        "denoiser": Teacher(tmp_path / "whole", subfolder="transformer"),
        "base": "base",
    }
    data = Dataset.from_dict({"prompt": PROMPTS[:10], "teacher_id": [*teachers, "loaded"] * 2})
    trainers, counted = [], {}
    for backend in (None, "native", "_native_math"):
        args = config(
            tmp_path / str(backend), "flux", attention_backend=backend, max_steps=1, learning_rate=1e-4, anchor="base"
        )
        peft_config = None if full else lora()
        own = teachers | {"loaded": BUILDERS["flux"](1)}
        trainer = DiffusionOPDTrainer(str(tmp_path / "base"), own, args, data, peft_config=peft_config)
        parties = [trainer.student.policy, *trainer.teachers.values(), trainer.untrained()]
        assert [backends(party) for party in parties] == [{backend}] * len(parties)
        counted[backend] = Kernels(*{party.denoiser for party in parties})
        with counted[backend]:
            trainer.train()
        trainers.append(trainer)
    assert counted[None].calls == counted["native"].calls == counted["_native_math"].calls > 0
    assert counted[None].fused == counted["native"].fused > 0 and counted["_native_math"].fused == 0
    plain, native, by_parts = trainers
    assert torch.equal(trained(plain), trained(native)) and history(plain, "loss") == history(native, "loss")
    assert history(by_parts, "loss") == pytest.approx(history(plain, "loss"), rel=1e-4)
    other = BUILDERS["flux"](0)
    with (kernels := Kernels(other.transformer)):
        draw(other, "flux")
    assert kernels.fused > 0


def test_frozen_copies_of_what_learns_from_rewards(tmp_path):
    args = DiffusionNFTConfig(
        str(tmp_path),
        attention_backend="_native_math",
        per_device_train_batch_size=4,
        num_generations=2,
        max_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        num_inference_steps=2,
        call_kwargs={key: value for key, value in CALL["flux"].items() if key != "guidance_scale"},
        image_steps=0,
        beta=0.1,
    )
    trainer = DiffusionNFTTrainer(
        model=BUILDERS["flux"](0),
        reward_funcs=lambda prompts, images, **columns: [float(i % 2) for i in range(len(images))],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS[:4]}),
    )
    assert trainer.base.denoiser is not trainer.model
    parties = [trainer.student.policy, trainer.base, trainer.old]
    assert [backends(party) for party in parties] == [{"_native_math"}] * 3
    with (kernels := Kernels(*{party.denoiser for party in parties})):
        trainer.train()
    assert kernels.calls > 0 and kernels.fused == 0


def test_evaluation_draws_by_it(tmp_path):
    BUILDERS["flux"](0).save_pretrained(tmp_path / "base")
    (tmp_path / "one.txt").write_text("a cat")
    more = {"dtype": "float32", "num_inference_steps": 1, "call_kwargs": CALL["flux"]}
    arguments = str(tmp_path / "base"), ["jpeg_compressibility"], str(tmp_path / "one.txt"), str(tmp_path / "out")
    results = evaluate(*arguments, attention_backend="_native_math", **more)
    assert results["settings"]["attention_backend"] == "_native_math"
    with pytest.raises(ValueError, match=r"other settings \(attention_backend '_native_math', now None\)"):
        evaluate(*arguments, **more)
