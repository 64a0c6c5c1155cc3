"""Run folders as training leaves them, with random weights, for the tests of `smkd export`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

import foreign_files as files
from smkd import api
from smkd.config import loading
from smkd.engine import checkpoint
from smkd.models.vit import VisionTransformer

ROTARY = {"rotary": True, "register_tokens": 4, "layer_scale": 1.0}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "heads": {"num_heads": 4},
    "registers": {"register_tokens": 4, "layer_scale": 1.0},
    "wide": {"mlp_dim": 100},
    "gated": {"swiglu": True, "mlp_dim": 171, "register_tokens": 2},
    "rotary": ROTARY,
    "rotary-bare": {"rotary": True},
    "rotary-gated": {**ROTARY, "swiglu": True, "mlp_dim": 171},
}
"""Arguments of ViTs that differ in what files have to say."""


def run_folder(folder: Path, network: VisionTransformer, *words: str) -> Path:
    """A run whose teacher has these weights, and whose student has others."""
    config = api.resolve(
        "debug-pretrain", ["precision=fp32", "features.parts=[cls,mean,weighted_mean]", "features.blocks=[1,2]", *words]
    )
    config = config.model_copy(update={"model": network.config})
    torch.manual_seed(3)
    student = VisionTransformer.from_config(config.model, mask_token=True)
    state = {
        "student": files.prefixed("backbone.", files.weights(student)),
        "teacher": files.prefixed("backbone.", files.weights(network)), "objective": {}, "optimizer": {},
        "scaler": {}, "epoch": 2, "step": 64, "best": 40.0, "classes": [], "version": "0",
        "config": config.model_dump(mode="json"),
    }  # fmt: skip
    checkpoint.save_checkpoint(state, folder / "checkpoints" / "best.pt")
    (folder / "config.yaml").write_text(loading.dump(config))
    return folder


def add_accuracies(run: Path) -> None:
    """What training and `smkd eval --json` leave in a run's folder, with records of other weights among them."""
    lines = [
        {"kind": "train", "step": 64, "loss": 1.0},
        {"kind": "validation", "step": 32, "epoch": 1, "accuracy": 11.0, "5-way 1-shot": 11.0},
        {"kind": "validation", "step": 64, "epoch": 2, "accuracy": 41.5, "5-way 1-shot": 40.0, "5-way 5-shot": 43.0},
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"kind": "validation", "st')
    digest = hashlib.sha256((run / "checkpoints" / "best.pt").read_bytes()).hexdigest()
    result = {
        "way": 5, "shot": 1, "query": 15, "episodes": 2000, "head": "prototype", "split": "test", "mean": 38.25,
        "ci95": 0.41, "dataset": "patterns", "transform": "resize 32, crop 32",
    }  # fmt: skip
    results = [{**result, "checkpoint_sha256": digest}, {**result, "mean": 99.0, "checkpoint_sha256": "other"}]
    (run / "test.json").write_text(json.dumps({"results": results}))
    (run / "list.json").write_text("[1, 2]")
    (run / "broken.json").write_text('{"results": [{"checkpoint_sha256": "' + digest + '"}, 3]}')
