"""Chunked losses against the model's own, values and gradients."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fluxcompile.errors import FluxWarning
from fluxcompile.training.chunked_loss import IGNORED, Targets, token_losses
from fluxcompile.training.language_model import LanguageModel
from tests.training.tiny import tiny_model


def labelled(batch: int = 2, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 61, (batch, length))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.5, IGNORED)
    return ids, labels


def test_targets_are_shifted():
    labels = torch.tensor([[5, IGNORED, 6, 7], [IGNORED, 8, IGNORED, IGNORED]])
    targets = Targets.of(labels)
    assert targets.rows.tolist() == [0, 0, 1]
    assert targets.positions.tolist() == [1, 2, 0]
    assert targets.tokens.tolist() == [6, 7, 8]


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_equal_the_whole_with_gradients(chunk):
    head = nn.Linear(8, 61, bias=False).double()
    hidden = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 61, (7,))
    weight = torch.randn(7)
    (token_losses(hidden, tokens, head, chunk).cross_entropy * weight).sum().backward()
    found = hidden.grad, head.weight.grad
    hidden.grad = head.weight.grad = None
    losses = cross_entropy(head(hidden).float(), tokens, reduction="none")
    (losses * weight).sum().backward()
    torch.testing.assert_close(found, (hidden.grad, head.weight.grad))


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_divergence_from_a_teacher_with_gradients(chunk):
    head = nn.Linear(8, 61, bias=False)
    hidden, teacher = torch.randn(2, 7, 8).unbind()
    hidden.requires_grad_(True)
    weight = torch.randn(7)
    tokens = torch.randint(0, 61, (7,))
    losses = token_losses(hidden, tokens, head, chunk, teacher)
    found, certainty = losses.divergence, losses.certainty
    wanted, given = head(teacher).softmax(-1), head(hidden).softmax(-1)
    expected = (wanted * (wanted / given).log()).sum(dim=-1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(certainty, wanted[range(7), tokens])
    assert not certainty.requires_grad
    gradients = torch.autograd.grad((expected * weight).sum(), hidden)
    torch.testing.assert_close(torch.autograd.grad((found * weight).sum(), hidden), gradients)
    agreed = token_losses(teacher, tokens, head, chunk, teacher).divergence
    torch.testing.assert_close(agreed, torch.zeros(7))


def test_no_target_at_all_gives_no_loss():
    hidden = torch.zeros(0, 8, requires_grad=True)
    losses = token_losses(hidden, torch.zeros(0, dtype=torch.int64), nn.Linear(8, 61), 4)
    assert [values.shape for values in losses] == [(0,)] * 3
    losses.cross_entropy.sum().backward()


def test_losses_are_those_of_the_models_own_logits():
    model = tiny_model()
    ids, labels = labelled()
    targets, mask = Targets.of(labels), torch.ones_like(ids)
    whole = model(ids, attention_mask=mask).logits[:, :-1].flatten(0, 1)
    expected = cross_entropy(whole, labels[:, 1:].flatten(), reduction="none")
    halves = LanguageModel.of(model).checked(model, ids)
    assert halves.head is not None
    for split in (halves, LanguageModel(model, None)):
        found = split.losses(split.body, ids, mask, targets, 3).cross_entropy
        torch.testing.assert_close(found, expected[labels[:, 1:].flatten() != IGNORED])


@pytest.mark.parametrize(
    ("name", "value", "change"),
    [
        ("final_logit_softcapping", 0.3, lambda x: 0.3 * torch.tanh(x / 0.3)),
        ("logit_scale", 3.0, lambda x: x * 3.0),
        ("logits_scaling", 4.0, lambda x: x / 4.0),
    ],
    ids=["Gemma", "Cohere", "Granite"],
)
def test_what_known_configs_do_to_logits_is_done(name, value, change):
    model = tiny_model()
    original = type(model).forward

    class Changed(type(model)):
        def forward(self, *args, **kwargs):
            output = original(self, *args, **kwargs)
            output.logits = change(output.logits)
            return output

    model.__class__ = Changed
    ids, _ = labelled()
    setattr(model.config, name, value)
    assert LanguageModel.of(model).checked(model, ids).head is not None
    setattr(model.config, name, None)
    with pytest.warns(FluxWarning, match="do not give its logits"):
        assert LanguageModel.of(model).checked(model, ids).head is None


def test_a_model_without_halves_is_used_whole():
    assert LanguageModel.of(nn.Linear(2, 2)).head is None
