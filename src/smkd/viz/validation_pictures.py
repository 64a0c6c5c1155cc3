"""What TensorBoard shows of a run while it trains: crops with masks, attention, and matched patches."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from smkd.classify.encoder import Encoder, EncoderConfig
from smkd.config.run_config import RunConfig
from smkd.data.datasets import open_split, open_validation
from smkd.models.vit import VisionTransformer
from smkd.viz.explain import MATCHES
from smkd.viz.patch_pictures import attention_tiles, drawn_matches
from smkd.viz.tiles import mosaic
from smkd.viz.views import view_tiles

SHOWN = 4
"""Images; the same at each validation."""


def validation_pictures(backbone: VisionTransformer, config: RunConfig, device: torch.device) -> dict[str, Image.Image]:
    """Pictures by name.

    Args:
        backbone: the teacher's, in evaluation mode.
        config: of the run.
        device: of the backbone.

    Raises:
        DataError: an image cannot be read.
    """
    images, train = open_validation(config), open_split(config.data, "train", labelled=config.needs_labels)
    rows = np.linspace(0, len(images) - 1, min(SHOWN, len(images))).round().astype(int).tolist()
    loaded = [images.load(row) for row in rows]
    protocol = config.validation
    encoder = Encoder(
        EncoderConfig.of_run(config, backbone.config).model_copy(
            update={"resize": protocol.resize, "crop": protocol.crop}
        ),
        None, accelerator=device.type,
    )  # fmt: skip
    encoder.backbone = backbone
    names = [images.class_names[images.labels[row]] for row in rows]
    tiles = attention_tiles(encoder, loaded, names, heads=True)
    crops = view_tiles(train, config, range(min(SHOWN, len(train))), config.mask.start_epoch)
    made = {
        "pictures/attention": mosaic(tiles, len(tiles) // len(rows)),
        "pictures/crops": mosaic(crops, len(crops) // min(SHOWN, len(train))),
    }
    twins = np.flatnonzero(images.labels == images.labels[0])[:2].tolist()
    if len(twins) == 2:
        made["pictures/matches"] = drawn_matches(encoder, [images.load(row) for row in twins], MATCHES).picture
    return made
