"""The router of a model: a layer router for each attention layer, with what it belongs to."""

import copy
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin
from torch import nn

from fluxcompile import model_layers, published, router_io
from fluxcompile.config import FluxConfig
from fluxcompile.errors import ConfigError, FluxWarning, RouterError
from fluxcompile.layer_router import FULL, LayerRouter
from fluxcompile.model_card import model_card


class FluxRouter(
    nn.Module,
    ModelHubMixin,
    library_name="fluxcompile",
    tags=["flux-attention", "sparse-attention"],
):
    """One :class:`LayerRouter` for each attention layer of one base model.

    Attributes:
        config: the :class:`FluxConfig` the router decides for.
        layer_names: module path of each layer, such as ``"model.layers.3.self_attn"``.
        head_dim: size of one attention head, the same in every layer.
        heads: query heads of a layer, if the router reads each of them (``config.heads``);
            otherwise None.
        base_model: name of the model it belongs to, if known.
        backbone: dimensions of that model, compared with a model's config on attaching.
        layers: the :class:`LayerRouter` of each name, in order.

    Raises:
        RouterError: no or repeated layer names, a head dimension below 1, or ``heads`` missing
            or of no use.
    """

    def __init__(
        self,
        config: FluxConfig | None = None,
        *,
        layer_names: Sequence[str],
        head_dim: int,
        heads: int | None = None,
        base_model: str | None = None,
        backbone: Mapping[str, int | str] | None = None,
    ) -> None:
        super().__init__()
        config = FluxConfig() if config is None else config
        if not isinstance(config, FluxConfig):
            raise ConfigError.mismatch("config", "a FluxConfig", f"{config!r}")
        router_io.check_fields(layer_names, head_dim, base_model, backbone or {})
        router_io.check_heads(heads, config)
        self.config = config
        self.layer_names = tuple(layer_names)
        self.head_dim = head_dim
        self.heads = heads
        self.base_model = base_model
        self.backbone = dict(backbone or {})
        features = config.pooling.features(head_dim, heads)
        self.layers = nn.ModuleList(
            LayerRouter(head_dim, features, config.standardize) for _ in self.layer_names
        )

    def extra_repr(self) -> str:
        return f"base_model={self.base_model!r}, head_dim={self.head_dim}, config={self.config}"

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        config: FluxConfig | None = None,
        *,
        layers: Sequence[str] | None = None,
        head_dim: int | None = None,
        heads: int | None = None,
    ) -> Self:
        """Make an untrained router, which routes to full attention, for ``model``.

        Args:
            model: a Hugging Face model, or any module together with ``layers``.
            config: what to route to; :class:`FluxConfig`'s defaults if None.
            layers: module paths of the attention layers, in order. None finds them: see
                :func:`fluxcompile.model_layers.attention_layers`.
            head_dim: size of one head, where the modules of ``layers`` do not tell.
            heads: query heads of a layer, where the model does not tell; only for a ``config``
                that reads each of them.

        Raises:
            RouterError: no attention layer found, or head dimensions or numbers of heads missing
                or differing.
        """
        model = model_layers.unwrap(model)
        if layers is None:
            head_dims = model_layers.attention_layers(model)
        else:
            head_dims = model_layers.named_layers(model, layers, head_dim)
        if len(set(head_dims.values())) != 1:
            raise RouterError.mismatch(
                f"head_dim of {type(model).__name__}",
                "the same in every attention layer (choose layers= that share one)",
                head_dims,
            )
        if heads is None and isinstance(config, FluxConfig) and config.pooling.each_head:
            heads = model_layers.same_heads(model, tuple(head_dims))
        return cls(
            config,
            layer_names=tuple(head_dims),
            head_dim=next(iter(head_dims.values())),
            heads=heads,
            base_model=model_layers.base_model_of(model),
            backbone=model_layers.backbone_of(model),
        )

    def check_model(self, model: nn.Module) -> None:
        """Check that ``model`` is one this router can serve.

        Its modules must exist there with the same head dimension, and the dimensions recorded from
        the base model must be the model's. Another name on the Hub (a fine-tune of the base model)
        only warns.

        Raises:
            RouterError: the router belongs to another model.
        """
        model = model_layers.unwrap(model)
        for name in self.layer_names:
            model_layers.submodule(model, name)
            head_dim = model_layers.head_dim_of(model, name)
            if head_dim not in (None, self.head_dim):
                raise RouterError.mismatch(
                    f"head_dim of {name!r}", f"{self.head_dim} (the router's)", head_dim
                )
            heads = None if self.heads is None else model_layers.heads_of(model, name)
            if heads not in (None, self.heads):
                raise RouterError.mismatch(
                    f"query heads of {name!r}", f"{self.heads} (the router's)", heads
                )
        actual = model_layers.backbone_of(model)
        for key, expected in self.backbone.items():
            if actual.get(key, expected) != expected:
                raise RouterError.mismatch(
                    f"{key} of {type(model).__name__}",
                    f"{expected!r} (the router was made for {self.base_model})",
                    f"{actual[key]!r}",
                )
        self._warn_about_name(model_layers.base_model_of(model))

    def biased(self, bias: float) -> Self:
        """Make a copy that chooses full attention more often, or less, without being trained again.

        A trained router has one place between quality and speed; this moves it from there.

        Args:
            bias: added to every layer's logit of full attention: its odds
                are multiplied by ``exp(bias)``. Below 0 for more sparse attention.

        Raises:
            RouterError: ``bias`` is NaN or infinite.
        """
        if not math.isfinite(bias):
            raise RouterError.mismatch("bias", "a finite number of logits", bias)
        router = copy.deepcopy(self)
        with torch.no_grad():
            for layer in router.layers:
                layer.head[-1].bias[FULL] += bias
        return router

    def _warn_about_name(self, name: str) -> None:
        # Local paths and class names say nothing about which weights a model has.
        comparable = router_io.is_hub_id(name) and router_io.is_hub_id(self.base_model)
        if comparable and name != self.base_model:
            warnings.warn(
                f"this router was made for {self.base_model!r}, the model is {name!r}: "
                "its routes fit only if one is a fine-tune of the other",
                FluxWarning,
                stacklevel=3,
            )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        config: None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write ``config.json``, ``model.safetensors`` and, if there is none, a ``README.md``.

        The files are replaced only once all are written: an interrupted save leaves the old ones.

        Args:
            save_directory: created if missing.
            config: only for the mixin's signature: a router's config is its own attribute.
            repo_id: Hub repository to push to; the directory's name if None.
            push_to_hub: push after saving.
            model_card_kwargs: more values for the model card's template.
            dtype: what the weights are stored in: ``torch.float32``, exactly; or half the size,
                rounded, ``torch.bfloat16`` or ``torch.float16``. Whatever it is, the loaded router
                computes in fp32. The mean and deviation of features are fp32 always.
            push_to_hub_kwargs: passed to :meth:`push_to_hub`.

        Returns:
            URL of the commit on the Hub, if pushed.

        Raises:
            RouterError: a weight is NaN or infinite; ``config`` is given; ``dtype`` is another; or
                it shall be pushed rounded, which the mixin cannot do.
            OSError: the directory cannot be written.
        """
        if config is not None:
            raise RouterError.mismatch(
                "config", "None (a router is saved with its own config)", f"{config!r}"
            )
        if push_to_hub and dtype != torch.float32:
            raise RouterError.mismatch(
                "dtype", "torch.float32 with push_to_hub (else save, then upload the folder)", dtype
            )
        directory = Path(save_directory)
        card = self.generate_model_card(**(model_card_kwargs or {}))
        router_io.save(self, directory, str(card), dtype)
        if not push_to_hub:
            return None
        return self.push_to_hub(
            repo_id or directory.name, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> Self:
        """Load a router saved by :meth:`save_pretrained`, on CPU and in eval mode.

        Args:
            pretrained_model_name_or_path: a directory, the name of a router that comes with the
                package (:func:`fluxcompile.packaged_routers` lists them), or a repository id on
                the Hub. A packaged router is never looked for on the Hub.
            force_download: download again even if cached.
            token: Hub token; True takes the stored one.
            cache_dir: where downloads are cached.
            local_files_only: never ask the Hub.
            revision: branch, tag or commit on the Hub.

        Raises:
            RouterError: a file is missing or damaged, or holds something else than a router.
        """
        source = router_io.locate(
            pretrained_model_name_or_path,
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            revision=revision,
        )
        fields, weights = router_io.load(source)
        return cls._from_parts(fields, weights)

    @classmethod
    def from_fluxattention(cls, directory: str | os.PathLike[str]) -> Self:
        """Convert the routers inside a published Flux Attention checkpoint.

        Only router tensors are read, never the backbone's; a shard that holds none of them need not
        even be there. See :mod:`fluxcompile.published` for the format.

        Raises:
            RouterError: not such a checkpoint, or its routers are incomplete or inconsistent.
        """
        fields, weights = published.read(Path(directory))
        return cls._from_parts(fields, weights)

    @classmethod
    def _from_parts(cls, fields: dict[str, Any], weights: dict[str, torch.Tensor]) -> Self:
        router = cls(**fields)
        router.load_state_dict(weights)
        return router.eval()

    def generate_model_card(self, **kwargs: Any) -> ModelCard:
        """Return the model card: base model, settings and how to use the router."""
        data = ModelCardData(**self._hub_mixin_info.model_card_data.to_dict())
        if router_io.is_hub_id(self.base_model):
            data.base_model = self.base_model
        return model_card(self, data, **kwargs)
