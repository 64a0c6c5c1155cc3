"""Backbones on the Hugging Face Hub: weights, settings and a model card in a folder, there and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import huggingface_hub
from huggingface_hub import EvalResult, ModelCard, ModelCardData, PyTorchModelHubMixin
from huggingface_hub.utils import HfHubHTTPError, HFValidationError  # type: ignore[attr-defined]

from smkd import __version__
from smkd.config import loading
from smkd.data.datasets import configured_spec
from smkd.errors import CheckpointError
from smkd.models.vit import VisionTransformer
from smkd.publishing.backbone import PublishedBackbone, without_paths
from smkd.publishing.place import CARD, LIBRARY, WEIGHTS
from smkd.publishing.timm import write_timm
from smkd.weights import fetch, load, read, smkd_file
from smkd.weights.architecture import Architecture
from smkd.weights.rename import BACKBONE, without_prefix
from smkd.weights.smkd_file import BackboneInfo, Score

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


def model_card(release: PublishedBackbone, repository: str | None) -> ModelCard:
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


def _data(release: PublishedBackbone) -> ModelCardData:
    about = release.about
    return ModelCardData(
        model_name=about.name, library_name=LIBRARY, license=about.license, pipeline_tag="image-feature-extraction",
        tags=["few-shot-learning", "vision-transformer", "smkd", "timm"],
        eval_results=[_result(score) for score in about.scores] or None,
    )  # fmt: skip


def _result(score: Score) -> EvalResult:
    return EvalResult(
        task_type="image-classification", dataset_type=score.dataset, dataset_name=score.dataset,
        dataset_split=score.split, metric_type="accuracy", metric_value=score.value,
        metric_name=f"{score.name}: {_accuracy(score)} ({score.conditions})",
    )  # fmt: skip


def _training(release: PublishedBackbone) -> list[tuple[str, str]]:
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


REFUSALS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError, HFValidationError, RuntimeError)
"""What the Hub's library raises: errors of its HTTP client, another one in each version (requests' own are `OSError`),
of names, and of the uploader of large files, which has none of its own."""


def write_hub(release: PublishedBackbone, folder: Path, repository: str | None = None) -> None:
    """Fill a folder; with the repository's name, 'owner/name', the card says how to load it from there."""
    write_timm(release, folder)
    model_card(release, repository).save(folder / CARD)


def push(folder: Path, repository: str) -> str:
    """Put a folder into a repository of the Hub, which is made if it is not there; returns its address.

    Raises:
        CheckpointError: not logged in, not allowed, no such owner, or no network.
    """
    api = huggingface_hub.HfApi()
    try:
        name = api.create_repo(repository, exist_ok=True).repo_id
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="smkd export")
    except REFUSALS as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(f"cannot push to '{repository}': {reason}; the folder is kept at '{folder}'") from error
    return f"https://huggingface.co/{name}"


class HubBackbone(VisionTransformer, PyTorchModelHubMixin, library_name="smkd"):
    """A backbone that knows where it comes from, with `save_pretrained`, `push_to_hub` and `from_pretrained`."""

    about: BackboneInfo
    """All that is known of it besides its weights."""

    @classmethod
    def opened(cls, file: Path, source: str, heads: int | None = None) -> Self:
        """The backbone in a file of `smkd export`, or of another project's, whose number of heads may be given.

        Raises:
            CheckpointError: damaged, or not a ViT of a kind that this package has.
        """
        content = read.read_weights(file)
        state = load.imported(content, source, loading.resolve(load.FOREIGN_RECIPE), heads=heads, beside=file)
        config = loading.check(state["config"])
        about = BackboneInfo(name=Path(source).name, network="teacher", config=without_paths(config), source=source)
        if smkd_file.KEY in content:
            about = smkd_file.backbone_info(content[smkd_file.KEY], source).model_copy(update={"config": about.config})
        made = cls.with_weights(config.model, without_prefix(state["teacher"], BACKBONE))
        made.about = about
        return made

    def _save_pretrained(self, save_directory: Path) -> None:
        write_timm(PublishedBackbone(self, self.about), save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> Self:
        if Path(model_id).is_dir():
            return cls.opened(fetch.locate_weights(model_id), model_id)
        wanted = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        asked = {name: options[name] for name in wanted if name in options}
        return cls.opened(Path(huggingface_hub.hf_hub_download(model_id, WEIGHTS, **asked)), model_id)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card that `smkd export --to hub` writes."""
        return model_card(PublishedBackbone(self, self.about), kwargs.get("repository"))

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """See `huggingface_hub.ModelHubMixin.push_to_hub`."""
        return str(super().push_to_hub(repo_id, **{"model_card_kwargs": {"repository": repo_id}, **options}))
