"""Run a writing: attention over ``[B, S, heads, D]`` queries, keys and values."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tests.fuzz.writings import Writing

_INF = float("inf")


class Attend:
    """Callable on q ``[B, S, H, D]``, k and v ``[B, S, HK, D]`` and valid keys ``[B, S]`` or None.

    Returns ``[B, S, H * D]``; with the weights, where the writing returns them.
    """

    def __init__(self, writing: Writing) -> None:
        self.w = writing

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> object:
        w = self.w
        if w.quirk == "query-changed":
            q = q + 0.0  # a tensor of its own: the operands are used again
        if w.product == "sdpa":
            return self._leave(self._sdpa(*self._heads_first(q, k, v), valid), False)
        grouped = w.repeat == "groups" and w.group > 1
        tokens_first = w.heads_first == "never"
        if not tokens_first:
            q, k, v = self._heads_first(q, k, v)
        if grouped:
            q, k, v = self._grouped(q, k, v, tokens_first)
        else:
            k, v = (self._repeated(x, 2 if tokens_first else 1) for x in (k, v))
        if w.scaling in ("q", "both"):
            q = q * (w.scale if w.scaling == "q" else w.scale**0.5)
        if w.scaling in ("k", "both"):
            k = k * (w.scale if w.scaling == "k" else w.scale**0.5)
        scores = self._product(q, k, grouped, tokens_first)
        if w.quirk == "query-changed":
            q.add_(1.0)  # after its use: whoever reads it later reads something else
        weights = self._softmax(self._scores(scores, valid)).to(v.dtype)
        return self._weigh(weights, v, grouped, tokens_first)

    # Heads

    def _heads_first(self, *tensors: Tensor) -> list[Tensor]:
        moved = []
        for x in tensors:
            if self.w.heads_first == "permute":
                x = x.permute(0, 2, 1, 3)
            elif self.w.heads_first == "swapaxes":
                x = x.swapaxes(1, 2)
            elif self.w.heads_first == "movedim":
                x = x.movedim(1, 2)
            else:
                x = x.transpose(1, 2)
            moved.append(x.contiguous() if self.w.contiguous else x)
        return moved

    def _repeated(self, x: Tensor, axis: int) -> Tensor:
        group = self.w.group
        if group == 1:
            return x
        if self.w.repeat == "repeat_interleave":
            return x.repeat_interleave(group, dim=axis)
        sizes = list(x.shape)
        x = x.unsqueeze(axis + 1).expand(*sizes[: axis + 1], group, *sizes[axis + 1 :])
        sizes[axis] *= group
        return x.reshape(*sizes)

    def _grouped(self, q: Tensor, k: Tensor, v: Tensor, tokens_first: bool) -> tuple:
        """Query heads in groups ``[B, HK, G, S, D]``; keys and values with an axis of one."""
        w = self.w
        if tokens_first:
            return q.unflatten(2, (w.kv_heads, w.group)), k, v
        q = q.reshape(q.shape[0], w.kv_heads, w.group, q.shape[2], q.shape[3])
        return q, k.unsqueeze(2), v.unsqueeze(2)

    # Products

    def _product(self, q: Tensor, k: Tensor, grouped: bool, tokens_first: bool) -> Tensor:
        w = self.w
        if grouped and tokens_first:
            return torch.einsum("bikgd,bjkd->bkgij", q, k)
        if tokens_first:
            return torch.einsum("bihd,bjhd->bhij", q, k)
        if w.product == "einsum" and grouped:
            return torch.einsum("bkgid,bkjd->bkgij", q, k.squeeze(2))
        if w.product == "einsum":
            return torch.einsum("...id,...jd->...ij", q, k)
        if w.product == "bmm" and not grouped:
            batch, heads = q.shape[:2]
            scores = torch.bmm(self._flat(q), self._flipped(self._flat(k)))
            return scores.view(batch, heads, *scores.shape[1:]) if w.weigh != "bmm" else scores
        if w.product == "@":
            return q @ self._flipped(k)
        return torch.matmul(q, self._flipped(k))

    def _flat(self, x: Tensor) -> Tensor:
        if self.w.flatten == "flatten":
            return x.flatten(0, 1)
        sizes = (x.shape[0] * x.shape[1], *x.shape[2:])
        return x.reshape(*sizes) if self.w.flatten == "reshape" else x.contiguous().view(*sizes)

    def _flipped(self, k: Tensor) -> Tensor:
        how, rank = self.w.key_flip, k.dim()
        if how == "named":
            return k.transpose(dim0=rank - 2, dim1=rank - 1)
        if how == "permute":
            return k.permute(*range(rank - 2), rank - 1, rank - 2)
        if how == "mT":
            return k.mT
        if how == "swapaxes":
            return k.swapaxes(-1, -2)
        k = k.transpose(-1, -2)
        return k.contiguous() if how == "contiguous" else k

    def _weigh(self, weights: Tensor, v: Tensor, grouped: bool, tokens_first: bool) -> object:
        w, returned = self.w, weights
        if tokens_first:
            form = "bkgij,bjkd->bikgd" if grouped else "bhij,bjhd->bihd"
            out, first = torch.einsum(form, weights, v), True
            out = out.flatten(2, 3) if grouped else out
        elif grouped:
            out, first = (weights @ v).flatten(1, 2), False
        elif weights.dim() == 3 or w.weigh == "bmm":
            batch, heads = v.shape[:2]
            flat = weights if weights.dim() == 3 else self._flat(weights)
            out, first = torch.bmm(flat, self._flat(v)), False
            out = out.view(batch, heads, *out.shape[1:])
        elif w.weigh.startswith("einsum"):
            first = w.weigh == "einsum-tokens-first"
            out = torch.einsum(f"bhij,bhjd->{'bihd' if first else 'bhid'}", weights, v)
        else:
            out, first = (torch.matmul(weights, v) if w.weigh == "matmul" else weights @ v), False
        out = self._leave(out, first)
        return (out, returned) if w.quirk == "weights-returned" else out

    def _leave(self, out: Tensor, tokens_first: bool) -> Tensor:
        out = out if tokens_first else out.transpose(1, 2)
        batch, length = out.shape[:2]
        if self.w.leave == "flatten":
            return out.flatten(2)
        if self.w.leave == "view":
            return out.contiguous().view(batch, length, -1)
        return out.reshape(batch, length, -1)

    # Scores

    def _scores(self, scores: Tensor, valid: Tensor | None) -> Tensor:
        w = self.w
        late = w.quirk == "scaled-after-mask"
        scores = scores if late else self._scaled(scores)
        if w.softcap:
            scores = torch.tanh(scores / w.softcap) * w.softcap
        if w.quirk == "bias":
            place = torch.arange(scores.shape[-1])
            scores = scores - 0.1 * (place[:, None] - place).abs().to(scores.dtype)
        if w.upcast == "scores":
            scores = scores.float()
        scores = self._masked(scores, valid)
        return self._scaled(scores) if late else scores

    def _scaled(self, scores: Tensor) -> Tensor:
        w = self.w
        if w.scaling == "mul":
            if w.in_place:
                scores *= w.scale
                return scores
            return scores * w.scale
        if w.scaling == "left":
            return w.scale * scores
        if w.scaling == "div":
            return scores / (1 / w.scale)
        if w.scaling == "tensor":
            return scores / torch.tensor(1 / w.scale, dtype=scores.dtype)
        return scores

    def _masked(self, scores: Tensor, valid: Tensor | None) -> Tensor:
        w, length = self.w, scores.shape[-1]
        allowed = [self._causal(length)]
        if w.window:
            place = torch.arange(length)
            allowed.append(place > place[:, None] - w.window)
        if valid is not None:
            flat = scores.dim() == 3
            repeated = valid.repeat_interleave(w.heads, dim=0) if flat else valid
            sizes = (-1, *[1] * (scores.dim() - 2), length)
            allowed.append(repeated.view(*sizes))
        if not w.masks.endswith("-each"):
            allowed = [self._all(allowed)]
        for mask in allowed:
            scores = self._with_mask(scores, mask)
        return scores

    @staticmethod
    def _all(masks: list[Tensor]) -> Tensor:
        together = masks[0]
        for mask in masks[1:]:
            together = together & mask
        return together

    def _causal(self, length: int) -> Tensor:
        place, how = torch.arange(length), self.w.causal
        if how == "not-greater":
            return ~(place > place[:, None])
        if how == "tril":
            return torch.tril(torch.ones(length, length, dtype=torch.bool))
        if how == "triu":
            return ~torch.ones(length, length).triu(1).bool()
        if how == "triu-compared":
            return torch.triu(torch.ones(length, length), diagonal=1) == 0
        return place <= place[:, None]

    def _with_mask(self, scores: Tensor, mask: Tensor) -> Tensor:
        w, dtype = self.w, scores.dtype
        value = self._value(dtype)
        how = w.masks.removesuffix("-each")
        if how == "fill":
            if w.in_place:
                return scores.masked_fill_(~mask, value)
            return scores.masked_fill(~mask, value)
        if how == "where":
            return torch.where(mask, scores, value)
        if how == "add-inverted":
            bias = (1.0 - mask.to(dtype)) * torch.finfo(dtype).min
        elif how == "add-filled":
            bias = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, value)
        else:
            bias = torch.where(mask, 0.0, value).to(dtype)
        if w.in_place:
            scores += bias
            return scores
        return scores + bias

    def _value(self, dtype: torch.dtype) -> float:
        if self.w.quirk == "small-fill":
            return -1e4
        if self.w.blocked == "-inf" or (self.w.blocked == "-1e9" and dtype == torch.float16):
            return -_INF
        return torch.finfo(dtype).min if self.w.blocked == "lowest" else -1e9

    # Softmax and SDPA

    def _softmax(self, scores: Tensor) -> Tensor:
        w = self.w
        dtype = torch.float32 if w.upcast == "dtype" else None
        if w.quirk == "softmax-by-hand":
            raised = (scores - scores.amax(-1, keepdim=True)).exp()
            weights = raised / raised.sum(-1, keepdim=True)
        elif w.softmax == "method":
            weights = scores.softmax(-1, dtype=dtype)
        else:
            call = torch.softmax if w.softmax == "torch" else functional.softmax
            weights = call(scores, dim=-1, dtype=dtype)
        if w.dropout == "zero":
            return functional.dropout(weights, p=0.0, training=True)
        if w.dropout == "evaluating":
            return functional.dropout(weights, p=0.3, training=False)
        return weights

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        w = self.w
        gqa = w.repeat == "groups"
        k, v = (x if gqa else self._repeated(x, 1) for x in (k, v))
        kwargs = {"enable_gqa": gqa, "scale": w.scale}
        if valid is None and not w.window and w.masks == "fill":
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True, **kwargs)
        allowed = self._causal(q.shape[2])
        if w.window:
            place = torch.arange(q.shape[2])
            allowed = allowed & (place > place[:, None] - w.window)
        if valid is not None:
            allowed = allowed & valid[:, None, None, :]
        if w.masks.startswith("add"):
            allowed = torch.where(allowed, 0.0, self._value(q.dtype)).to(q.dtype)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, **kwargs)
