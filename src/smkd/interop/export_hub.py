"""Backbones on the Hugging Face Hub: a folder with weights, settings and a model card, and the way there and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import huggingface_hub
from huggingface_hub import ModelCard, PyTorchModelHubMixin

from smkd.config import loading
from smkd.errors import CheckpointError
from smkd.interop import fetching, header, load, reading
from smkd.interop.export_card import model_card
from smkd.interop.export_place import CARD, WEIGHTS
from smkd.interop.export_timm import write_timm
from smkd.interop.header import Settings
from smkd.interop.release import Release, built, without_paths
from smkd.models.vit import VisionTransformer

FOREIGN_RECIPE = "folder-pretrain"
"""Settings of weights that bring none."""


def write_hub(release: Release, folder: Path, repository: str | None = None) -> None:
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
    # each version of the library has its own errors for the network
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(f"cannot push to '{repository}': {reason}; the folder is kept at '{folder}'") from error
    return f"https://huggingface.co/{name}"


class HubBackbone(VisionTransformer, PyTorchModelHubMixin, library_name="smkd"):
    """A backbone that knows where it comes from, with `save_pretrained`, `push_to_hub` and `from_pretrained`."""

    origin: Release
    """All that is known of it, with the weights as they were opened."""

    @classmethod
    def of(cls, release: Release) -> Self:
        """The backbone of a release, in evaluation mode."""
        weights = release.backbone.state_dict()
        made = cls.from_config(release.config.model, mask_token="mask_token" in weights)
        made.load_state_dict(weights)
        made.origin = release
        return made.eval()

    @classmethod
    def opened(cls, file: Path, source: str, heads: int | None = None) -> Self:
        """The backbone in a file of `smkd export`, or of another project's, whose number of heads may be given.

        Raises:
            CheckpointError: damaged, or not a ViT of a kind that this package has.
        """
        content = reading.read(file)
        state = load.imported(content, source, loading.resolve(FOREIGN_RECIPE), heads=heads, beside=file)
        config = loading.check(state["config"])
        start = "backbone."
        weights = {
            name.removeprefix(start): value for name, value in state["teacher"].items() if name.startswith(start)
        }
        about = Settings(name=Path(source).name, network="teacher", config=without_paths(config), source=source)
        if header.KEY in content:
            about = header.checked(content[header.KEY], source).model_copy(update={"config": about.config})
        return cls.of(Release(built(config.model, weights), about))

    def _save_pretrained(self, save_directory: Path) -> None:
        write_timm(replace(self.origin, backbone=self), save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> Self:
        if Path(model_id).is_dir():
            return cls.opened(fetching.locate(model_id), model_id)
        wanted = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        asked = {name: options[name] for name in wanted if name in options}
        return cls.opened(Path(huggingface_hub.hf_hub_download(model_id, WEIGHTS, **asked)), model_id)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card that `smkd export --to hub` writes."""
        return model_card(self.origin, kwargs.get("repository"))

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """See `huggingface_hub.ModelHubMixin.push_to_hub`."""
        return str(super().push_to_hub(repo_id, **{"model_card_kwargs": {"repository": repo_id}, **options}))
