"""Runs: resumed ones end where uninterrupted ones do, and the policies reach their targets."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from training_cases import tiny, write_idx_set

from adavit.model import load_checkpoint
from adavit.training import loop, start
from adavit.training.data import open_images
from adavit.training.distributed import World
from adavit.training.errors import TrainingError
from adavit.training.log import Reporter, read_log
from adavit.training.loop import Intervals, Trainer
from adavit.training.settings import PolicySettings, Settings

ALONE = World(0, 1, torch.device("cpu"))
POLICY = PolicySettings(attention_weight=0.1, hidden_weight=0.1, floor=0.1, floor_weight=0.1, entropy_weight=0.01,
                        diversity_weight=0.1)  # fmt: skip
SETTINGS = Settings(
    steps=12, batch=8, learning_rate=3e-3, warmup=3, mixup=0.3, ema=0.9, logit_weight=1.0, policy=POLICY
)


def trainer(folder: Path, settings: Settings = SETTINGS, **changes: object) -> Trainer:
    folder.mkdir(exist_ok=True)
    arch = tiny(**changes)
    dense = start.new_model(replace(arch, token_policy=False, head_policy=False, sublayer_policy=False), 1)
    return Trainer(start.fit(dense, arch, 0), settings, ALONE, folder, dense)


def run(one: Trainer, data: Path, save: int = 5) -> None:
    one.run(open_images(data, "train"), open_images(data, "test"), Intervals(2, save, 4, 16), 1)


def test_a_run_tells_each_stage_to_its_end(tmp_path: Path, idx_folder: Path) -> None:
    told: dict[str, list[float]] = {}
    said: list[str] = []
    reporter = Reporter(lambda stage, share: told.setdefault(stage, []).append(share), said.append)
    train, test = (open_images(idx_folder, part) for part in ("train", "test"))
    trainer(tmp_path / "run").run(train, test, Intervals(2, 5, 6), 1, reporter)
    assert set(told) == {"training", "evaluating", "meeting the targets"}
    assert told["training"] == pytest.approx([step / 12 for step in range(1, 13)])
    assert told["evaluating"] == pytest.approx([0.25, 0.5, 0.75, 1.0]), "of the last evaluation alone"
    assert 0 < told["meeting the targets"][0] < 1
    assert told["meeting the targets"] == sorted(told["meeting the targets"])
    assert [line.split(":")[0] for line in said] == ["step 6 of 12", "step 12 of 12"]


class Killed(BaseException):
    pass


def mortal(work: Callable[..., Any], now: Callable[[], bool]) -> Callable[..., Any]:
    """What does some work, but once it is time is killed instead."""

    def killed(*arguments: Any) -> Any:
        if now():
            raise Killed
        return work(*arguments)

    return killed


@pytest.mark.parametrize("killed_at", [5, 8, 11])
def test_killed_and_resumed_ends_with_the_same_weights(
    tmp_path: Path, idx_folder: Path, killed_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trainer(tmp_path / "whole")
    run(whole, idx_folder)
    victim = trainer(tmp_path / "victim")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "set_learning_rate", mortal(loop.set_learning_rate, lambda: victim.step == killed_at))
        with pytest.raises(Killed):
            run(victim, idx_folder)
    resumed = trainer(tmp_path / "victim")
    resumed.resume()
    assert resumed.step == killed_at // 5 * 5
    run(resumed, idx_folder)
    for pair in ((whole.model, resumed.model), (whole.average, resumed.average)):
        expected, found = (model.state_dict() for model in pair)
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert read_log(tmp_path / "whole/log.jsonl") == read_log(tmp_path / "victim/log.jsonl")


@pytest.mark.parametrize("stage", ["balance", "evaluate", "save"])
def test_killed_after_the_last_step_is_resumed_there(
    tmp_path: Path, idx_folder: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, victim = trainer(tmp_path / "whole"), trainer(tmp_path / "victim")
    run(whole, idx_folder)
    where: Any = loop if stage == "balance" else victim
    with monkeypatch.context() as patch:
        patch.setattr(where, stage, mortal(getattr(where, stage), lambda: victim.step == victim.saved == 12))
        with pytest.raises(Killed):
            run(victim, idx_folder)
    resumed = trainer(tmp_path / "victim")
    resumed.resume()
    assert resumed.step == 12
    monkeypatch.setattr(loop, "set_learning_rate", None)  # no step is left
    run(resumed, idx_folder)
    expected, found = whole.average.state_dict(), resumed.average.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert resumed.metric == whole.metric
    assert read_log(tmp_path / "whole/log.jsonl") == read_log(tmp_path / "victim/log.jsonl")


def test_the_checkpoint_is_read_as_a_released_one_with_its_average(tmp_path: Path, idx_folder: Path) -> None:
    one = trainer(tmp_path / "run")
    run(one, idx_folder)
    model = load_checkpoint(tmp_path / "run" / "checkpoint.pth")
    assert model.arch == one.model.arch
    assert torch.equal(model.head.weight, one.average.head.weight)
    assert not torch.equal(model.head.weight, one.model.head.weight)
    assert not list((tmp_path / "run").glob(".*tmp"))


def test_resuming_something_else_is_refused(tmp_path: Path, idx_folder: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(TrainingError, match="no run to resume"):
        trainer(folder).resume()
    run(trainer(folder), idx_folder)
    with pytest.raises(TrainingError, match="other architecture: depth was 3, now 2"):
        trainer(folder, depth=2).resume()
    with pytest.raises(TrainingError, match="other settings: seed was 0, now 7"):
        trainer(folder, replace(SETTINGS, seed=7)).resume()
    (folder / "checkpoint.pth").write_bytes(b"nothing")
    with pytest.raises(TrainingError, match="not a training checkpoint"):
        trainer(folder).resume()
    torch.save({"state_dict": {}}, folder / "checkpoint.pth")
    with pytest.raises(TrainingError, match="no run to resume in it"):
        trainer(folder).resume()


def test_a_loss_that_is_not_finite_stops_the_run_at_once(tmp_path: Path, idx_folder: Path) -> None:
    one = trainer(tmp_path / "run")
    with torch.no_grad():
        one.model.head.bias[0] = float("nan")
    with pytest.raises(TrainingError, match=r"not finite at step 0 \(classification, distil_logits\)"):
        run(one, idx_folder)
    assert not (tmp_path / "run" / "checkpoint.pth").exists()


def test_bf16_autocast_trains(tmp_path: Path, idx_folder: Path) -> None:
    one = trainer(tmp_path / "run", replace(SETTINGS, precision="bf16", steps=3))
    before = one.model.head.weight.detach().clone()
    run(one, idx_folder)
    assert not torch.equal(one.model.head.weight, before)


def test_a_compiled_run_ends_where_an_eager_one_does(
    tmp_path: Path, idx_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without torch's cache of generated code, which forgets for which instructions it was generated."""
    monkeypatch.setattr(torch._inductor.config, "fx_graph_cache", False)
    monkeypatch.setattr(torch._functorch.config, "enable_autograd_cache", False)
    settings = Settings(steps=3, batch=16, learning_rate=1e-3)
    arch = tiny(depth=1, token_policy=False, head_policy=False, sublayer_policy=False)
    ends = []
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        folder.mkdir()
        one = Trainer(start.new_model(arch, 0), replace(settings, compile=compiled), ALONE, folder)
        run(one, idx_folder)
        ends.append(load_checkpoint(folder / "checkpoint.pth", arch.heads).state_dict())
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, rtol=1e-3, atol=1e-4)


def test_what_the_compiler_says_becomes_one_line(
    tmp_path: Path, idx_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer(tmp_path / "run")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(loop, "set_learning_rate", fail)
    error: RuntimeError = torch._dynamo.exc.Unsupported("no compiler\nhere")
    with pytest.raises(TrainingError, match=r"cannot be compiled here \(no compiler here.*leave --compile out"):
        run(one, idx_folder)
    error = RuntimeError("of another kind")
    with pytest.raises(RuntimeError, match="of another kind"):
        run(one, idx_folder)


def test_dense_runs_learn(tmp_path: Path, idx_folder: Path) -> None:
    arch = tiny(token_policy=False, head_policy=False, sublayer_policy=False)
    settings = Settings(steps=100, batch=16, learning_rate=5e-3, warmup=10, ema=0.9, mirror=False, augment="none")
    one = Trainer(start.new_model(arch, 0), settings, ALONE, tmp_path)
    run(one, idx_folder, save=100)
    assert one.metric > 90


TARGETS = {"tokens": 0.5, "heads": 0.6, "sublayers": 0.75}
BETWEEN = {"tokens": 0.37, "heads": 0.6, "sublayers": 0.7}
"""Between what whole units come to: of 6 heads, 6 sub-layers."""


@pytest.mark.parametrize(
    ("targets", "heads", "seed"),
    [
        (TARGETS, 4, 0),
        (TARGETS, 4, 1),
        ({"heads": 0.6}, 4, 0),
        ({"tokens": 0.5, "sublayers": 0.75}, 4, 0),
        (BETWEEN, 2, 0),
        (BETWEEN, 2, 3),
    ],
)
def test_200_steps_reach_the_targets(tmp_path: Path, targets: dict[str, float], heads: int, seed: int) -> None:
    data = write_idx_set(tmp_path / "data", train=1024, test=512)
    policy = PolicySettings(targets=targets, weights=dict.fromkeys(targets, 2.0))
    settings = Settings(
        steps=200,
        batch=64,
        seed=seed,
        learning_rate=4e-3,
        final=0.02,
        warmup=10,
        ema=0.98,
        mirror=False,
        policy=policy,
    )
    names = {"tokens": "token_policy", "heads": "head_policy", "sublayers": "sublayer_policy"}
    arch = tiny(depth=4, heads=heads, **{name: kind in targets for kind, name in names.items()})
    one = Trainer(start.new_model(arch, seed), settings, ALONE, tmp_path)
    run(one, data, save=200)
    found = one.evaluate(open_images(data, "test"), 0)
    assert {kind: found[kind] for kind in targets} == pytest.approx(targets, abs=0.03)
    assert found["accuracy"] > 0.9


def last_record(folder: Path) -> dict[str, float]:
    return read_log(folder / "log.jsonl")[-1]


def test_the_last_record_is_of_the_moved_decisions(tmp_path: Path, idx_folder: Path) -> None:
    one = trainer(tmp_path / "run")
    run(one, idx_folder)
    record = last_record(tmp_path / "run")
    assert record["step"] == 12 and {"offset_tokens", "offset_heads", "offset_sublayers"} < set(record)
    assert all(record[name] == found for name, found in one.evaluate(open_images(idx_folder, "test"), 16).items())
    layers = ("attn.token_select", "head_select", "layer_select")
    moved, saved = one.average, load_checkpoint(tmp_path / "run" / "checkpoint.pth")
    assert all(
        torch.equal(
            moved.blocks[1].get_submodule(layer).mlp_head.bias, saved.blocks[1].get_submodule(layer).mlp_head.bias
        )
        for layer in layers
    )


def test_a_finished_run_moves_no_further(tmp_path: Path, idx_folder: Path) -> None:
    one, again = trainer(tmp_path / "run"), trainer(tmp_path / "run")
    run(one, idx_folder)
    record = last_record(tmp_path / "run")
    again.resume()
    run(again, idx_folder)
    assert all(
        torch.equal(weight, again.average.state_dict()[name]) for name, weight in one.average.state_dict().items()
    )
    assert last_record(tmp_path / "run") == record


def test_usages_without_a_weight_stay_as_trained(tmp_path: Path, idx_folder: Path) -> None:
    policy = replace(POLICY, weights={"tokens": 0.0, "heads": 2.0, "sublayers": 0.0})
    run(trainer(tmp_path / "run", replace(SETTINGS, policy=policy)), idx_folder)
    assert [name for name in last_record(tmp_path / "run") if name.startswith("offset_")] == ["offset_heads"]


def test_test_images_do_not_move_decisions(tmp_path: Path, idx_folder: Path) -> None:
    other = write_idx_set(tmp_path / "other", train=96, test=64)
    ends = []
    for folder, tested in ((tmp_path / "one", idx_folder), (tmp_path / "two", other)):
        one = trainer(folder)
        one.run(open_images(idx_folder, "train"), open_images(tested, "test"), Intervals(2, 5, 4), 1)
        ends.append(one.average.state_dict())
    assert all(torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())


@pytest.mark.parametrize("weight", ["head.weight", "blocks.0.mlp.fc2.weight", "blocks.1.head_select.mlp_head.weight"])
def test_values_that_overflow_are_no_accuracy(weight: str, tmp_path: Path, idx_folder: Path) -> None:
    one = trainer(tmp_path / "run")
    state = one.average.state_dict()
    state["cls_token"].fill_(1e3)
    state[weight].copy_(state[weight].sign() * 3e38)
    with pytest.raises(TrainingError, match="of image 0 are NaN, infinite or beyond"):
        one.evaluate(open_images(idx_folder, "test"), 16)
