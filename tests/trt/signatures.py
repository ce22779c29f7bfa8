"""What the cuda-bindings that Python finds have: `python signatures.py < wanted`, as JSON; see test_bindings.py.

`wanted` are the names of functions of each module, and the members of the runtime's enumerations. Functions are also
called as the backend calls them, with handles that are none: that they take such arguments shows without a GPU.
"""

import ctypes
import inspect
import json
import sys
from importlib import import_module, metadata


def refusals(runtime, driver, names):
    """What functions say of the kinds of their arguments, by their names in CUDA 13."""
    node = runtime.cudaGraphNodeParams()
    node.type = runtime.cudaGraphNodeType.cudaGraphNodeTypeConditional
    node.conditional.handle = runtime.cudaGraphConditionalHandle(1 << 40)
    node.conditional.type = runtime.cudaGraphConditionalNodeType.cudaGraphCondTypeIf
    node.conditional.size = 1
    assert int(node.conditional.handle) == 1 << 40 and node.conditional.size == 1
    graph, stream, added = runtime.cudaGraph_t(0), runtime.cudaStream_t(0), runtime.cudaGraphNode_t(0)
    mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    flag = runtime.cudaStreamUpdateCaptureDependenciesFlags.cudaStreamSetCaptureDependencies
    default = runtime.cudaGraphConditionalHandleFlags.cudaGraphCondAssignDefault
    values = (1, 2, 3, 4), (ctypes.c_ulonglong, ctypes.c_void_p) * 2
    calls = {
        "cudaGraphAddNode": (graph, [added], [runtime.cudaGraphEdgeData()], 1, node),
        "cudaGraphConditionalHandleCreate": (graph, 0, default),
        "cudaStreamUpdateCaptureDependencies": (stream, [added], None, 1, flag),
        "cudaStreamBeginCaptureToGraph": (stream, graph, None, None, 0, mode),
        "cuLaunchKernel": (driver.CUfunction(0), 1, 1, 1, 1, 1, 1, 0, stream, values, 0),
    }
    found = {}
    for name, arguments in calls.items():
        function = getattr(driver if name.startswith("cuL") else runtime, names.get(name, name))
        try:
            function(*arguments)
        except RuntimeError:  # without a driver
            pass
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            found[name] = str(error)
    return found


def returned(runtime, names):
    """How much is said of a stream that is captured."""
    name = "cudaStreamGetCaptureInfo"
    try:
        return len(getattr(runtime, names.get(name, name))(runtime.cudaStream_t(0)))
    except RuntimeError:  # cuda-bindings 12.8 without a driver
        return None


def main(wanted):
    modules = {name: import_module(f"cuda.bindings.{name}") for name in wanted["functions"]}
    functions = {
        module: {
            name: list(inspect.signature(getattr(modules[module], name)).parameters)
            for name in names
            if hasattr(modules[module], name)
        }
        for module, names in wanted["functions"].items()
    }
    members = {
        kind: {name: int(getattr(getattr(modules["runtime"], kind), name)) for name in names}
        for kind, names in wanted["members"].items()
    }
    return {
        "version": metadata.version("cuda-bindings"),
        "cudart": modules["runtime"].CUDART_VERSION,
        "non_blocking": modules["runtime"].cudaStreamNonBlocking,
        "functions": functions,
        "members": members,
        "captured": returned(modules["runtime"], wanted["names"]),
        "refused": refusals(modules["runtime"], modules["driver"], wanted["names"]),
    }


if __name__ == "__main__":
    print(json.dumps(main(json.load(sys.stdin))))
