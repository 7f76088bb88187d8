"""A forward pass that leaves out what nobody reads: the same features, sooner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn


def sparing(module: nn.Module) -> Any:
    """Return a context in which the last block works for the class token alone, if that is read.

    Of the last block's outputs, a model that pools by its class token reads one in 197. All tokens
    still have keys and values there; what comes after is a tenth of a small model's work in that
    block. Models that read more, and blocks that do something else, stay as they are.
    """
    if type(module) is not VisionTransformer or not len(module.blocks):
        return nullcontext()
    block = module.blocks[-1]
    read = module.global_pool == "token" and module.has_class_token and module.attn_pool is None
    known = type(block) is Block and type(block.attn) is Attention and block.attn.gate is None
    return _replaced(block) if read and known else nullcontext()


@contextmanager
def _replaced(block: Any) -> Iterator[None]:
    block.forward = lambda x: _first_token(block, x)
    try:
        yield
    finally:
        del block.forward


def _first_token(block: Any, x: Tensor) -> Tensor:
    """Return the first token (n, 1, d) of what timm's ``Block`` makes of x (n, tokens, d)."""
    attention = block.attn
    n, tokens, _ = x.shape
    parts = attention.qkv(block.norm1(x)).reshape(
        n, tokens, 3, attention.num_heads, attention.head_dim
    )
    query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
    query, key = attention.q_norm(query[:, :, :1]), attention.k_norm(key)
    mixed = F.scaled_dot_product_attention(query, key, value, scale=attention.scale)
    mixed = attention.norm(mixed.transpose(1, 2).reshape(n, 1, attention.attn_dim))
    x = x[:, :1] + block.drop_path1(block.ls1(attention.proj_drop(attention.proj(mixed))))
    result: Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return result
