"""Multi-head attention that trains in integers: its projections on codes, scores and softmax in float.

Source: Guo, Liu et al., "Towards accurate and efficient sub-8-bit integer training", section 4.1, which quantizes
linear layers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .integer_layers import IntegerLayerOfSeveral, integer_form

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


@integer_form(nn.MultiheadAttention)
class IntegerMultiheadAttention(IntegerLayerOfSeveral, nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with projections in integers, with all its options; see `IntegerLayer`.

    The four projections are integer products, "q_proj", "k_proj", "v_proj" and "out_proj", with the weights where torch
    has them (`in_proj_weight` or three of their own). Products of scores and values, softmax, dropout, `bias_k` and
    `bias_v` are float and are kept in float for the backward pass: only linear layers are quantized.

    Neighbours among query, key and value that are the same tensor are projected by one product, the first one's: in
    self-attention one for all three, with one range for their gradients together. (A full backward hook on the layer
    hands it three views in the place of one tensor, so three products.) Padding that `key_padding_mask` hides
    from the scores is projected all the same, so its values widen ranges. A query whose keys are all masked gives NaN
    where weights are asked for, as in torch, which the out-projection then reports or skips (`on_nonfinite`).
    """

    in_proj_weight: Any  # Parameter or None
    in_proj_bias: Any
    q_proj_weight: Any
    k_proj_weight: Any
    v_proj_weight: Any
    bias_k: Any
    bias_v: Any

    def _product_names(self) -> tuple[str, ...]:
        return PROJECTIONS

    def forward(  # noqa: PLR0917
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Result and, if need_weights, the attention weights; arguments and shapes are torch's.

        is_causal is a hint that attn_mask is causal; the mask itself is what is applied.

        Raises:
            ValueError: nested tensors, shapes or masks that do not fit, is_causal without attn_mask; what
                `integer_linear` raises.
        """
        self._check(query, key, value, key_padding_mask, attn_mask, is_causal)
        batched = query.dim() == 3
        given = (query, key, value)
        laid = {id(x): self._batch_first(x, batched) for x in given}
        q, k, v = self._projected(*(laid[id(x)] for x in given))
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        mask = self._mask(q, k.shape[1], key_padding_mask, attn_mask)
        k, v, mask = self._extended(k, v, mask)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(dim=-1), dropout)
            mixed = weights @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        result = self._product("out_proj", mixed.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return result.squeeze(0), None if weights is None else weights.squeeze(0)
        return result if self.batch_first else result.transpose(0, 1), weights

    def _batch_first(self, x: Tensor, batched: bool) -> Tensor:
        if not batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _projected(self, *given: Tensor) -> list[Tensor]:
        """Queries, keys and values, one product for neighbours that are the same tensor."""
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            parts = zip(PROJECTIONS, given, weights, biases, strict=False)
            return [self._product(name, x, weight, bias) for name, x, weight, bias in parts]
        results: list[Tensor] = []
        while len(results) < 3:
            first = len(results)
            last = next((i for i in range(first, 3) if given[i] is not given[first]), 3)
            rows = slice(first * self.embed_dim, last * self.embed_dim)
            bias = None if self.in_proj_bias is None else self.in_proj_bias[rows]
            result = self._product(PROJECTIONS[first], given[first], self.in_proj_weight[rows], bias)
            results += result.chunk(last - first, dim=-1)
        return results

    def _extended(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values (batch, steps, features) with `bias_k` and `bias_v`, then zeros, behind; never masked."""
        added = []
        if self.bias_k is not None and self.bias_v is not None:
            added.append(tuple(self._guarded(bias).expand(k.shape[0], 1, -1) for bias in (self.bias_k, self.bias_v)))
        if self.add_zero_attn:
            added.append((torch.zeros_like(k[:, :1]), torch.zeros_like(v[:, :1])))
        if not added:
            return k, v, mask
        keys, values = zip(*added, strict=True)
        mask = None if mask is None else F.pad(mask, (0, len(added)))
        return torch.cat((k, *keys), dim=1), torch.cat((v, *values), dim=1), mask

    def _mask(self, q: Tensor, steps: int, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Both masks as one that is added to scores (batch, heads, queries, keys); None for none."""
        total = None
        if mask is not None:
            total = _additive(mask, q.dtype)
            heads = (q.shape[0], self.num_heads) if mask.dim() == 3 else (1, 1)
            total = total.reshape(*heads, q.shape[1], steps)
        if padding is not None:
            hidden = _additive(padding, q.dtype)[:, None, None, :]
            total = hidden if total is None else total + hidden
        return total

    def _check(  # noqa: PLR0917
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None,
        mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        if any(x.is_nested for x in (query, key, value)):
            raise ValueError(f"{self.label}: nested tensors have no integer form; pad and mask them")
        batched = query.dim() == 3
        batch_dim, step_dim = (0, 1) if self.batch_first else (1, 0)
        fits = query.dim() in (2, 3) and query.dim() == key.dim() == value.dim() and key.shape[:-1] == value.shape[:-1]
        fits = fits and [x.shape[-1] for x in (query, key, value)] == [self.embed_dim, self.kdim, self.vdim]
        if not fits or (batched and query.shape[batch_dim] != key.shape[batch_dim]):
            order = "batch, steps" if self.batch_first else "steps, batch"
            shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
            raise ValueError(
                f"{self.label}: query, key and value must be ({order}, features) or (steps, features) with features "
                f"{self.embed_dim}, {self.kdim}, {self.vdim} and key and value of the same steps, got {shapes}"
            )
        if is_causal and mask is None:
            raise ValueError(f"{self.label}: is_causal is a hint about attn_mask, which must be given with it")
        batch = query.shape[batch_dim] if batched else 1
        queries, keys = (x.shape[step_dim] if batched else x.shape[0] for x in (query, key))
        expected = (batch, keys) if batched else (keys,)
        if padding is not None and tuple(padding.shape) != expected:
            raise ValueError(f"{self.label}: key_padding_mask must be {expected}, got {tuple(padding.shape)}")
        allowed = ((queries, keys), (batch * self.num_heads, queries, keys))
        if mask is not None and tuple(mask.shape) not in allowed:
            raise ValueError(f"{self.label}: attn_mask must be {allowed[0]} or {allowed[1]}, got {tuple(mask.shape)}")
        for name, given in (("key_padding_mask", padding), ("attn_mask", mask)):
            if given is not None and given.dtype != torch.bool and not given.is_floating_point():
                raise ValueError(f"{self.label}: {name} must be boolean or floating, got {given.dtype}")


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)
