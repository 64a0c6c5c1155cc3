"""Every setting is explained: in docs/settings.md, and in the recipe that `smkd recipes show --explain` prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from command_line import smkd
from smkd.config import loading
from smkd.config.schema import Fraction, Positive
from smkd.reference.settings_page import page, settings, type_in_words

ROOT = Path(__file__).parents[1]


def flat(values: dict[str, Any], prefix: str = "") -> list[str]:
    return [
        key
        for name, value in values.items()
        for key in (flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [prefix + name])
    ]


def test_every_setting_has_a_sentence() -> None:
    told = settings()
    assert set(flat(loading.resolve("debug-distill").model_dump(mode="json"))) <= set(told)
    for each in told.values():
        assert each.meaning.endswith("."), each.key
        assert "None" not in each.type + each.default
    assert told["optim.lr"].default == "0.0005"
    assert told["optim.lr"].type == "number above 0"
    assert told["global_views.scale"].meaning == told["local_views.scale"].meaning
    assert told["head.num_prototypes"].reference == ("out_dim",)


def test_the_page_is_up_to_date() -> None:
    made = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert made == page(), "python -m smkd.reference.settings_page > docs/settings.md"


@pytest.mark.parametrize("name", loading.recipe_names())
def test_an_explained_recipe_is_that_recipe(name: str, tmp_path: Path) -> None:
    shown = smkd("recipes", "show", name, "--explain").stdout
    (tmp_path / "mine.yaml").write_text(shown)
    assert loading.load_config(tmp_path / "mine.yaml") == loading.resolve(name)
    assert "# Peak learning rate, used as given" in shown
    assert max(map(len, shown.splitlines())) <= 120


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (Fraction, "number from 0 to 1"),
        (Annotated[float, Field(gt=0, lt=1)], "number above 0 below 1"),
        (Positive | None, "whole number from 1 or none"),
        (bool | Literal["auto"], "true or false or auto"),
        (tuple[Fraction, ...], "list: number from 0 to 1"),
        (tuple[float, float], "list of 2: number"),
        (dict[str, float], "by name: number"),
        (Literal["a", "b", "c"], "a, b or c"),
    ],
)
def test_types_in_words(annotation: Any, words: str) -> None:
    assert type_in_words(annotation) == words
