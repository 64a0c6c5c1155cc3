"""Functions that settings name: built in, announced by an installed package, or registered in this process."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

from smkd.errors import ConfigError
from smkd.files import nearest


class Registry:
    """Callables of one kind by name; the first of built-in, registered and announced ones counts.

    Args:
        kind: what messages call one of them.
        group: entry point group under which packages announce theirs.
        builtin: names of this package's, each with its place as 'module:name'.
        taken: names that are in use for something else, and are refused.
    """

    def __init__(self, kind: str, group: str, builtin: Mapping[str, str], taken: Sequence[str] = ()) -> None:
        self.kind, self.group, self.builtin, self.taken = kind, group, dict(builtin), taken
        self.registered: dict[str, Callable[..., Any]] = {}

    def register(self, name: str, made: Callable[..., Any]) -> None:
        """Give something a name in this process; the same name again replaces what was registered.

        Raises:
            ConfigError: this package uses the name itself.
        """
        if name in self.builtin or name in self.taken:
            raise ConfigError(f"{self.kind} '{name}' is smkd's own; give yours another name")
        self.registered[name] = made

    def names(self) -> list[str]:
        """All known names: built in, then registered, then announced."""
        announced = sorted(point.name for point in entry_points(group=self.group))
        known = dict.fromkeys([*self.builtin, *self.registered, *announced])
        return [name for name in known if name not in self.taken]

    def check(self, name: str) -> None:
        """Refuse an unknown name.

        Raises:
            ConfigError: the name is unknown; names the nearest.
        """
        if name in self.builtin or name in self.registered:
            return
        known = self.names()
        if name not in known:
            raise ConfigError(
                f"{self.kind} '{name}' is unknown{nearest(name, known)} (known: {', '.join(known) or 'none'})"
            )

    def load(self, name: str) -> Callable[..., Any]:
        """The function that a name stands for.

        Raises:
            ConfigError: the name is unknown, or the package that announces it cannot be imported.
        """
        self.check(name)
        made: Callable[..., Any]
        if name in self.builtin:
            made = pkgutil.resolve_name(self.builtin[name])
        elif name in self.registered:
            made = self.registered[name]
        else:
            point = next(point for point in entry_points(group=self.group) if point.name == name)
            try:
                made = point.load()
            except (ImportError, AttributeError) as error:
                raise ConfigError(f"{self.kind} '{name}' ({point.value}) cannot be imported: {error}") from error
        return made


matchings = Registry(
    "patch matching", "smkd.matchings",
    {"paper": "smkd.objectives.patch:match_paper", "reference": "smkd.objectives.patch:match_reference"},
)  # fmt: skip
# its own terms, and what else a line of the log holds
TAKEN = ("cls", "mim", "patch", "supervised", "loss", "lr", "images_per_second", "kind", "step", "time")
terms = Registry("term", "smkd.terms", {}, taken=TAKEN)


def register_matching(name: str, matching: Callable[..., Any]) -> None:
    """Make a patch matching known to `objective.patch.matching` in this process (docs/extending.md).

    Args:
        name: for the setting.
        matching: called with the student's patch tokens [global, batch, patches, dim], the teacher's
            [global, images, patches, dim], the pairs of images (bool [images, batch] on the CPU) and the teacher's
            attention [global, images, patches] or None; returns `smkd.objectives.patch_entropy.Matches`.

    Raises:
        ConfigError: the name is one of smkd's own.
    """
    matchings.register(name, matching)


def register_term(name: str, term: Callable[..., Any]) -> None:
    """Make a term of the loss known to `objective.terms` in this process (docs/extending.md).

    Args:
        name: for the setting, and for the log.
        term: called with the student's and the teacher's `smkd.models.pair.Outputs`, the masks (bool [global, batch,
            rows, columns]) and the labels (int64 [batch]), both on the CPU; returns a scalar mean in float32 and how
            many things it is the mean of, 0 if there was nothing. Its attribute `needs` names what it uses beside the
            logits of [CLS]: 'patches', 'tokens', 'attention'.

    Raises:
        ConfigError: the name is one of smkd's own.
    """
    terms.register(name, term)
