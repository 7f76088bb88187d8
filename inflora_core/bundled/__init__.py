"""The backbone that comes with the package; see MODEL_CARD.md. For trying out: it sees 32 x 32."""

from __future__ import annotations

from pathlib import Path

PATH = Path(__file__).parent / "vit_tiny_32.fp16.safetensors"
