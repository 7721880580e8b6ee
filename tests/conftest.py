"""What every test run has in common: no network, one thread, and no output but pytest's.

The environment is set before anything of Hugging Face is imported, because those libraries read it on import.
"""

import os

os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "disabled",
        # The models are so small that threads only wait for each other; processes started by a test inherit this.
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
)
# TRL skips its telemetry where CI is set, so with it a trainer that breaks on telemetry would pass here.
os.environ.pop("CI", None)

import diffusers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

torch.set_num_threads(1)
for library in (diffusers, transformers):
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
