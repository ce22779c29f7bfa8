import numpy as np

from adavit.runtime import Runtime


def test_rows_are_moved_as_numpy_moves_them(runtime: Runtime) -> None:
    arch, backend, source = runtime.architecture, runtime.backend, np.random.default_rng(0)
    kept = np.asarray([0, 2, 5])
    x, rows, vectors = (
        source.standard_normal((count, arch.width)).astype(np.float32) for count in (arch.tokens, len(kept), arch.depth)
    )

    def run(name: str, *inputs: np.ndarray, rows: int) -> np.ndarray:
        buffer = backend.buffer((rows, arch.width))
        backend.load(f"rows.{name}").run(inputs, [buffer.rows(rows)])
        return backend.fetch(buffer)[0]

    scattered = x.copy()
    scattered[kept] = rows
    np.testing.assert_array_equal(run("gather", x, kept, rows=len(kept)), x[kept])
    np.testing.assert_array_equal(run("scatter", x, rows, kept, rows=arch.tokens), scattered)
    added = run("add", rows, vectors, np.asarray([1]), rows=len(kept))
    np.testing.assert_array_equal(added, rows + vectors[1])
