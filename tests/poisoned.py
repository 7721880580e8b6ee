"""A stand-in for a device: what is away from it holds nonsense, which shows in whatever reads it."""

import torch

from diffusion_opd.placement import Parts


class Poisoned(Parts):
    """Nothing moves on a CPU: what is away is not the copy in CPU memory, but NaN."""

    def leave(self) -> None:
        super().leave()
        for tensor in self.tensors:
            nonsense = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max // 2
            tensor.data = torch.full_like(tensor.data, nonsense) if tensor.dtype != torch.bool else tensor.data
