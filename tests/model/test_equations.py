"""The policy equations, on numbers small enough to check by hand."""

import pytest
import torch

from adavit.model.policy import BlockPolicy, attend, decide, narrow, residual, with_class_token


def test_a_value_equal_to_its_threshold_is_dropped() -> None:
    assert decide(torch.tensor([-1e-6, 0.0, 1e-6]), 0.5).tolist() == [0, 0, 1]


def test_tokens_are_kept_above_sigmoid_of_six_tenths() -> None:
    assert decide(torch.tensor([0.0, 0.405, 0.406]), 0.6).tolist() == [0, 0, 1]


def test_the_class_token_is_always_kept() -> None:
    assert with_class_token(torch.tensor([[0.0, 1.0], [0.0, 0.0]])).tolist() == [[1, 0, 1], [1, 0, 0]]


def test_attention_over_kept_tokens_is_attention_without_the_others() -> None:
    query, key, value = torch.randn(3, 2, 3, 5, 4)
    tokens = torch.tensor([[1.0, 0, 1, 1, 0]] * 2)
    kept = tokens[0].bool()
    found = attend(query, key, value, BlockPolicy(tokens, None, None))[:, :, kept]
    wanted = torch.nn.functional.scaled_dot_product_attention(query[:, :, kept], key[:, :, kept], value[:, :, kept])
    torch.testing.assert_close(found, wanted)


def test_a_dropped_head_is_silent_and_takes_its_channels_from_the_mlp() -> None:
    heads = torch.tensor([[1.0, 0.0, 1.0]])
    out = attend(*torch.randn(3, 1, 3, 5, 4), BlockPolicy(None, heads, None))
    assert [bool(head.any()) for head in out[0]] == [True, False, True]
    assert narrow(torch.ones(1, 1, 6), BlockPolicy(None, heads, None)).tolist() == [[[1, 1, 0, 0, 1, 1]]]


@pytest.mark.parametrize("sublayer", [0, 1])
def test_an_update_is_added_at_kept_tokens_of_kept_sublayers(sublayer: int) -> None:
    policy = BlockPolicy(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), None, torch.eye(2))
    found = residual(torch.zeros(2, 2, 1), torch.ones(2, 2, 1), policy, sublayer)[..., 0]
    assert found.tolist() == ([[1, 0], [0, 0]] if sublayer == 0 else [[0, 0], [1, 1]])
