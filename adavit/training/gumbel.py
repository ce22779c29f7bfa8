"""The straight-through Gumbel-sigmoid: hard decisions forward, a smooth gradient backward."""

from __future__ import annotations

import torch
from torch import Tensor

from adavit.model import policy as P
from adavit.training.distributed import World

__all__ = ["GumbelDecide", "noise_scale", "straight_through"]


def straight_through(logits: Tensor, noise: Tensor | float, threshold: float, temperature: float) -> Tensor:
    """Hard decisions with the gradient of a soft one.

        forward   m = 1[ sigmoid(z + n) > threshold ]
        backward  dm/dz = d/dz sigmoid((z + n) / tau)

    The noise n is the difference of two Gumbel(0, 1) samples. The threshold acts at temperature 1, as at
    inference, and so does everything else where n is 0: training and inference then decide alike. Only the
    gradient is smoothed.

    Args:
        logits: z, any shape.
        noise: n, of the same shape, or a number.
        threshold: as at inference.
        temperature: tau.
    """
    perturbed = logits.float() + noise
    soft = torch.sigmoid(perturbed / temperature)
    return P.decide(perturbed, threshold) + (soft - soft.detach())


def noise_scale(step: int, steps: int, anneal: float) -> float:
    """Factor on the noise at `step`: from 1 linearly to 0 at the fraction `anneal` of the run; 0 keeps it at 1."""
    return 1.0 if anneal == 0 else max(0.0, 1 - step / (anneal * steps))


class GumbelDecide:
    """Decides with noise; the noise of a step is a function of the seed and the step alone.

    Every process draws the noise of the global batch and uses its own part, so that the number of processes
    changes nothing.
    """

    def __init__(self, temperature: float, scale: float, seed: int, world: World) -> None:
        self._temperature, self._scale, self._world = temperature, scale, world
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor, threshold: float) -> Tensor:
        """A mask of 0 and 1 in the shape of the logits [B, ...]."""
        noise: Tensor | float = 0.0
        if self._scale > 0:
            batch = logits.shape[0] * self._world.size
            uniform = torch.rand(2, batch, *logits.shape[1:], generator=self._generator)
            gumbel = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
            noise = self._scale * (gumbel[0] - gumbel[1])[self._world.share(batch)].to(logits.device)
        return straight_through(logits, noise, threshold, self._temperature)
