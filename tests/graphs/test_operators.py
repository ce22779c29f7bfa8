"""The reader's list of operators is what exports write, in every precision, opset and stem."""

from pathlib import Path

import numpy as np
import onnx
from cases import DENSE, quiet, random_model, tiny

from adavit.architecture import Architecture
from adavit.bundle.bundle import OPSETS, GraphFiles
from adavit.bundle.onnx_read import OPERATORS
from adavit.graphs.files import write_graphs
from adavit.graphs.precision import DENSE_SCALES, Precision, Units, input_scale
from adavit.graphs.stem import stem_tensors

MODELS = [tiny(), tiny(stem="t2t", patch_size=16, qkv_bias=False), DENSE]
LAYERS = {
    "attn.query": "qkv",
    "attn.key": "qkv",
    "attn.value": "qkv",
    "attn.proj": "proj",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
}
"""The linear layers of a block, and what they are called as sites."""


def written(arch: Architecture, name: str, opset: int, folder: Path) -> GraphFiles:
    """The graphs of a model in a precision."""
    tensors = {key: value.detach().numpy() for key, value in random_model(arch).state_dict().items()}
    tensors |= stem_tensors(arch, tensors)
    sites = [f"blocks.{block}.{site}" for block in range(arch.depth) for site in set(LAYERS.values())]
    for block in range(arch.depth):
        for layer in LAYERS:
            key = f"blocks.{block}.{layer}.weight"
            if name == "fp16":
                tensors[key] = tensors[key].astype(np.float16)
                if (bias := key.replace("weight", "bias")) in tensors and layer in ("attn.query", "attn.value"):
                    tensors[bias] = tensors[bias].astype(np.float16)
            elif name == "int8":
                tensors[f"{key}.scale"] = np.ones(len(tensors[key]), np.float32)
                tensors[f"{key}.zero"] = np.zeros(len(tensors[key]), np.int8)
                tensors[key] = tensors[key].astype(np.int8)
    if name == "int8":
        scales = (input_scale(site) for site in sites)
        tensors |= {f"{prefix}{scale}": np.ones((), np.float32) for scale in scales for prefix in ("", DENSE_SCALES)}
    parts = [(block, part) for block in range(arch.depth) for part in ("attention", "mlp")]
    units = Units({part: Precision(name) for part in parts})
    return write_graphs(folder, name, arch, tensors, opset, True, quiet, units)


def test_the_list_is_what_exports_write(tmp_path: Path) -> None:
    found: dict[str, set[str]] = {}
    for opset in OPSETS:
        for number, arch in enumerate(MODELS):
            for name in ("fp32", "fp16", "int8")[: 3 if opset >= 19 else 1]:
                folder = tmp_path / f"{opset}.{number}.{name}"
                folder.mkdir()
                for stored in written(arch, name, opset, folder).files()[1:]:
                    for node in onnx.load(folder / stored.file, load_external_data=False).graph.node:
                        found.setdefault(node.op_type, set()).update(entry.name for entry in node.attribute)
    assert found == {op: set(attributes) for op, attributes in OPERATORS.items()}
