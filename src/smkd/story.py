"""What runs came to: their networks, measured alike, with the images that a report shows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from smkd import api
from smkd.classify.encoder import Encoder, EncoderConfig, open_encoder
from smkd.config import loading
from smkd.config.protocol import ProtocolConfig
from smkd.config.run_config import RunConfig
from smkd.data.datasets import open_split
from smkd.data.images import Images
from smkd.engine.runs import config_of, named_runs
from smkd.errors import SmkdError
from smkd.fewshot.accuracy import Result, evaluate_features
from smkd.fewshot.features import Features, pixel_stream
from smkd.fewshot.validation import backbone_features

RANDOM = "random weights"


@dataclass
class Stage:
    """A network on the way, with what it was measured to be.

    Attributes:
        name: of the run's folder, or of what the first run started from.
        encoder: its backbone with the transform of its run.
        features: of the measured split.
        results: one a number of shots.
    """

    name: str
    encoder: Encoder
    features: Features
    results: list[Result]


@dataclass
class Story:
    """What the page tells.

    Attributes:
        runs: the folders.
        configs: of the runs.
        protocol: how all are measured.
        stages: what the first run started from, and each run that has a checkpoint.
        pixels: results of plain colours.
        measured, seen: images of the measured split and of the last run's training split; None if they are not at hand.
        missing: lines about what could not be shown, and why.
    """

    runs: list[Path]
    configs: list[RunConfig]
    protocol: ProtocolConfig
    stages: list[Stage] = field(default_factory=list)
    pixels: list[Result] = field(default_factory=list)
    measured: Images | None = None
    seen: Images | None = None
    missing: list[str] = field(default_factory=list)

    @property
    def unseen_class(self) -> str:
        """What the measured classes are; of a run that held images out they are the training classes."""
        classes = [set(images.class_names) for images in (self.seen, self.measured) if images is not None]
        return "unseen class" if len(classes) < 2 or classes[0].isdisjoint(classes[1]) else "class"

    @property
    def names(self) -> dict[str, Path]:
        """See `named_runs`."""
        return named_runs(self.runs)

    def rows(self) -> dict[str, list[Result]]:
        """Results by name."""
        pixels = {"raw pixels": self.pixels} if self.pixels else {}
        return pixels | {stage.name: stage.results for stage in self.stages}


def measured_story(runs: list[Path], data: str | Path | None, episodes: int | None, accelerator: str) -> Story:
    """Open and measure runs; what cannot be opened or measured becomes a line.

    Args: see `smkd.report.write_report`.

    Raises:
        ConfigError: a folder is no run.
    """
    story = _opened(runs, data, episodes)
    try:
        story.measured = open_split(story.configs[-1].data, story.protocol.split)
        story.seen = open_split(story.configs[-1].data, "train", labelled=story.configs[-1].needs_labels)
    except SmkdError as error:
        story.missing.append(f"the images are not at hand, so nothing is measured: {error}")
    if story.measured is not None:
        _measure(story, story.measured, accelerator)
    return story


def _opened(runs: list[Path], data: str | Path | None, episodes: int | None) -> Story:
    configs = [config_of(run) for run in runs]
    if data is not None:
        configs[-1] = loading.changed(configs[-1], {"data": {"root": str(data)}})
    protocol = configs[-1].evaluation
    if episodes is not None:
        protocol = protocol.model_copy(update={"episodes": episodes})
    return Story(runs, configs, protocol)


def _measure(story: Story, images: Images, accelerator: str) -> None:
    """Fill in the stages; what cannot be opened or measured becomes a line."""
    for name, encoder in _encoders(story, accelerator):
        try:
            config = story.configs[-1].model_copy(update={"features": encoder.config.features})
            own = {"resize": encoder.config.resize, "crop": encoder.config.crop}
            protocol = story.protocol.model_copy(update=own)
            assert encoder.backbone is not None
            features = backbone_features(encoder.backbone, config, protocol, encoder.device, images).collect()
            story.stages.append(Stage(name, encoder, features, evaluate_features(features, story.protocol)))
        except SmkdError as error:
            story.missing.append(f"{name} is not measured: {error}")
    if story.stages:
        features = pixel_stream(images, on_error=story.configs[-1].data.on_error).collect()
        story.pixels = evaluate_features(features, story.protocol)


def _encoders(story: Story, accelerator: str) -> Iterator[tuple[str, Encoder]]:
    """What the first run started from, read as that run reads its own; then each run."""
    first = story.configs[0]
    try:
        start = api.random_backbone(first) if first.starts_random else api.load(str(first.init))
        name = RANDOM if first.starts_random else Path(str(first.init)).name
        yield name, Encoder(EncoderConfig.of_run(first, start.config), start, accelerator=accelerator)
    except SmkdError as error:
        story.missing.append(f"what {story.runs[0]} started from is not shown: {error}")
    for name, run in story.names.items():
        try:
            yield name, open_encoder(run, accelerator=accelerator)
        except SmkdError as error:
            story.missing.append(f"{name} is not shown: {error}")
