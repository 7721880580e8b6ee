"""Backends of quantisation that compute on a CPU, as a config names them."""

from collections.abc import Callable
from typing import Any

import pytest
from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING

BACKENDS = {
    "torchao": {"quant_backend": "torchao", "quant_kwargs": {"quant_type": "Int8WeightOnlyConfig"}},
    "nf4": {
        "quant_backend": "bitsandbytes_4bit",
        "quant_kwargs": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"},
    },
    "int8": {"quant_backend": "bitsandbytes_8bit"},
}


def take(backend: str, put: Callable[[Any, str, Any], None] = setattr) -> str:
    """Lets a backend be used without a GPU: bitsandbytes computes on a CPU, and diffusers asks for one."""
    pytest.importorskip("torchao" if backend == "torchao" else "bitsandbytes")
    if backend != "torchao":
        quantizer = AUTO_QUANTIZER_MAPPING[BACKENDS[backend]["quant_backend"]]
        put(quantizer, "validate_environment", lambda self, **kwargs: None)
        put(quantizer, "update_device_map", lambda self, device_map: {"": "cpu"})
    return backend
