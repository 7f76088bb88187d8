"""From torch to ONNX, and the gate that nothing passes unless both give the same answers."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from inflora_core.backbone import Backbone
from inflora_core.errors import (
    InvalidInputError,
    ParityError,
    UnsupportedBackboneError,
)
from inflora_core.graph import (
    EMBEDDING,
    IMAGES,
    LOGITS,
    OPSET,
    PIXELS,
    compose,
    key_weight,
    read_metadata,
    split,
    value_weight,
)
from inflora_core.model import ContinualModel, ParityReport
from inflora_core.predictor import CPU, each_alone, session_options

LARGEST_FILE = 2**31 - 2**20
"""A protobuf message ends at 2 GiB; weights beyond would have to lie in files of their own."""

GREY_LEVELS = 1.0
"""Largest mean difference between the graph's preprocessing and timm's, of 255."""

AGREEMENT = 0.995
"""Smallest share of images that ONNX and torch must name alike, end to end."""

_TOLERANCE = 1e-4
_PARTS = ("query", "key", "value")


def export_template(backbone: Backbone) -> bytes:
    """Export a frozen backbone once, as the template of every version's file.

    Returns:
        ``inflora_core.graph``'s composed file with the backbone's own K and V weights and a head
        of zeros; the same bytes whenever it is repeated with the same versions of the libraries.

    Raises:
        UnsupportedBackboneError: if the model is too large for one file, or the exporter did not
            keep the weights that tasks change.
    """
    size = sum(tensor.nbytes for tensor in backbone.module.state_dict().values())
    if size > LARGEST_FILE:
        raise UnsupportedBackboneError(
            f"the model's {size / 2**30:.1f} GiB of weights do not fit in one ONNX file (2 GiB)",
            field="backbone",
        )
    exported = _export(_separated(backbone), backbone)
    _name_weights(exported, backbone)
    template = compose(
        exported, backbone.config.layers, backbone.config.embedding_size, backbone.preprocessing
    )
    onnx.checker.check_model(template)
    content: bytes = template.SerializeToString(deterministic=True)
    return content


def check_parity(
    model: bytes,
    expected: NDArray[np.float32],
    resized: NDArray[np.uint8],
    images: Sequence[NDArray[np.uint8]],
    answers: NDArray[np.intp],
    backbone: Backbone,
    tolerance: float = _TOLERANCE,
) -> ParityReport:
    """Compare a version's file with the torch model before merging, on a task's own images.

    Three things must hold: the logits of ``resized`` differ by no more than ``tolerance`` (for
    logits up to 10; in proportion beyond, because float32 is); the graph's preprocessing of
    ``images`` is within one grey level of timm's on average; and from ``images`` to the name of
    the class, both agree on a share of ``AGREEMENT``. One image may always differ, and one whose
    two best logits are within the tolerance of each other does not count: nothing can tell them
    apart.

    Args:
        model: The composed file.
        expected: Logits (n, classes) of ``resized`` in torch, with frozen weights and low-rank
            branches.
        resized: (n, S, S', 3) uint8, what timm's preprocessing makes of ``images``.
        images: Decoded originals, each (h, w, 3) uint8 of any size.
        answers: (n,) positions of the classes that the file itself names ``images``.
        backbone: Whose preprocessing the graph repeats.
        tolerance: Largest difference of two logits.

    Raises:
        ParityError: saying which of the three does not hold, or that a logit is not finite.
        InvalidInputError: if there is nothing to compare on.
        DamagedError: if ``model`` is not a composed file.
    """
    if not len(resized) or len(images) != len(resized):
        raise InvalidInputError("parity needs at least one image to be checked on")
    preprocess_part, classify_part = split(model)
    pixels = backbone.normalise(torch.from_numpy(resized))
    each = each_alone(
        classify_part, [LOGITS], list(pixels.numpy()), torch.get_num_threads(), PIXELS
    )
    answered = np.concatenate([logits for (logits,) in each])
    difference, allowed = _difference(answered, expected, tolerance)
    grey_levels = _grey_levels(_session(preprocess_part), images, resized, backbone)
    agreement = _agreement(answers, expected, allowed)
    return ParityReport(
        images=len(images),
        max_abs_diff=difference,
        preprocessing_grey_levels=grey_levels,
        top1_agreement=agreement,
    )


def check_edit(before: bytes, after: bytes, model: ContinualModel) -> None:
    """Compare a version's file with that of its parent, and with the state that it was made of.

    There are no images, so what both see is noise. Features must be the parent's, and logits what
    the head makes of them; whatever goes in shows whether they are.

    Args:
        before: The parent's composed file.
        after: The composed file.
        model: What ``after`` was made of.

    Raises:
        ParityError: features or logits differ.
        DamagedError: if one of them is not a composed file.
    """
    size = read_metadata(after).preprocessing
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((4, 3, size.height, size.width), np.float32)
    (features,) = _session(split(before)[1]).run([EMBEDDING], {PIXELS: pixels})
    same, answered = _session(split(after)[1]).run([EMBEDDING, LOGITS], {PIXELS: pixels})
    _difference(same, features, _TOLERANCE, "the version before", "features")
    _difference(answered, model.logits(features), _TOLERANCE, "the state")


def _difference(
    answered: NDArray[np.float32],
    expected: NDArray[np.float32],
    tolerance: float,
    other: str = "torch",
    what: str = "logits",
) -> tuple[float, float]:
    """Return the largest difference of two answers, and the one allowed."""
    if answered.shape != expected.shape:
        raise ParityError(f"ONNX gives {what} {answered.shape}, {other} {expected.shape}")
    if not (np.isfinite(answered).all() and np.isfinite(expected).all()):
        raise ParityError(f"not all {what} are finite")
    difference = float(np.abs(answered - expected).max())
    allowed = tolerance * max(1.0, float(np.abs(expected).max()) / 10)
    if difference > allowed:
        raise ParityError(
            f"{what} of ONNX and {other} differ by {difference:.2e}, more than {allowed:.2e}"
        )
    return difference, allowed


def _grey_levels(
    preprocess: ort.InferenceSession,
    images: Sequence[NDArray[np.uint8]],
    resized: NDArray[np.uint8],
    backbone: Backbone,
) -> float:
    """Return the mean difference of the graph's preprocessing from timm's, in grey levels."""
    mean, std = (
        np.array(values, np.float32).reshape(3, 1, 1)
        for values in (backbone.preprocessing.mean, backbone.preprocessing.std)
    )
    differences = []
    for image, expected in zip(images, resized, strict=True):
        pixels = preprocess.run([PIXELS], {IMAGES: image[None]})[0][0]
        levels = ((pixels * std + mean) * 255).transpose(1, 2, 0)
        differences.append(np.abs(levels - expected).mean())
    average = float(np.mean(differences))
    if not average <= GREY_LEVELS:
        raise ParityError(
            f"preprocessing in the graph is {average:.2f} grey levels from timm's on average"
        )
    return average


def _agreement(answers: NDArray[np.intp], logits: NDArray[np.float32], tie: float) -> float:
    """Return the share of images that ONNX names as ``logits`` do, from image to class."""
    lost = logits.max(1) - np.take_along_axis(logits, answers[:, None], 1)[:, 0]
    differ = int((lost > tie).sum())
    agreement = 1 - differ / len(answers)
    if differ > 1 and agreement < AGREEMENT:
        raise ParityError(
            f"ONNX and torch name {differ} of {len(answers)} images differently, end to end"
        )
    return agreement


def _session(model: bytes) -> ort.InferenceSession:
    options = session_options(torch.get_num_threads())
    return ort.InferenceSession(model, options, providers=[CPU])


class _Projections:
    """What ``attn.qkv(x)`` gives while exporting: q, k and v that never were one tensor.

    timm's attention makes (n, tokens, 3a) into (n, tokens, 3, heads, a / heads), moves the 3 to
    the front and takes it apart. Here the same calls act on the three, so that the graph has three
    plain projections: smaller, and a pattern that runtimes know how to fuse.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._parts = parts

    def reshape(self, n: int, tokens: int, three: int, heads: int, width: int) -> _Projections:
        if three != 3:
            raise UnsupportedBackboneError(f"attention splits qkv into {three} parts, not 3")
        return _Projections([part.reshape(n, tokens, heads, width) for part in self._parts])

    def permute(self, *order: int) -> _Projections:
        if order != (2, 0, 3, 1, 4):
            raise UnsupportedBackboneError(f"attention orders qkv as {order}")
        return _Projections([part.transpose(1, 2) for part in self._parts])

    def unbind(self, dim: int) -> tuple[Tensor, ...]:
        if dim != 0:
            raise UnsupportedBackboneError(f"attention takes qkv apart along {dim}, not 0")
        return tuple(self._parts)


class _SeparateQKV(nn.Module):
    """A fused ``qkv`` with its rows as separate weights, transposed to (d, a).

    K and V hold random numbers: an exporter must find nothing in them to fold or to share.
    """

    def __init__(self, qkv: nn.Linear, generator: torch.Generator) -> None:
        super().__init__()
        query = qkv.weight.chunk(3)[0].T.contiguous()
        key, value = (0.02 * torch.randn(query.shape, generator=generator) for _ in "kv")
        for name, weight in zip(_PARTS, (query, key, value), strict=True):
            self._keep(f"{name}_weight", weight)
        bias: Tensor | None = qkv.bias
        self.biased = bias is not None
        if bias is not None:
            for name, part in zip(_PARTS, bias.chunk(3), strict=True):
                self._keep(f"{name}_bias", part)

    def _keep(self, name: str, value: Tensor) -> None:
        self.register_parameter(name, nn.Parameter(value.clone(), requires_grad=False))

    def forward(self, x: Tensor) -> _Projections:
        parts = [x @ self.get_parameter(f"{name}_weight") for name in _PARTS]
        if self.biased:
            biases = (self.get_parameter(f"{name}_bias") for name in _PARTS)
            parts = [part + bias for part, bias in zip(parts, biases, strict=True)]
        return _Projections(parts)


def _separated(backbone: Backbone) -> nn.Module:
    """Return a copy of the module, on the CPU, in the form in which it is exported."""
    module = copy.deepcopy(backbone.module).cpu()
    generator = torch.Generator().manual_seed(0)
    for name in backbone.config.layers:
        attention: Any = module.get_submodule(name)
        attention.qkv = _SeparateQKV(attention.qkv, generator)
    for part in module.modules():
        # torch's fused attention exports with shape arithmetic around it; timm's plain one does
        # not, and computes the same.
        if hasattr(part, "fused_attn"):
            setattr(part, "fused_attn", False)  # noqa: B010
    return module


def _export(module: nn.Module, backbone: Backbone) -> onnx.ModelProto:
    """Export ``pixels`` (batch, 3, S, S') to ``embedding`` (batch, e)."""
    size = (backbone.preprocessing.height, backbone.preprocessing.width)
    with _quiet():
        program = torch.onnx.export(
            module,
            (torch.zeros(2, 3, *size),),
            dynamo=True,
            opset_version=OPSET,
            input_names=[PIXELS],
            output_names=[EMBEDDING],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    if program is None:
        raise UnsupportedBackboneError("torch exported nothing", field="backbone")
    model: onnx.ModelProto = program.model_proto
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporter's libraries say about deprecations in each other, and its log."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _name_weights(model: onnx.ModelProto, backbone: Backbone) -> None:
    """Give K and V weights their names in the file and the backbone's own values, in place."""
    names: dict[str, str] = {}
    arrays: dict[str, NDArray[np.float32]] = {}
    for layer in backbone.config.layers:
        weight = backbone.qkv(layer).get_parameter("weight").detach().cpu().numpy()
        _, key, value = np.split(weight, 3)
        for part, named, array in (("key", key_weight, key), ("value", value_weight, value)):
            exported = f"{layer}.qkv.{part}_weight"
            names[exported] = named(layer)
            arrays[exported] = np.ascontiguousarray(array.T)
    for tensor in model.graph.initializer:
        if tensor.name not in names:
            continue
        if tuple(tensor.dims) != arrays[tensor.name].shape:
            raise UnsupportedBackboneError(
                f"torch exported {tensor.name} as {tuple(tensor.dims)}", field="backbone"
            )
        tensor.CopyFrom(numpy_helper.from_array(arrays[tensor.name], names[tensor.name]))
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name in names:
                node.input[index] = names[name]
