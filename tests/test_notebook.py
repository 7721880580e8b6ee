"""The trainer in a notebook, where transformers shows its progress another way."""

import pytest

CELLS = [
    """
import os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, {root!r})
from datasets import Dataset
from peft import LoraConfig
from tests.tiny_pipelines import BUILDERS, CALL, LORA_TARGETS
from diffusion_opd import DiffusionOPDConfig, DiffusionOPDTrainer
""",
    """
trainer = DiffusionOPDTrainer(
    BUILDERS["sd3"](0),
    {{"a": BUILDERS["sd3"](1), "b": BUILDERS["sd3"](2)}},
    DiffusionOPDConfig({out!r}, max_steps=2, logging_steps=1, num_inference_steps=2, report_to="none",
                       per_device_train_batch_size=1, call_kwargs=CALL["sd3"]),
    train_dataset={{key: Dataset.from_dict({{"prompt": ["a fox", "a bird"]}}) for key in "ab"}},
    peft_config=LoraConfig(target_modules=LORA_TARGETS),
)
trainer.train()
""",
    "trainer.train(); print('steps', trainer.state.global_step)",  # a cell is run twice
    "trainer.pipeline('a fox', num_inference_steps=2, **CALL['sd3']).images[0]",
]


@pytest.mark.slow
def test_notebook(tmp_path, pytestconfig):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    fields = {"root": str(pytestconfig.rootpath), "out": str(tmp_path / "out")}
    cells = [nbformat.v4.new_code_cell(cell.format(**fields)) for cell in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    # jupyter starts "python3" with the interpreter that runs this test
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    assert any("steps 2" in output.get("text", "") for output in outputs)
    assert "image/png" in outputs[-1]["data"]
    assert (tmp_path / "out" / "images").is_dir()
