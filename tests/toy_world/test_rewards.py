"""The two trainers of stage 1 on the toy world: a few optimizer steps make the pictures better."""

import pytest

from examples.toy_world.evaluate import evaluate
from examples.toy_world.pipeline import load_base
from examples.toy_world.rewards import reinforce
from examples.toy_world.specialists import GRPO, NFT

SMALL = {"per_device_train_batch_size": 24, "num_generations": 6, "save_strategy": "no", "learning_rate": 2e-3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "settings", "max_steps"), [("nft", NFT, 8), pytest.param("grpo", GRPO, 16, marks=pytest.mark.nightly)]
)
def test_reward_rises_on_prompts_that_were_held_out(algorithm, settings, max_steps, tmp_path):
    before = evaluate(load_base(), 20, tasks=("style",))["style"]
    trainer = reinforce(algorithm, ["style"], tmp_path, max_steps=max_steps, **settings | SMALL)
    after = evaluate(trainer.pipeline, 20, tasks=("style",))["style"]
    assert after > before + 0.1
