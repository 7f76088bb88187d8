"""A forward pass without what nobody reads, and without copies: the same features, sooner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

_MOST_SHARES = 2**21
"""Numbers that attention may keep of a layer and an image until its backward pass, 4 MiB. At 224 px
a ViT-B keeps a quarter of that, which is a fifth of what its layer keeps anyway."""


@contextmanager
def sparing(module: nn.Module) -> Iterator[None]:
    """Pass with less work: the last block for the class token alone, if that is read.

    Of the last block's outputs, a model that pools by its class token reads one in 197. All tokens
    still have keys and values there; what comes after is a tenth of a small model's work in that
    block. Models that read more, and blocks that do something else, stay as they are; and so does
    attention that is not timm's plain one.
    """
    with ExitStack() as replaced:
        for attention in module.modules():
            if _is_plain(attention):
                replaced.enter_context(_replaced(attention, _attended))
        if _reads_first_token(module):
            replaced.enter_context(_replaced(module.blocks[-1], _first_token))
        yield


def _reads_first_token(module: nn.Module) -> TypeGuard[VisionTransformer]:
    """Return whether a model reads the class token of its last block alone, and that is plain."""
    if type(module) is not VisionTransformer or not len(module.blocks):
        return False
    read = module.global_pool == "token" and module.has_class_token and module.attn_pool is None
    block = module.blocks[-1]
    return read and type(block) is Block and _is_plain(block.attn)


def _is_plain(module: nn.Module) -> bool:
    return type(module) is Attention and module.gate is None


@contextmanager
def _replaced(module: Any, forward: Callable[..., Tensor]) -> Iterator[None]:
    module.forward = partial(forward, module)
    try:
        yield
    finally:
        del module.forward


def _attended(
    attention: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Return what timm's ``Attention`` makes of x (n, tokens, d)."""
    query, key, value = _heads(attention, x)
    if attn_mask is None and not is_causal and _multiplies_sooner(query):
        mixed = (query * attention.scale @ key.mT).softmax(dim=-1) @ value
    else:
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask, is_causal=is_causal, scale=attention.scale
        )
    return _joined(attention, mixed)


def _multiplies_sooner(query: Tensor) -> bool:
    """Return whether plain products are faster than the fused kernel, for (n, heads, tokens, _).

    In bfloat16 on processors, that is: their fused kernel multiplies that no faster than float32 (a
    DeiT-tiny's layer takes it 39 ms forward and back, plain products 17). But it keeps no shares
    (n, heads, tokens, tokens), and so images with many tokens stay with it.
    """
    shares = query.shape[1:-1].numel() * query.shape[-2]
    return query.device.type == "cpu" and query.dtype is torch.bfloat16 and shares <= _MOST_SHARES


def _first_token(block: Any, x: Tensor) -> Tensor:
    """Return the first token (n, 1, d) of what timm's ``Block`` makes of x (n, tokens, d)."""
    attention = block.attn
    query, key, value = _heads(attention, block.norm1(x))
    mixed = F.scaled_dot_product_attention(query[:, :, :1], key, value, scale=attention.scale)
    x = x[:, :1] + block.drop_path1(block.ls1(_joined(attention, mixed)))
    result: Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return result


def _heads(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values, (n, heads, tokens, a / heads) each.

    Cut from the last dimension, where timm cuts a permuted one: their gradients are put together
    where the product's gradient is read, in one copy instead of two (3% of a step).
    """
    query, key, value = (
        part.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)
        for part in attention.qkv(x).chunk(3, dim=-1)
    )
    return attention.q_norm(query), attention.k_norm(key), value


def _joined(attention: Any, mixed: Tensor) -> Tensor:
    """Return what heads (n, heads, tokens, a / heads) say, as tokens (n, tokens, d)."""
    tokens = attention.norm(mixed.transpose(1, 2).flatten(2))
    result: Tensor = attention.proj_drop(attention.proj(tokens))
    return result
