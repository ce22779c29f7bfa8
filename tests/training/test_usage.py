import pytest
import torch

from adavit.model.policy import BlockPolicy
from adavit.training.usage import measure_usage


def policies() -> list[BlockPolicy]:
    tokens = torch.tensor([[1.0, 1, 0, 0, 0], [1, 1, 1, 1, 0]], requires_grad=True)
    heads = torch.tensor([[1.0, 0], [1, 1]], requires_grad=True)
    sublayers = torch.tensor([[1.0, 0], [1, 1]], requires_grad=True)
    return [BlockPolicy(tokens, None, None), BlockPolicy(tokens, heads, sublayers)]


def test_means_leave_out_the_class_token_and_weigh_heads_by_what_runs() -> None:
    usage = measure_usage(policies())
    assert usage.tokens is not None and float(usage.tokens.detach()) == pytest.approx((1 + 3) / 8)
    assert usage.heads is not None and float(usage.heads.detach()) == pytest.approx((0.5 * 1 + 1.0 * 2) / 3)
    assert usage.sublayers is not None and float(usage.sublayers.detach()) == pytest.approx(3 / 4)


def test_absent_policies_have_no_usage() -> None:
    usage = measure_usage([BlockPolicy(None, torch.ones(2, 2), None)])
    assert usage.items() == [("heads", 1.0)]


def test_gradients_in_closed_form() -> None:
    blocks = policies()
    heads, sublayers, tokens = blocks[1].heads, blocks[1].sublayers, blocks[1].tokens
    assert heads is not None and sublayers is not None and tokens is not None
    usage = measure_usage(blocks)
    assert usage.tokens is not None and usage.heads is not None and usage.sublayers is not None
    (found,) = torch.autograd.grad(usage.heads, heads, retain_graph=True)
    assert found.tolist() == [pytest.approx([1 / 6, 1 / 6]), pytest.approx([2 / 6, 2 / 6])]
    assert torch.autograd.grad(usage.heads, sublayers, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(usage.sublayers, sublayers)[0].tolist() == [[0.25, 0.25], [0.25, 0.25]]
    assert torch.autograd.grad(usage.tokens, tokens)[0][0].tolist() == pytest.approx([0, 1 / 8, 1 / 8, 1 / 8, 1 / 8])


def test_heads_where_no_sublayer_runs_are_not_a_number_of_nothing() -> None:
    usage = measure_usage([BlockPolicy(None, torch.ones(2, 2), torch.zeros(2, 2))])
    assert usage.heads is not None and float(usage.heads) == 0
