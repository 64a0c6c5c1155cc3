"""The model card of a classifier: what it tells apart, how well, and with which backbone."""

from __future__ import annotations

import re

from huggingface_hub import ModelCard, ModelCardData

from smkd import __version__
from smkd.classify.classifier import ImageClassifier
from smkd.classify.encoder import Encoder
from smkd.publishing.classifier_graph import images_per_class, named_classes
from smkd.publishing.place import LIBRARY
from smkd.weights.architecture import Architecture
from smkd.weights.catalogue import APACHE, find
from smkd.weights.smkd_file import CLASSIFIER_FILE

REJECTS = (0.3, 0.5, 0.7)
"""Thresholds that the card says something of."""
TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

Tells {{ classes | length }} classes of photographs apart. smkd {{ version }} made it from {{ images }} labelled ones.

## Use

```
smkd predict {{ where }} photos --top 3 --reject 0.5
```

```python
from smkd import FewShotClassifier

classifier = FewShotClassifier.load("{{ where }}")
classifier.predict(["new.jpg"], reject=0.5)      # None is 'none of these'
```

`smkd export {{ file }} --to onnx` makes a program that needs neither smkd nor PyTorch.

## Classes

Right answers are those of photographs that were left out of learning in turn.

| class | images | right |
|---|---|---|
{% for class, count, right in classes %}| {{ class }} | {{ count }} | {{ right }} |
{% endfor %}
## Accuracy

{{ accuracy }}
{% for line in rejects %}
- {{ line }}{% endfor %}

## How it works

| | |
|---|---|
{% for key, value in parts %}| {{ key }} | {{ value }} |
{% endfor %}
Photographs are turned upright, laid over white where they are transparent, resized to {{ resize }} pixels on their
shorter side (bicubic) and cut to the centre square of {{ crop }}.

## Intended use and limits

Photographs like those that it was made from. The accuracy above is an estimate from these; measure it on others of
your own before you rely on it. The probabilities of the classes add up to 1 also for a photograph of none of them:
use `--reject`. The file holds numbers that were computed from the labelled photographs, and not the photographs.
"""


def classifier_card(classifier: ImageClassifier, name: str, repository: str | None) -> ModelCard:
    """The card of a classifier of images.

    Args:
        classifier: what was learned.
        name: what to call it.
        repository: where it is published, as 'owner/name'; None for a folder.
    """
    encoder, left = classifier.encoder_, classifier.left_out_
    assert encoder is not None
    names, counts = named_classes(classifier), images_per_class(classifier)
    right = [f"{each.right} of {each.images}" if each.images else "-" for each in left.by_class]
    where = f"hf:{repository}" if repository else "FOLDER"
    card: ModelCard = ModelCard.from_template(
        _data(encoder, name), template_str=TEMPLATE, name=_cell(name), version=__version__, images=sum(counts),
        where=where, file=f"{where}/{CLASSIFIER_FILE}" if repository else where,
        classes=list(zip(map(_cell, names), counts, right, strict=True)), accuracy=_accuracy(classifier),
        rejects=[f"`--reject {reject}` {said}" for reject in REJECTS if (said := left.threshold(reject))],
        parts=_parts(classifier, encoder), resize=encoder.config.resize, crop=encoder.config.crop,
    )  # fmt: skip
    return card


def _data(encoder: Encoder, name: str) -> ModelCardData:
    return ModelCardData(
        model_name=name, library_name=LIBRARY, license=_license_id(encoder.config.license),
        pipeline_tag="image-classification", tags=["few-shot-learning", "image-classification", "smkd"],
    )  # fmt: skip


def _license_id(license: str) -> str:
    """As the Hub has them; 'other' for one that it has not."""
    if license == APACHE:
        return "apache-2.0"
    return license if re.fullmatch(r"[a-z0-9.+-]+", license) else "other"


def _accuracy(classifier: ImageClassifier) -> str:
    left = classifier.left_out_
    if not left.images:
        return "Unknown: no class has two images, of which one could be left out."
    low, high = left.interval
    return (
        f"{100 * left.mean:.1f} % (95 % interval {100 * low:.1f} to {100 * high:.1f}), the mean over "
        f"{len(left.worst_first)} classes, of {left.images} photographs that were left out in turn."
    )


def _parts(classifier: ImageClassifier, encoder: Encoder) -> list[tuple[str, str]]:
    config = encoder.config
    if encoder.backbone is None or config.model is None:
        return [("backbone", "none: plain colours"), ("head", classifier.head_)]
    millions = sum(p.numel() for p in encoder.backbone.parameters()) / 1e6
    known = find(config.source)
    rows = {
        "backbone": _cell(config.source) or "of unknown origin",
        "its page": "" if known is None else known.page,
        "its licence": _cell(config.license),
        "trained on": "" if known is None else known.trained_on,
        "network": f"{Architecture.of(config.model)}, {millions:.3g} M parameters",
        "head": classifier.head_,
    }
    return [(key, value) for key, value in rows.items() if value]


def _cell(text: str) -> str:
    """Text that stays in its cell of a table."""
    return re.sub(r"([\\`*_|<>\[\]#])", r"\\\1", text)
