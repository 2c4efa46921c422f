"""This control has the size of SAM's perturbation and not its direction."""

from typing import Any

import torch
from torch import nn
from trl import SFTTrainer


class RandomPerturbationTrainer(SFTTrainer):
    """`SFTTrainer` whose gradients are taken at w + n, n random and of a given L2 norm over all trained parameters.

    The only change is in `training_step`. Weights are put back bit for bit. One micro-batch makes a step.

    Args:
        random_rho (`float`): Norm of n.
        *args, **kwargs: `SFTTrainer`'s.
    """

    def __init__(self, *args: Any, random_rho: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.random_rho = random_rho
        self.generator = torch.Generator().manual_seed(self.args.seed)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Run `SFTTrainer`'s step at w + n."""
        trained = [p for p in model.parameters() if p.requires_grad]
        noise = [torch.randn(p.shape, generator=self.generator).to(p) for p in trained]
        norm = torch.stack(torch._foreach_norm(noise)).norm()
        saved = [p.detach().clone() for p in trained]
        try:
            with torch.no_grad():
                for parameter, n in zip(trained, noise, strict=True):
                    parameter.add_(n * (self.random_rho / norm))
            return super().training_step(model, inputs, num_items_in_batch)
        finally:
            with torch.no_grad():
                for parameter, old in zip(trained, saved, strict=True):
                    parameter.copy_(old)
