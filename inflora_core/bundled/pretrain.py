"""Train the bundled backbone: a 2.7 M parameter ViT that sees 32 x 32 pixels.

    python -m inflora_core.bundled.pretrain DATA.npz TEACHER.safetensors OUT.safetensors

Two losses share one pass: cross-entropy on the labelled base classes, and a cosine distillation
of a teacher's final features (Heo et al. 2019, "A Comprehensive Overhaul of Feature
Distillation", in its simplest form: a linear projector and the cosine). The teacher sees each
image once; its features are kept on disk, so that an epoch costs only the student. The script
continues from its last finished epoch when it is started again.

``DATA.npz`` holds ``train_bytes`` (uint8, all encoded images end to end), ``train_offset``
(int64, n + 1 positions) and ``train_label`` (int64, n).
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 192,
    "depth": 6,
    "num_heads": 3,
    "class_token": False,
    "global_pool": "avg",
    "num_classes": 0,
}
PRETRAINED_CFG: dict[str, Any] = {
    "input_size": [3, 32, 32],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "license": "apache-2.0",
}
TEACHER_ARCHITECTURE = "deit_tiny_patch16_224"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def read_images(data: Path, split: str) -> tuple[Tensor, Tensor]:
    """Return images (n, 3, 32, 32) uint8 and labels (n,) int64 of ``split``."""
    with np.load(data) as archive:
        blob, offset = archive[f"{split}_bytes"], archive[f"{split}_offset"]
        labels = archive[f"{split}_label"].astype(np.int64)
    images = [
        np.asarray(Image.open(io.BytesIO(blob[a:b].tobytes())).convert("RGB"))
        for a, b in itertools.pairwise(offset)
    ]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(
        labels
    )


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Scale uint8 or 0..255 float images (n, 3, h, w) to zero mean and unit variance, float32."""
    shape = (1, 3, 1, 1)
    return (images.float() / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


@torch.inference_mode()
def teacher_features(teacher: nn.Module, images: Tensor, cache: Path) -> Tensor:
    """Standardised final features (n, d) float16 of ``images``, kept in the file ``cache``."""
    if cache.exists():
        return load_file(cache)["features"]
    rows = []
    for chunk in images.split(64):
        view = normalise(chunk, IMAGENET_MEAN, IMAGENET_STD)
        view = F.interpolate(view, (224, 224), mode="bicubic", antialias=True)
        with torch.autocast("cpu", torch.bfloat16):
            rows.append(teacher(view).float())
        if len(rows) % 50 == 0:
            print(f"teacher: {64 * len(rows)} images", flush=True)
    features = torch.cat(rows)
    features = ((features - features.mean(0)) / features.std(0)).half()
    save_file({"features": features}, cache)
    return features


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random shift by up to 4 pixels, mirror, colour and brightness; float32, 0..255."""
    n = len(images)
    padded = F.pad(images.float(), (4, 4, 4, 4), mode="reflect")
    dy, dx = torch.randint(0, 9, (2, n), generator=generator)
    rows = (dy[:, None] + torch.arange(32))[:, None, :, None].expand(n, 3, 32, 40)
    cols = (dx[:, None] + torch.arange(32))[:, None, None, :].expand(n, 3, 32, 32)
    images = padded.gather(2, rows).gather(3, cols)
    mirrored = torch.rand(n, generator=generator) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    gain = 1 + 0.4 * (torch.rand(n, 3, 1, 1, generator=generator) - 0.5)
    gain = gain * (1 + 0.4 * (torch.rand(n, 1, 1, 1, generator=generator) - 0.5))
    grey = torch.rand(n, 1, 1, 1, generator=generator) < 0.1
    images = torch.where(grey, images.mean(1, keepdim=True), images)
    return (images * gain).clamp(0, 255)


def nearest_mean_accuracy(student: nn.Module, data: Path) -> float:
    """Accuracy of nearest class means (cosine) on the ``test`` split of the training classes."""
    student.eval()
    mean, std = PRETRAINED_CFG["mean"], PRETRAINED_CFG["std"]
    with torch.inference_mode():
        split = {}
        for name, cap in (("train", 40), ("test", 20)):
            images, labels = read_images(data, name)
            keep = torch.cat([(labels == c).nonzero()[:cap, 0] for c in labels.unique()])
            rows = [student(normalise(x, mean, std)) for x in images[keep].split(250)]
            split[name] = torch.cat(rows), labels[keep]
    features, labels = split["train"]
    classes = labels.unique()
    means = torch.stack([features[labels == c].mean(0) for c in classes])
    centre = features.mean(0)
    test, truth = split["test"]
    score = F.normalize(test - centre, dim=1) @ F.normalize(means - centre, dim=1).T
    return float((classes[score.argmax(1)] == truth).float().mean())


def pretrain(
    data: Path, teacher_file: Path, out: Path, epochs: int, seed: int, check: Path | None
) -> None:
    """Train the student for ``epochs`` epochs and write ``out`` (float16 safetensors)."""
    work = out.with_suffix(".work")
    work.mkdir(parents=True, exist_ok=True)
    images, labels = read_images(data, "train")
    classes = int(labels.max()) + 1

    teacher: Any = timm.create_model(TEACHER_ARCHITECTURE, num_classes=1000)
    teacher.load_state_dict({k: v.float() for k, v in load_file(teacher_file).items()}, strict=True)
    teacher.reset_classifier(0)
    targets = teacher_features(teacher.eval(), images, work / "teacher.safetensors")

    torch.manual_seed(seed)
    student: nn.Module = timm.create_model(ARCHITECTURE, drop_path_rate=0.05, **MODEL_ARGS)
    width = int(MODEL_ARGS["embed_dim"])
    head, projector = nn.Linear(width, classes), nn.Linear(width, targets.shape[-1])
    trained = nn.ModuleDict({"student": student, "head": head, "projector": projector})
    decay = [p for p in trained.parameters() if p.ndim > 1]
    other = [p for p in trained.parameters() if p.ndim <= 1]
    batch = 128
    steps = epochs * (len(images) // batch)
    peak = 1.5e-3
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": other, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / 500, 0.5 * (1 + math.cos(math.pi * min(s / steps, 1)))),
    )
    checkpoint, first = work / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        trained.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["epoch"] + 1
    mean, std = PRETRAINED_CFG["mean"], PRETRAINED_CFG["std"]

    for epoch in range(first, epochs):
        generator = torch.Generator().manual_seed(seed * 1000 + epoch)
        torch.manual_seed(seed * 1000 + epoch)
        trained.train()
        start, total, hits = time.monotonic(), torch.zeros(2), 0
        order = torch.randperm(len(images), generator=generator)
        for index in order[: len(order) // batch * batch].split(batch):
            view = augment(images[index], generator)
            target = targets[index].float()
            one_hot = F.one_hot(labels[index], classes).float()
            share = 1.0
            if torch.rand((), generator=generator) < 0.25:
                share = float(torch.rand((), generator=generator))
                view = share * view + (1 - share) * view.flip(0)
                target = share * target + (1 - share) * target.flip(0)
                one_hot = share * one_hot + (1 - share) * one_hot.flip(0)
            with torch.autocast("cpu", torch.bfloat16):
                features = student(normalise(view, mean, std))
                logits, copy = head(features), projector(features)
            ce = F.cross_entropy(logits.float(), one_hot, label_smoothing=0.1)
            distance = 1 - F.cosine_similarity(copy.float(), target, dim=1).mean()
            optimizer.zero_grad(set_to_none=True)
            (ce + 4 * distance).backward()
            nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += torch.tensor([ce.item(), distance.item()])
            hits += int((logits.argmax(1) == labels[index]).sum())
        draft = checkpoint.with_suffix(".draft")
        torch.save(
            {
                "model": trained.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "epoch": epoch,
            },
            draft,
        )
        os.replace(draft, checkpoint)
        row: dict[str, Any] = {
            "epoch": epoch,
            "cross_entropy": float(total[0]) / (len(images) // batch),
            "distance": float(total[1]) / (len(images) // batch),
            "train_accuracy": hits / len(images),
            "seconds": time.monotonic() - start,
        }
        if check is not None and (epoch % 3 == 2 or epoch == epochs - 1):
            row["check_nearest_mean"] = nearest_mean_accuracy(student, check)
        print(json.dumps(row), flush=True)
        with (work / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        write_weights(student, out)


def write_weights(student: nn.Module, out: Path) -> None:
    """Write float16 weights; their metadata is the ``config.json`` of a timm hub model."""
    config = {
        "architecture": ARCHITECTURE,
        "model_args": MODEL_ARGS,
        "pretrained_cfg": PRETRAINED_CFG,
    }
    weights = {k: v.half().contiguous() for k, v in student.state_dict().items()}
    save_file(weights, out, metadata={"timm_config": json.dumps(config, sort_keys=True)})


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", type=Path, help="npz with unseen classes, to report on")
    args = parser.parse_args()
    pretrain(args.data, args.teacher, args.out, args.epochs, args.seed, args.check)


if __name__ == "__main__":
    main()
