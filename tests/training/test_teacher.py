"""Teachers: dense checkpoints and ONNX graphs give the same lessons; what cannot teach is refused."""

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from cases import python
from onnx import TensorProto, helper
from test_command import SHORT, SMALL, call, fails
from training_cases import CLASSES, SIDE, tiny

from adavit.model import save_safetensors
from adavit.training import start
from adavit.training.errors import TrainingError
from adavit.training.teacher import OnnxTeacher, identify_teacher, open_teacher


def constant_graph(path: Path, logits: list[float], kind: int = TensorProto.FLOAT) -> Path:
    """A graph that gives every image the same logits."""
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["images"], ["flat"]),
            helper.make_node("ReduceMax", ["flat"], ["largest"], axes=[1]),
            helper.make_node("Mul", ["largest", "zero"], ["nothing"]),
            helper.make_node("Add", ["nothing", "row"], ["logits"]),
        ],
        "constant",
        [helper.make_tensor_value_info("images", kind, ["B", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", kind, None)],
        [helper.make_tensor("zero", kind, [], [0.0]), helper.make_tensor("row", kind, [len(logits)], logits)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    dense = start.new_model(replace(tiny(), token_policy=False, head_policy=False, sublayer_policy=False), 1)
    save_safetensors(dense, tmp_path / "dense.safetensors", {})
    return tmp_path / "dense.safetensors"


def test_a_graph_gives_its_logits(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIDE * SIDE, CLASSES))
    images = torch.rand(5, 3, SIDE, SIDE)
    batch = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(net, (images[:2],), tmp_path / "net.onnx", dynamic_shapes=batch, verbose=False)
    torch.testing.assert_close(open_teacher(tmp_path / "net.onnx", tiny())(images).logits, net(images).detach())


def test_a_graph_leaves_the_thread_pool_of_the_process_alone(tmp_path: Path) -> None:
    graph = constant_graph(tmp_path / "teacher.onnx", [0.0] * CLASSES)
    code = """
import sys
from pathlib import Path
import onnxruntime
from adavit.training.teacher import OnnxTeacher
teacher = OnnxTeacher(Path(sys.argv[1]))
onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])  # with default options
onnxruntime.set_global_thread_pool_sizes(2, 1)  # refused where there is one
"""
    done = python(code, graph)
    assert done.returncode == 0, done.stderr


def test_a_student_of_a_constant_teacher_learns_its_logits(tmp_path: Path, idx_folder: Path) -> None:
    graph = constant_graph(tmp_path / "teacher.onnx", [0.0, 0.0, 0.0, 5.0])
    output = tmp_path / "run"
    found = call("dense", "--data", idx_folder, "-o", output, *SMALL[:-6], "--batch", 16, "--steps", 40, "--warmup", 1,
                 "--learning-rate", 1e-2, "--teacher", graph, "--logit-weight", 20, "--log-every", 1)  # fmt: skip
    assert found.exit_code == 0, found.output
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert log[-1]["distil_logits"] < 0.2 * log[0]["distil_logits"]
    assert all(each["loss"] == pytest.approx(each["classification"] + each["distil_logits"]) for each in log)


def test_a_checkpoint_teaches_a_dense_student(tmp_path: Path, idx_folder: Path, weights: Path) -> None:
    output = tmp_path / "run"
    found = call("dense", "--data", idx_folder, "-o", output, *SHORT, "--from", weights, "--teacher", weights,
                 "--augment", "none", "--log-every", 1)  # fmt: skip
    assert found.exit_code == 0, found.output
    first = json.loads((output / "log.jsonl").read_text().splitlines()[0])
    assert first["distil_logits"] == pytest.approx(0, abs=1e-6) and first["classification"] > 0.1


def test_policies_are_learnt_from_a_graph(tmp_path: Path, idx_folder: Path, weights: Path) -> None:
    adapt = ("adapt", "--data", idx_folder, "--from", weights, *SHORT, "--teacher")
    graph = constant_graph(tmp_path / "teacher.onnx", [0.0] * CLASSES)
    assert call(*adapt, graph, "-o", tmp_path / "run").exit_code == 0
    fails("gives logits alone", *adapt, graph, "-o", tmp_path / "other", "--attention-weight", 0.1, code=2)


def test_a_teacher_is_told_by_its_weights_too(tmp_path: Path) -> None:
    graph = constant_graph(tmp_path / "teacher.onnx", [0.0] * CLASSES)
    known = identify_teacher(graph)
    assert known == identify_teacher(graph.rename(tmp_path / "moved.onnx"))
    (tmp_path / "moved.onnx.data").write_bytes(b"weights beside it")
    assert known != identify_teacher(tmp_path / "moved.onnx")


def test_what_cannot_teach_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a graph")
    with pytest.raises(TrainingError, match="not a model that ONNX Runtime can load"):
        open_teacher(broken, tiny())
    with pytest.raises(TrainingError, match="No such file"):
        open_teacher(tmp_path / "absent.onnx", tiny())
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(TrainingError, match="is a folder, not a file"):
        open_teacher(tmp_path / "folder.onnx", tiny())
    with pytest.raises(TrainingError, match="one float32 input"):
        open_teacher(constant_graph(tmp_path / "double.onnx", [0.0] * CLASSES, TensorProto.DOUBLE), tiny())
    graph = constant_graph(tmp_path / "three.onnx", [0.0] * 3)
    with pytest.raises(TrainingError, match=r"gives \[1, 3\] for one image; expected \[1, 4\] logits"):
        open_teacher(graph, tiny())
    with pytest.raises(TrainingError, match="cannot run on images"):
        OnnxTeacher(graph)(torch.zeros(1, 1, SIDE, SIDE))
