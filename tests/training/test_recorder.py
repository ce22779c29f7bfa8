import torch
from training_cases import tiny

from adavit.training import start
from adavit.training.recorder import record


def test_records_the_attention_and_states_of_the_class_token() -> None:
    model = start.new_model(tiny(), 0).eval()
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad(), record(model) as recording:
        model(images[:1])
        output = model(images, hidden=True)
    assert [len(recording.queries), len(recording.keys), len(recording.states)] == [3, 3, 6]
    for block, hidden in enumerate(output.hidden):
        assert torch.equal(recording.states[2 * block + 1], hidden[:, 0])
    x = model.blocks[0].norm1(model.embed(images))
    query, key = (layer(x).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (model.blocks[0].attn.query,
                                                                                model.blocks[0].attn.key))  # fmt: skip
    expected = (query @ key.transpose(-2, -1) * 4**-0.5).softmax(-1)[:, :, 0]
    torch.testing.assert_close(recording.attention(0, 4), expected)


def test_dropped_tokens_get_no_attention_and_listening_ends() -> None:
    model = start.new_model(tiny(), 0)
    with record(model) as recording:
        output = model(torch.randn(2, 3, 8, 8))
        policy = output.policies[1]
        assert policy.tokens is not None
        policy.tokens = policy.tokens.detach().clone()
        policy.tokens[:, 5] = 0
        attention = recording.attention(1, 4, policy)
    assert not attention[:, :, 5].any()
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4))
    recording.clear()
    model(torch.randn(1, 3, 8, 8))
    assert recording.queries == []
