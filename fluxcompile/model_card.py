"""The model card written beside a saved router."""

from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

if TYPE_CHECKING:
    from fluxcompile.router import FluxRouter

_TEMPLATE = """\
---
{{ card_data }}
---

# Flux Attention router for {{ base_model }}

One tiny router for each of the {{ layers }} attention layers (head dimension {{ head_dim }}) of
`{{ base_model }}`. From the prompt it decides which layers run full and which run sparse
attention. Method: [Flux Attention](https://arxiv.org/abs/2604.07394). The base model is not
included and its weights are not changed.
{% if trained_against %}
It was trained against {{ trained_against }}. Other weights of the model,
unquantised ones say, are close to these and not the same: measure before relying on its routes
there.
{% endif %}
```python
import torch, fluxcompile

fluxcompile.attach(model, "path/or/owner/name")
model.compile(backend="flux")
```

| setting | value |
|---|---|
{% for name, value in settings.items() -%}
| `{{ name }}` | {{ value }} |
{% endfor %}{% if training %}
## Training

Trained with `fluxcompile.train_router` on {{ training.examples }} examples for
{{ training.steps }} steps ({{ training.versions }}).
{%- if trained_on %} Data: {{ trained_on }}.{% endif %}
At the end of training (`sparsity` is the mean soft share of sparse attention, `routed_sparsity`
that of the routes taken at inference):

| task | target | {% for name in training.columns %}{{ name }} | {% endfor %}
|---|---|{% for name in training.columns %}---|{% endfor %}
{% for task in training.tasks -%}
| {{ task.name }} | {{ task.target }} | {% for value in task["values"] %}{{ value }} | {% endfor %}
{% endfor %}
| argument | value |
|---|---|
{% for name, value in training.arguments.items() -%}
| `{{ name }}` | {{ value }} |
{% endfor %}{% endif %}"""


def model_card(router: "FluxRouter", data: ModelCardData, **values: Any) -> ModelCard:
    """Fill the card of ``router``.

    Args:
        router: what the card describes.
        data: the card's metadata.
        values: override the template's ``base_model``, ``layers``, ``head_dim`` or ``settings``,
            or add to them, in words, ``trained_against`` (which weights of the base model) and
            ``trained_on`` (which data), and ``training``: see :mod:`fluxcompile.training.record`.
    """
    known = {
        "base_model": router.base_model or "an unnamed model",
        "layers": len(router.layer_names),
        "head_dim": router.head_dim,
        "settings": router.config.to_dict(),
        "trained_against": None,
        "trained_on": None,
        "training": None,
    }
    return ModelCard.from_template(data, template_str=_TEMPLATE, **(known | values))
