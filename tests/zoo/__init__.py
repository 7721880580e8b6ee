"""Pipeline classes of diffusers, each of tiny parts: `ZOO[name of the class]`. What families.py, say, holds is
`PIPELINES`, a dict of the same kind."""

import importlib
import pkgutil

from .tiny import Tiny

ZOO: dict[str, Tiny] = {}
for module in pkgutil.iter_modules(__path__):
    ZOO |= getattr(importlib.import_module(f"{__name__}.{module.name}"), "PIPELINES", {})
