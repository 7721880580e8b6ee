"""What the extra `examples` brings, for tables and plots; whoever lacks it is told so before anything is trained."""

try:
    import matplotlib
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    raise ImportError("tables and plots need matplotlib and rich: pip install 'diffusion-opd[examples]'") from error

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

__all__ = ["Console", "Table", "plt"]
