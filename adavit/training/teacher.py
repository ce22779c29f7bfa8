"""Whom a run learns from: a dense model of this package, or any classifier as an ONNX graph."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from adavit.architecture import Architecture
from adavit.errors import one_line
from adavit.files import sha256
from adavit.model import AdaViT, load_checkpoint
from adavit.model import policy as P
from adavit.model.adavit import Output
from adavit.reading import open_regular
from adavit.runtime.backends.onnxruntime.process import import_onnxruntime
from adavit.training.errors import TrainingError

__all__ = ["OnnxTeacher", "Teacher", "check_teacher", "identify_teacher", "open_teacher"]


class OnnxTeacher(nn.Module):
    """A classifier in ONNX Runtime on the CPU: images [B, 3, S, S], normalised as in training, to logits [B, C].

    Args:
        path: a graph with one float32 input of those images and the logits as its first output.

    Raises:
        TrainingError: it is not such a graph.
        BackendError: ONNX Runtime is not installed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.force_spinning_stop", "1")  # the student needs the cores
        try:
            open_regular(path).close()
        except OSError as error:
            raise TrainingError(f"{path}: cannot be read ({error.strerror}); give a graph or a checkpoint") from None
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise TrainingError(f"{path}: not a model that ONNX Runtime can load ({one_line(error)})") from None
        self._path, inputs = path, self._session.get_inputs()
        if len(inputs) != 1 or inputs[0].type != "tensor(float)":
            raise TrainingError(f"{path}: a teacher takes one float32 input, images [B, 3, S, S]")
        self._input, self._output = inputs[0].name, self._session.get_outputs()[0].name

    def forward(self, images: Tensor, decide: P.Decide | None = None) -> Output:
        """The logits alone; a graph tells neither attention nor states."""
        try:
            (logits,) = self._session.run([self._output], {self._input: images.cpu().numpy()})
        except Exception as error:  # as above
            raise TrainingError(
                f"{self._path}: cannot run on images {list(images.shape)} ({one_line(error)})"
            ) from None
        return Output(torch.from_numpy(logits).to(images.device), [], [], [])


Teacher = AdaViT | OnnxTeacher


def open_teacher(path: Path, arch: Architecture) -> Teacher:
    """The teacher of a file, for a student of shapes `arch`: an ONNX graph by its suffix, else a checkpoint.

    Raises:
        TrainingError: it cannot be read, or cannot teach that student.
        CheckpointError: as of `load_checkpoint`.
    """
    teacher = OnnxTeacher(path) if path.suffix == ".onnx" else load_checkpoint(path, arch.heads)
    check_teacher(teacher, arch)
    return teacher


def identify_teacher(path: Path) -> str:
    """What tells a teacher's file from others, and with a graph the weights that torch puts beside it."""
    parts = path, path.with_name(f"{path.name}.data")
    return sha256(b"".join(part.read_bytes() for part in parts if part.is_file()))[:16]


def check_teacher(teacher: Teacher, arch: Architecture) -> None:
    """Refuses a teacher that cannot teach a student of shapes `arch`.

    Raises:
        TrainingError: it has policies, other classes, or another image size.
    """
    if isinstance(teacher, OnnxTeacher):
        found = teacher(torch.zeros(1, 3, arch.image_size, arch.image_size)).logits.shape
        if tuple(found) != (1, arch.classes):
            raise TrainingError(f"the teacher gives {list(found)} for one image; expected [1, {arch.classes}] logits")
        return
    if teacher.arch.adapts:
        raise TrainingError("the teacher has policies; give a dense model with --teacher")
    for what, theirs, ours in (
        ("class count", teacher.arch.classes, arch.classes),
        ("image size", teacher.arch.image_size, arch.image_size),
    ):
        if theirs != ours:
            raise TrainingError(
                f"the teacher's {what} is {theirs}, the student's {ours}; train a dense teacher on this data first"
            )
