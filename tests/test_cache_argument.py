"""The name under which a model takes its cache, and that no use of ours is warned of."""

import warnings

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from fluxcompile.cache_argument import cache_argument
from tests.router_models import tiny_llama


class Newer(nn.Module):
    def forward(self, input_ids, cache=None): ...


class Older(nn.Module):
    def forward(self, input_ids, past_key_values=None): ...


@pytest.mark.parametrize(("model", "name"), [(Newer(), "cache"), (Older(), "past_key_values")])
def test_the_models_own_name_is_found(model, name):
    assert cache_argument(model) == name


def test_this_transformers_takes_it_without_a_warning():
    model, cache = tiny_llama(), DynamicCache()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", FutureWarning)
        model(torch.tensor([[1, 2, 3]]), use_cache=True, **{cache_argument(model): cache})
    assert cache.get_seq_length() == 3
