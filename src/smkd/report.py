"""`smkd report`: one page that tells what runs learned, from what was trained on what to what to do next."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from smkd.config import loading
from smkd.data.images import Images
from smkd.data.sources import opened_once
from smkd.engine.runs import next_steps, run_summary
from smkd.errors import ConfigError, SmkdError
from smkd.files import explained, millions
from smkd.story import Stage, Story, measured_story
from smkd.viz import figures
from smkd.viz.curves import read_history, run_curves
from smkd.viz.embedding import embedding_figure, embedding_image, project
from smkd.viz.episode import episode_tiles, typical_episode
from smkd.viz.page import PageSection, write_page
from smkd.viz.patch_pictures import attention_tiles, drawn_matches
from smkd.viz.tiles import picture
from smkd.viz.views import phase_picture

PHASES = {"pretrain": "Phase 1, self-supervised (iBOT)", "distill": "Phase 2, supervised masked knowledge distillation"}
DRAWN_MATCHES = 5
MAP_CLASSES, MAP_IMAGES = 8, 12
"""Of a map: classes, and images of each."""
LOOKED_AT = 5
"""Images whose attention is shown."""


@opened_once()
def write_report(runs: Sequence[str | Path], out: Path, data: str | Path | None = None, episodes: int | None = None,
                 accelerator: str = "auto") -> Story:  # fmt: skip
    """Measure runs and write the page.

    Args:
        runs: folders, in the order in which they were trained; also of a run that was stopped.
        out: HTML file.
        data: where the images are, if they are no longer where the last run says.
        episodes: of the measurement, if not those of the last run's protocol.
        accelerator: 'auto', 'cpu', 'cuda' or 'mps'.

    Returns:
        What the page tells.

    Raises:
        ConfigError: a folder is no run, or the page cannot be written.
    """
    story = measured_story([Path(run) for run in runs], data, episodes, accelerator)
    sections = _sections(story)
    with explained(out, ConfigError, option="--out"):
        write_page(out, " and ".join(story.names), _lead(story), sections)
    return story


def _lead(story: Story) -> str:
    """What was trained on what, in two sentences."""
    config, summary = story.configs[-1], run_summary(story.runs[-1])
    start, data = "random weights" if config.starts_random else str(config.init), config.data.root or config.data.name
    phase = PHASES[config.phase].replace("Phase", "phase")
    size = f"A Vision Transformer (size '{config.model.size}', patches of {config.model.patch_size} pixels)"
    if story.stages:
        backbone = story.stages[-1].encoder.backbone
        assert backbone is not None
        size = millions(sum(each.numel() for each in backbone.parameters()))
        size = f"A Vision Transformer of {size} parameters with patches of {config.model.patch_size} pixels"
    done = f"{summary.epoch} of {summary.epochs} epochs"
    done += "" if summary.state == "complete" else f" ({summary.state})"
    classes = ""
    if story.seen is not None and story.measured is not None:
        classes = (
            f", {len(story.seen):,} images of {len(story.seen.class_names)} classes. It is measured on the "
            f"{len(story.measured.class_names)} classes of the {story.protocol.split} split"
        )
        new = story.unseen_class == "unseen class"
        classes += ", which it has never seen" if new else ", on images it has not seen"
    return f"{size} was trained for {done} of {phase} from {start}, on {data}{classes}."


def _sections(story: Story) -> list[PageSection]:
    """The parts of the page; what cannot be made, as of an image that cannot be read, is named behind the result."""
    pair, images, kind = story.stages[-2:], story.measured, story.unseen_class
    made: list[PageSection] = []

    def tell(section: Callable[..., PageSection | None], *given: object) -> None:
        try:
            told = section(*given)
        except SmkdError as error:
            story.missing.append(str(error))
        else:
            made.extend([] if told is None else [told])

    tell(_result, story)
    if story.seen is not None:
        tell(_how, story, story.seen)
    if images is not None and pair:
        # of a split with images that cannot be read, rows of the features are not images
        whole = len(pair[-1].features.labels) == len(images)
        if whole:
            tell(_episode, story, images, pair[-1])
        tell(_correspondences, images, pair, kind)
        tell(_attention, images, pair)
        if whole:
            tell(_map, images, pair, kind)
    for section in (_curves, _hardest, _settings, _environment, _next):
        tell(section, story)
    if story.missing:
        made.insert(1, PageSection("What could not be shown", "\n".join(story.missing)))
    return made


def _result(story: Story) -> PageSection:
    if not story.stages:
        scores = [f"{name}: {run_summary(run).best}" for name, run in story.names.items() if run_summary(run).best]
        said = f"Best validation accuracy (%): {', '.join(scores)}." if scores else "Nothing was measured yet."
        return PageSection("Result", said)
    best = max(story.stages[-1].results, key=lambda result: result.shot)
    guess = 100 / best.way
    said = (
        f"{story.stages[-1].name} gives {best} % of the queries the right one of {best.way} {story.unseen_class}es, "
        f"from {best.shot} labelled images a class; guessing gives {guess:.0f} %. Mean ± 95 % interval over "
        f"{best.episodes:,} episodes of {best.query} queries a class, head '{best.head}', seed {best.seed}. The same "
        "episodes for all rows. The interval is that of these classes, not of others."
    )
    rows = story.rows()
    header = ["network", *(f"{result.way}-way {result.shot}-shot" for result in story.stages[-1].results)]
    table = [header, *([name, *map(str, results)] for name, results in rows.items())]
    return PageSection("Result", said, table, figures=[(figures.accuracy_bars(rows), "Accuracy and its interval.")])


def _how(story: Story, seen: Images) -> PageSection:
    shown = {config.phase: config for config in story.configs}
    drawn = []
    pair = np.flatnonzero(seen.labels == np.bincount(seen.labels).argmax())[:2].tolist()
    for phase, config in shown.items():
        caption = f"{PHASES[phase]}. The teacher is a moving average of the student."
        drawn.append((phase_picture(seen, config, pair), caption))
    return PageSection(
        "How it learns", "The student sees parts of images, with some patches hidden (grey). It learns to say what a "
        "slow copy of itself, the teacher, says of whole views. Phase 1 needs no labels: both look at one image. "
        "Phase 2 lets them look at different images of one class, and pairs each patch with its match.", figures=drawn,
    )  # fmt: skip


def _episode(story: Story, images: Images, stage: Stage) -> PageSection:
    result = min(stage.results, key=lambda each: each.shot)
    number = typical_episode(result)
    rows = episode_tiles(images, stage.features, story.protocol, result.shot, number)
    right = float(result.accuracies[number])
    return PageSection(
        "One episode", f"Each row is one of {result.way} {story.unseen_class}es: first the labelled image that "
        f"{stage.name} learns it from ({result.shot} a class), then queries with the answer that each is given. "
        f"{right:.0f} % of this episode's queries are right, as in the mean; a wrong one of each class is shown if "
        "there is one.",
        tiles=[tile for row in rows for tile in row], columns=max(map(len, rows)),
    )  # fmt: skip


def _chosen(images: Images, count: int, each: int) -> list[int]:
    """Images of classes spread evenly over all, some of each."""
    total = len(images.class_names)
    classes = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int))
    return [int(row) for label in classes for row in np.flatnonzero(images.labels == label)[:each]]


def _correspondences(images: Images, pair: Sequence[Stage], kind: str) -> PageSection | None:
    classes = [label for label, count in enumerate(np.bincount(images.labels).tolist()) if count > 1]
    if not classes:
        return None
    drawn = []
    for label in dict.fromkeys((classes[len(classes) // 3], classes[2 * len(classes) // 3])):
        loaded = [images.load(int(row)) for row in np.flatnonzero(images.labels == label)[:2]]
        for stage in pair:
            picture, _, _ = drawn_matches(stage.encoder, loaded, DRAWN_MATCHES)
            drawn.append((picture, f"{images.class_names[label]}, {stage.name}: the {DRAWN_MATCHES} that add most."))
    return PageSection(
        "Patches that correspond", f"Two images of one {kind}. Each patch of the left image is matched with the "
        "patch of the right one whose feature is nearest; the matches with the largest attention times cosine are "
        "drawn. This is how phase 2 pairs patches in training.", figures=drawn,
    )  # fmt: skip


def _attention(images: Images, pair: Sequence[Stage]) -> PageSection:
    chosen = _chosen(images, LOOKED_AT, 1)
    tiles = []
    loaded = [images.load(row) for row in chosen]
    columns = [
        attention_tiles(stage.encoder, loaded, [images.class_names[images.labels[row]] for row in chosen], heads=False)
        for stage in pair
    ]
    width = len(columns[0]) // len(chosen)
    for place in range(len(chosen)):
        tiles.append(columns[0][place * width])
        for stage, of_stage in zip(pair, columns, strict=True):
            for tile in of_stage[place * width + 1 : (place + 1) * width]:
                tiles.append(tile._replace(caption=f"{stage.name}: {tile.caption}"))
    return PageSection(
        "Where [CLS] looks", "Attention of the [CLS] token over the patches of unseen images in the block that "
        "features are read from: the mean of all heads (bright is much), and the fewest patches that hold 60 % of it.",
        tiles=tiles, columns=1 + len(pair) * (width - 1),
    )  # fmt: skip


def _map(images: Images, pair: Sequence[Stage], kind: str) -> PageSection | None:
    chosen = np.array(_chosen(images, MAP_CLASSES, MAP_IMAGES))
    if len(chosen) < 3:
        return None
    known, labels = np.unique(images.labels[chosen], return_inverse=True)
    names = [images.class_names[label] for label in known]
    photographs = [picture(images.load(int(row))) for row in chosen]
    drawn = []
    for stage in pair:
        values: NDArray[np.float32] = stage.features.values[torch.from_numpy(chosen)].cpu().numpy()
        figure = embedding_figure(project(values), labels, names, photographs)
        drawn.append((embedding_image(figure), f"{stage.name}: {len(chosen)} images of {len(names)} {kind}es."))
    return PageSection(
        f"A map of {kind}es", "Features in the plane by t-SNE: images that are alike for the network are near "
        "each other, distances between groups mean nothing. Classes that lie apart can be told apart from few images.",
        figures=drawn,
    )  # fmt: skip


def _curves(story: Story) -> PageSection | None:
    curves = run_curves(story.names)
    drawn = [(curve.figure, curve.reading) for curve in curves.values()]
    return PageSection("Training", figures=drawn) if drawn else None


def _hardest(story: Story) -> PageSection | None:
    if not story.stages:
        return None
    result = max(story.stages[-1].results, key=lambda each: each.shot)
    return PageSection(
        "Hardest classes", f"{story.stages[-1].name}, {result.way}-way {result.shot}-shot: pairs of classes with the "
        "lowest mean accuracy of the episodes that have both, and the hardest episode.",
        figures.hardest_table(result), wordy=True,
        figures=[(figures.episode_distribution(result), "Accuracy of single episodes."),
                 (figures.confusion(result), "Queries of a class (row) that are given to another (column).")],
    )  # fmt: skip


def _settings(story: Story) -> PageSection:
    rows = [["run", "setting", "recipe -> run"]]
    for (name, run), config in zip(story.names.items(), story.configs, strict=True):
        if config.recipe not in loading.recipe_names():
            continue
        for line in loading.differences(loading.resolve(config.recipe), config):
            setting, _, change = line.partition(": ")
            rows.append([name, setting, change])
        rows += [[name, f"after step {step}", change] for step, change in read_history(run)]
    said = "" if len(rows) > 1 else "All settings are those of the recipes."
    return PageSection("Settings that differ from the recipe", said, rows if len(rows) > 1 else (), wordy=True)


def _environment(story: Story) -> PageSection:
    rows = [["run", "device", "smkd", "PyTorch", "Python", "revision"]]
    commands = []
    for name, run in story.names.items():
        try:
            env = json.loads((run / "env.json").read_text(encoding="utf-8"))
            rows.append([name, *(str(each or "") for each in (
                env["device"], env["smkd"], env["packages"]["torch"], env["python"], env["revision"],
            ))])  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError):
            rows.append([name, "unknown", "", "", "", ""])
        if (run / "command.txt").is_file():
            typed = (run / "command.txt").read_text(encoding="utf-8", errors="replace").splitlines()
            commands += [_as_typed(line) for line in dict.fromkeys(typed)]
    return PageSection("Environment and commands", table=rows, preformatted="\n".join(commands))


def _as_typed(command: str) -> str:
    """Without the place of the program."""
    program, space, rest = command.partition(" ")
    return ("smkd" if Path(program).name in ("smkd", "__main__.py") else program) + space + rest


def _next(story: Story) -> PageSection:
    return PageSection("What to do next", "\n".join(next_steps(story.runs[-1], story.configs[-1])))
