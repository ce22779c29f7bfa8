from dataclasses import replace

import pytest
import torch
from training_cases import tiny

from adavit.errors import OptionError
from adavit.model import policy as P
from adavit.training import start
from adavit.training.errors import TrainingError

DENSE = tiny(token_policy=False, head_policy=False, sublayer_policy=False)


def test_fresh_weights_follow_the_seed_and_leave_other_randomness_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one, same, other = (start.new_model(DENSE, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one["head.weight"], same["head.weight"])
    assert not torch.equal(one["head.weight"], other["head.weight"])


def test_policies_start_by_keeping_almost_everything() -> None:
    model = start.new_model(tiny(), 0)
    with torch.no_grad():
        output = model(torch.randn(4, 3, 8, 8))
    assert all(mask.all() for mask in output.stacked(model.arch))
    for decisions in output.decisions:
        assert decisions.tokens is not None
        kept = decisions.tokens.sigmoid().mean()
        assert P.TOKEN_THRESHOLD < kept < 0.97


def test_dense_weights_carry_over_to_an_adaptive_model() -> None:
    dense = start.new_model(DENSE, 0).eval()
    adaptive = start.fit(dense, start.adaptive_shapes(DENSE, ("heads",), DENSE.classes, None), 0).eval()
    images = torch.randn(2, 3, 8, 8)
    assert (adaptive.arch.head_policy, adaptive.arch.token_policy) == (True, False)
    with torch.no_grad():
        assert torch.equal(adaptive(images, decide=None).logits, dense(images, decide=None).logits)


def test_a_finer_patch_gives_the_same_token_on_even_images() -> None:
    coarse = start.new_model(replace(DENSE, patch_size=4), 0)
    fine = start.fit(coarse, DENSE, 0)
    image = torch.rand(1, 3, 1, 1).expand(1, 3, 8, 8)
    with torch.no_grad():
        expected, found = coarse.patch_embed(image), fine.patch_embed(image)
    torch.testing.assert_close(found[0, 0], expected[0, 0])
    assert fine.pos_embed.shape[1] == 17
    torch.testing.assert_close(fine.pos_embed[:, :1], coarse.pos_embed[:, :1])


def test_another_number_of_classes_gets_a_fresh_head() -> None:
    model = start.fit(start.new_model(DENSE, 0), replace(DENSE, classes=7), 0)
    assert model.head.weight.shape[0] == 7


@pytest.mark.parametrize(("wanted", "kept"), [(1, [0]), (2, [0, 5]), (3, [0, 2, 5]), (6, [0, 1, 2, 3, 4, 5])])
def test_of_more_blocks_than_wanted_evenly_spaced_ones_are_taken(wanted: int, kept: list[int]) -> None:
    deep = start.new_model(replace(DENSE, depth=6), 0)
    shallow = start.fit(deep, replace(DENSE, depth=wanted), 1)
    for block, source in zip(shallow.blocks, kept, strict=True):
        for one, other in zip(block.parameters(), deep.blocks[source].parameters(), strict=True):
            assert torch.equal(one, other)
    assert torch.equal(shallow.head.weight, deep.head.weight)


def test_other_backbones_and_impossible_shapes_are_refused() -> None:
    with pytest.raises(TrainingError, match="have another depth"):
        start.fit(start.new_model(DENSE, 0), replace(DENSE, depth=4), 0)
    with pytest.raises(OptionError, match="not a multiple of the patch side 3"):
        start.dense_shapes(None, {"image_size": 28, "patch_size": 3}, 10)
    with pytest.raises(TrainingError, match="not a multiple of the patch side 3"):
        start.dense_shapes(tiny(), {"patch_size": 3}, 10)
    assert start.dense_shapes(None, {"width": 128}, 10).heads == 2
    assert start.dense_shapes(tiny(), {}, 4) == DENSE


@torch.no_grad()
def test_a_mimetic_start_looks_at_its_own_place() -> None:
    arch = replace(DENSE, width=32, heads=2)
    plain, mimetic = (start.new_model(arch, 0, mimetic) for mimetic in (False, True))
    attention = mimetic.blocks[0].attn
    product = attention.query.weight[:16].T @ attention.key.weight[:16]
    assert torch.linalg.matrix_rank(product) == 16
    assert product.diag().mean() > 0.3 > product.fill_diagonal_(0).abs().mean() * 2
    carried = attention.proj.weight @ attention.value.weight
    assert carried.diag().mean().item() == pytest.approx(-0.4, abs=0.05)
    places = mimetic.pos_embed[0, 1:] @ mimetic.pos_embed[0, 1:].T
    assert torch.equal(places.argmax(1), torch.arange(arch.patches))
    assert torch.equal(mimetic.blocks[0].mlp.fc1.weight, plain.blocks[0].mlp.fc1.weight)
