"""The model card of a published backbone."""

from __future__ import annotations

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from smkd import __version__
from smkd.data.datasets import configured_spec
from smkd.interop.architecture import Architecture
from smkd.interop.header import Score
from smkd.interop.release import Release

PHASES = {
    "pretrain": "phase 1, self-supervised (iBOT: views of one image, masked patches)",
    "distill": "phase 2, supervised masked knowledge distillation (pairs of images of one class)",
}
TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

A Vision Transformer for few-shot image classification: {{ architecture }}.
{% if source %}Its weights are those of {{ source }}; their makers say which data and which licence.
{% else %}Trained with smkd, which follows Supervised Masked Knowledge Distillation (below).
{% endif %}
## Use

```python
import smkd

backbone = smkd.from_pretrained("{{ where }}")
tokens = backbone(images)  # images: float32 [n, 3, {{ crop }}, {{ crop }}], normalised as below
```

A classifier from a few labelled photographs: `smkd fit SUPPORT_DIR -o clf.smkd --backbone {{ backbone }}`.
In timm: `timm.create_model("{{ timm }}", pretrained=True)`.

Images are resized to {{ resize }} pixels on their shorter side (bicubic), cut to the centre square of {{ crop }},
scaled to 0-1 and normalised with mean {{ mean }} and standard deviation {{ std }}.
{% if training %}
## Training

| | |
|---|---|
{% for key, value in training %}| {{ key }} | {{ value }} |
{% endfor %}{% endif %}
## Accuracy

{% if scores %}In percent, mean over episodes with its 95 % interval; no class of val or test was trained on.

| classes | task | accuracy | measured with |
|---|---|---|---|
{% for place, task, accuracy, conditions in scores %}| {{ place }} | {{ task }} | {{ accuracy }} | {{ conditions }} |
{% endfor %}{% else %}None was recorded for these weights.
{% endif %}
## Intended use and limits

Features for telling classes apart of which only a few labelled images exist. On pictures of another kind than those of
its training, measure it before you rely on it. Accuracies are means over many small tasks; a single task can be far
from them. The network itself does not know when a picture is of none of the classes.

## Citation

```bibtex
{{ citation }}
```
"""
CITATION = """\
@inproceedings{lin2023smkd,
  title     = {Supervised Masked Knowledge Distillation for Few-Shot Transformers},
  author    = {Lin, Han and Han, Guangxing and Ma, Jiawei and Huang, Shiyuan and Lin, Xudong and Chang, Shih-Fu},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2023}
}
@inproceedings{zhou2022ibot,
  title     = {{iBOT}: Image {BERT} Pre-Training with Online Tokenizer},
  author    = {Zhou, Jinghao and Wei, Chen and Wang, Huiyu and Shen, Wei and Xie, Cihang and Yuille, Alan and
               Kong, Tao},
  booktitle = {International Conference on Learning Representations},
  year      = {2022}
}"""


def model_card(release: Release, repository: str | None) -> ModelCard:
    """The card of a backbone.

    Args:
        release: what is known of it.
        repository: where it is published, as 'owner/name'; None for a folder.
    """
    config, about = release.config, release.about
    protocol, spec = config.evaluation, configured_spec(config.data)
    where = repository or "FOLDER"
    card: ModelCard = ModelCard.from_template(
        _data(release), template_str=TEMPLATE, name=about.name, source=about.source, citation=CITATION,
        architecture=Architecture.of(config.model), where=where, backbone=f"hf:{where}" if repository else where,
        timm=f"hf-hub:{where}" if repository else f"local-dir:{where}", resize=protocol.resize, crop=protocol.crop,
        mean=_numbers(spec.mean), std=_numbers(spec.std), training=[] if about.source else _training(release),
        scores=[(f"{s.dataset} {s.split}", s.name, _accuracy(s), s.conditions) for s in about.scores],
    )  # fmt: skip
    return card


def _data(release: Release) -> ModelCardData:
    about = release.about
    return ModelCardData(
        model_name=about.name, library_name="smkd", license=about.license, pipeline_tag="image-feature-extraction",
        tags=["few-shot-learning", "vision-transformer", "smkd", "timm"],
        eval_results=[_result(score) for score in about.scores] or None,
    )  # fmt: skip


def _result(score: Score) -> EvalResult:
    return EvalResult(
        task_type="image-classification", dataset_type=score.dataset, dataset_name=score.dataset,
        dataset_split=score.split, metric_type="accuracy", metric_value=score.value,
        metric_name=f"{score.name}: {_accuracy(score)} ({score.conditions})",
    )  # fmt: skip


def _training(release: Release) -> list[tuple[str, str]]:
    config, millions = release.config, sum(p.numel() for p in release.backbone.parameters()) / 1e6
    views, local = config.global_views, config.local_views
    rows = {
        "data set": config.data.name,
        "recipe": config.recipe,
        "phase": PHASES[config.phase],
        "started from": "" if config.init is None else str(config.init),
        "epochs": f"{config.epochs}, {config.batch_size} images a step",
        "views": f"{views.count} of {views.size} pixels, {local.count} of {local.size}",
        "seed": str(config.seed),
        "network": f"{release.about.network}, {millions:.3g} M parameters",
        "written by": f"smkd {__version__}",
    }
    return [(key, value) for key, value in rows.items() if value]


def _accuracy(score: Score) -> str:
    return f"{score.value:.2f}" + (" (no interval recorded)" if score.ci95 is None else f" ± {score.ci95:.2f}")


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
