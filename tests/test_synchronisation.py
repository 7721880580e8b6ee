"""In a training step no host waits for its device: what would read a tensor's numbers is listed, by its place in the
code.

On a CPU nothing waits, so the calls that would are caught.
"""

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffusion_opd import DiffusionGRPOTrainer, DiffusionNFTTrainer, DiffusionOPDTrainer
from tests.rl_training import trainer_of as rl_trainer_of
from tests.streaming_pipelines import STREAMING, STREAMING_CALL
from tests.tiny_pipelines import BUILDERS, CALL
from tests.training import DATA, config, lora, trainer_of

READS = {
    getattr(Tensor, name)
    for name in "item tolist numpy cpu nonzero __bool__ __float__ __int__ __index__ __array__ __contains__".split()
} | {torch.equal, torch.allclose, torch.nonzero, Tensor.equal, Tensor.allclose, torch.is_nonzero}


class Reads(TorchFunctionMode):
    """Who reads numbers: the innermost frame of this package, of diffusers or of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.places = Counter[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            self.places[self._place()] += 1
        return func(*args, **(kwargs or {}))

    def _place(self) -> str:
        frame: Any = sys._getframe(2)
        while frame is not None:
            module = frame.f_globals.get("__name__", "")
            if not module.startswith(("torch.", "tests.")):
                return f"{module}.{frame.f_code.co_name}"
            frame = frame.f_back
        return "?"


def reads_of(cls: type) -> Any:
    """The trainer, with what is read in its second optimizer step, when everything has been seen once."""

    class Watched(cls):
        reads = Reads()

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            if self.state.global_step != 1:
                return super().training_step(*args, **kwargs)
            with self.reads:
                return super().training_step(*args, **kwargs)

    return Watched


def test_the_tracer_sees_what_reads():
    with Reads() as reads:
        x = torch.ones(2)
        for read in (lambda: x[0].item(), lambda: x.tolist(), lambda: bool(x[0]), lambda: float(x[0]), lambda: x.cpu()):
            read()
        torch.equal(x, x)
        x.nonzero()
    assert reads.places.total() == 7


def ours(reads: Counter[str]) -> Counter[str]:
    return Counter({place: count for place, count in reads.items() if place.startswith("diffusion_opd.")})


# Of diffusers: whether `t` is before the boundary of two denoisers; a mask, in each call of the denoiser
AT_EACH_STEP = (
    "diffusers.pipelines.wan.pipeline_wan.__call__",
    "diffusers.models.transformers.transformer_ltx2.__call__",
)


@pytest.mark.parametrize("transition", ["ode", "flow_sde"])
@pytest.mark.parametrize("family", ["sd3", "flux", "wan", "zimage", "sana", "ltx2"])
def test_a_step_of_distillation_reads_nothing(tmp_path, family, transition):
    """Nothing here reads; pipelines and encoders do as they begin (`sigmas` and masks), and not at each step."""
    reads = []
    for steps in (3, 5):
        streams = family in STREAMING
        build = STREAMING[family] if streams else BUILDERS[family]
        call = dict((STREAMING_CALL if streams else CALL)[family])
        settings = dict(transition=transition, num_inference_steps=steps, call_kwargs=call)
        trainer = reads_of(DiffusionOPDTrainer)(
            build(0),
            build(1),
            config(tmp_path, **settings),
            train_dataset=DATA.remove_columns("teacher_id"),
            peft_config=lora(),
        )
        trainer.train()
        reads.append(trainer.reads.places)
    assert not ours(reads[0])
    for place in AT_EACH_STEP:
        for seen in reads:
            seen.pop(place, None)
    assert reads[0] == reads[1]
    if family in ("sd3", "flux"):
        assert not reads[0]


def test_a_vp_model(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.training.DiffusionOPDTrainer", reads_of(DiffusionOPDTrainer))
    trainer = trainer_of(tmp_path, "sd15", noise_level=1.0, transition="ddim")
    trainer.train()
    assert not trainer.reads.places


@pytest.mark.parametrize("cls", [DiffusionNFTTrainer, DiffusionGRPOTrainer])
def test_a_step_of_learning_from_rewards_reads_nothing(tmp_path, cls):
    trainer = rl_trainer_of(reads_of(cls), tmp_path, beta=0.1)
    trainer.train()
    reads = ours(trainer.reads.places)
    # Where a rollout begins to be learnt from, which lies in CPU memory: once a rollout
    assert reads.pop("diffusion_opd.rl.grpo_trainer._visits", 0) <= 1
    assert not reads
