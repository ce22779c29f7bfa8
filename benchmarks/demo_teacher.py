"""Trains the convolutional network that teaches the demo's backbones, and writes it as an ONNX graph.

    python benchmarks/demo_teacher.py --data /usr/share/datasets/fashion-mnist --output teacher.onnx

A small residual network learns small grey images in minutes, where a vision transformer takes hours; its soft labels
shorten that (Touvron et al., ICML 2021). Any classifier as ONNX does: see `adavit-train dense --teacher`.
It needs the extras export, train and test.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adavit.bundle.preprocessing import Preprocessor
from adavit.console.output import Progress
from adavit.training.data import LabelledImages, open_images

BATCH, SHIFT, HOLE = 128, 2, 7
MOMENTUM, DECAY, SMOOTHING = 0.9, 5e-4, 0.05
CYCLES = ((14, 0.15, True), (6, 0.06, False))  # passes, highest learning rate, whether squares are blackened


def convolve(channels: int, filters: int, side: int = 3, stride: int = 1) -> nn.Module:
    """Convolution, batch normalisation, ReLU."""
    layer = nn.Conv2d(channels, filters, side, stride, side // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(filters), nn.ReLU(inplace=True))


class Residual(nn.Module):
    """x + two convolutions of it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(convolve(channels, channels), convolve(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layers(x)
        return out


class Teacher(nn.Module):
    """Images [B, 3, S, S], normalised for the transformer, to logits [B, C]; it looks at their first channel."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            convolve(1, 48, 5, 2), convolve(48, 64), nn.MaxPool2d(2), Residual(64),
            convolve(64, 128), Residual(128), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(128, classes),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images[:, :1])
        return logits


def load(data: LabelledImages) -> tuple[Tensor, Tensor]:
    """All images [n, 3, S, S], normalised, and labels [n]."""
    normalise = Preprocessor(len(data.pixels(0))).normalise
    images = np.stack([normalise(data.pixels(i)) for i in range(len(data.labels))])
    return torch.from_numpy(images), torch.from_numpy(data.labels)


def vary(images: Tensor, holes: bool, generator: torch.Generator) -> Tensor:
    """Shifts the batch, mirrors half of it, and blackens a square of it."""
    black = -Preprocessor.mean[0] / Preprocessor.std[0]
    side = images.shape[-1]
    top, left = torch.randint(0, 2 * SHIFT + 1, (2,), generator=generator).tolist()
    images = F.pad(images, (SHIFT,) * 4, value=black)[..., top : top + side, left : left + side].clone()
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    images[mirrored] = images[mirrored].flip(-1)
    if holes:
        top, left = torch.randint(0, side - HOLE + 1, (2,), generator=generator).tolist()
        images[..., top : top + HOLE, left : left + HOLE] = black
    return images


def train(model: Teacher, images: Tensor, labels: Tensor, seed: int, bf16: bool, progress: Progress) -> None:
    """Stochastic gradient descent, its learning rate rising and falling once a cycle."""
    generator = torch.Generator().manual_seed(seed)
    per_epoch = len(labels) // BATCH
    steps = per_epoch * sum(epochs for epochs, _, _ in CYCLES)
    done = 0
    for epochs, rate, holes in CYCLES:
        optimiser = torch.optim.SGD(model.parameters(), rate, MOMENTUM, nesterov=True, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=epochs * per_epoch, pct_start=0.2)
        for step in range(epochs * per_epoch):
            if step % per_epoch == 0:
                order = torch.randperm(len(labels), generator=generator)
            chosen = order[step % per_epoch * BATCH :][:BATCH]
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = model(vary(images[chosen], holes, generator).contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), labels[chosen], label_smoothing=SMOOTHING)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            done += 1
            progress("training", done / steps)


@click.command(help=__doc__)
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Folder with train/ and test/, or IDX.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The graph.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--bf16", is_flag=True, help="Train in bfloat16 (autocast); faster where the CPU has it.")
def main(data: Path, output: Path, seed: int, bf16: bool) -> None:
    torch.manual_seed(seed)
    learnt, held_out = open_images(data, "train"), open_images(data, "test")
    model = Teacher(len(learnt.classes)).to(memory_format=torch.channels_last)
    with Progress() as progress:
        train(model.train(), *load(learnt), seed, bf16, progress)
    images, labels = load(held_out)
    with torch.inference_mode():
        right = torch.cat([model.eval()(part).argmax(1) for part in torch.split(images, BATCH)]) == labels
    batch = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(model, (images[:2],), output, input_names=["images"], output_names=["logits"],
                      dynamic_shapes=batch, external_data=False, verbose=False)  # fmt: skip
    print(f"{output}: {right.float().mean():.2%} of {len(labels)} test images right", file=sys.stderr)


if __name__ == "__main__":
    main()
