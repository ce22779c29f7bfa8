from pathlib import Path

import pytest

from adavit.training.errors import TrainingError
from adavit.training.log import Log, read_log
from adavit.training.plot import plot_log


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = Log(path, 0)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 1 / step})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    assert [record["step"] for record in read_log(path)] == [1, 2, 3]
    Log(path, 2).write({"step": 3, "loss": 0.5})
    assert read_log(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.5}]


@pytest.mark.parametrize("line", ["x", "[1]", "1", '{"a": 1}', '{"step": "x"}', "[" * 100_000])
def test_a_damaged_log_is_kept(line: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(TrainingError, match=r"log.jsonl: line 2 is damaged; mend it"):
        Log(path, 2)
    assert line in path.read_text()


def test_a_plot_of_a_log_without_accuracy_is_drawn(tmp_path: Path) -> None:
    plot_log([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
