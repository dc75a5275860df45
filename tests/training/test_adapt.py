"""Fine-tuning a backbone under locked routes."""

import importlib.util
import json
import sys
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from fluxcompile import FluxRouter, adapt_backbone
from fluxcompile.attachment import attachment_of
from fluxcompile.errors import ConfigError, TrainingError
from tests.training.tiny import CONFIG, QUICK, largest_difference, tiny_data, tiny_model

SETTINGS = {key: value for key, value in QUICK.items() if key != "config"} | {
    "learning_rate": 1e-2,
    "max_steps": 4,
}


def mixed_router(model) -> FluxRouter:
    """First layer sparse, second full, whatever the prompt."""
    router = FluxRouter.from_model(model, CONFIG)
    with torch.no_grad():
        router.layers[0].head[-1].bias.copy_(torch.tensor([4.0, 0.0]))
    return router


def logs(directory, step: int) -> list[dict]:
    state = (directory / f"checkpoint-{step}" / "trainer_state.json").read_text()
    return json.loads(state)["log_history"]


def test_backbone_learns_under_the_routes_and_the_router_does_not_change(tmp_path):
    model = tiny_model(initializer_range=0.2)
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    router = mixed_router(model)
    routed = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    settings = SETTINGS | {"save_steps": 2, "logging_steps": 1}
    adapted = adapt_backbone(model, router, tiny_data(4), output_dir=tmp_path, **settings)
    assert adapted is model
    assert attachment_of(model) is None
    for name, tensor in router.state_dict().items():
        assert torch.equal(tensor, routed[name]), name
    for name, parameter in model.named_parameters():
        trained = name != "model.embed_tokens.weight"
        assert torch.equal(parameter, before[name]) != trained, name
    first, *_, last = logs(tmp_path, 4)
    assert last["lm_loss"] < first["lm_loss"]
    assert first["routed_sparsity/holistic"] == 0.5
    saved = LlamaForCausalLM.from_pretrained(tmp_path)
    assert largest_difference(saved, model) == 0

    resumed = tiny_model(initializer_range=0.2)
    resumed.model.embed_tokens.weight.requires_grad_(False)
    adapt_backbone(
        resumed,
        router,
        tiny_data(4),
        output_dir=tmp_path / "again",
        resume_from_checkpoint=str(tmp_path / "checkpoint-2"),
        **settings,
    )
    assert largest_difference(resumed, model) == 0


def test_gradient_is_that_of_the_static_pattern():
    """One step of plain SGD moves as autograd through the same sparse pattern says."""
    model, other = tiny_model(initializer_range=0.2), tiny_model(initializer_range=0.2)
    settings = SETTINGS | {
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "weight_decay": 0.0,
    }
    data = tiny_data(4)
    router = mixed_router(model)
    adapt_backbone(model, router, data, **settings)
    run = torch.compile(
        other.model,
        backend="flux",
        options={"mode": "train", "routes": (0, 1), "config": CONFIG, "lowering": "eager"},
    )
    for row in data:
        ids = torch.tensor(row["input_ids"])[None]
        logits = other.lm_head(run(ids, use_cache=False).last_hidden_state)[0, :-1]
        (torch.nn.functional.cross_entropy(logits, ids[0, 1:]) / 4).backward()
    for (name, found), start in zip(model.named_parameters(), other.parameters(), strict=True):
        moved = start.detach() - start.grad
        torch.testing.assert_close(found.detach(), moved, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_an_adapter_alone_is_trained(tmp_path):
    from peft import LoraConfig, PeftModel

    model = tiny_model(initializer_range=0.2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = adapt_backbone(
        model, mixed_router(model), tiny_data(4), peft_config=adapter, output_dir=tmp_path,
        **SETTINGS,
    )  # fmt: skip
    assert isinstance(adapted, PeftModel)
    for name, parameter in adapted.named_parameters():
        if "lora" not in name:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(parameter, before[plain]), name
    assert any(p.abs().sum() > 0 for n, p in adapted.named_parameters() if "lora_B" in n)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_what_cannot_be_adapted_is_refused(monkeypatch):
    model = tiny_model()
    router = mixed_router(model)
    with pytest.raises(ConfigError, match="temperature_start"):
        adapt_backbone(model, router, tiny_data(4), temperature_start=1.0, **SETTINGS)
    without_gradient = FluxRouter.from_model(model, replace(router.config, sparse="power"))
    with pytest.raises(ConfigError, match="'streaming', 'triangle'"):
        adapt_backbone(model, without_gradient, tiny_data(4), **SETTINGS)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"fluxcompile\[peft\]"):
        adapt_backbone(model, router, tiny_data(4), peft_config=object(), **SETTINGS)
    model.requires_grad_(False)
    with pytest.raises(TrainingError, match="require grad"):
        adapt_backbone(model, router, tiny_data(4), **SETTINGS)
