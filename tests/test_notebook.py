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


@pytest.mark.slow
def test_quickstart_notebook(pytestconfig):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    path = pytestconfig.rootpath / "examples" / "quickstart.ipynb"
    notebook = nbformat.read(path, nbformat.current_nbformat)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in cells)  # pictures of a run are for who runs it
    training = next(cell for cell in cells if "trainer.train()" in cell.source)
    training.source = training.source.replace("max_steps=40", "max_steps=10")
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    pictures = [cell for cell in cells if any("image/png" in output.get("data", {}) for output in cell.outputs)]
    assert len(pictures) == 2
    printed = "".join(
        output.get("text", "") for cell in cells for output in cell.outputs if output.output_type == "stream"
    )
    first, last = (float(line.split()[-1]) for line in printed.splitlines() if line.startswith("step "))
    assert last < first
