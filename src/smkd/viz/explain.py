"""Why an answer was given: where [CLS] attends, and which patches match those of the nearest photograph."""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image

from smkd.classify.answers import Answer, Lesson
from smkd.classify.pictures import Pictures
from smkd.viz.patch_pictures import attention_picture, central_square, matches_picture
from smkd.viz.seen import Match, match_patches, see

MATCHES = 6
"""How many matches are drawn."""
NO_NETWORK = "Plain colours have no attention and no patches: give a network as --backbone to see them."


class Reasons(NamedTuple):
    """Pictures of an answer, and the matches that are drawn.

    Attributes:
        attention: attention of [CLS] over the query.
        matches: lines between patches of the query and of the nearest support photograph; None if no file of one is at
            hand.
        drawn: those matches, the largest contribution first.
        similarity: weighted sum of the cosines of all matches, from -1 to 1.
        caption: what `matches` shows.
    """

    attention: Image.Image
    matches: Image.Image | None
    drawn: list[Match]
    similarity: float
    caption: str

    @property
    def words(self) -> str:
        """What the matches say, in a sentence or two; empty without them."""
        if not self.drawn:
            return ""
        looked = 100 * sum(match.weight for match in self.drawn)
        cosines = "; ".join(f"{number}: {match.cosine:.2f}" for number, match in enumerate(self.drawn, start=1))
        return (
            f"The {len(self.drawn)} matches that add most to a patch-by-patch similarity of {self.similarity:.2f}, "
            f"which weighs each patch by its attention; these patches get {looked:.0f} % of it. Their cosines: "
            f"{cosines}."
        )


def reasons(lesson: Lesson, given: Answer) -> Reasons | None:
    """Pictures of why the query is like its nearest support photograph; None for a backbone of plain colours.

    Raises:
        DataError: one of the two can no longer be read.
    """
    encoder = lesson.encoder
    beside = next((each for each in given.neighbours if each.photo.path), None)
    pair = Pictures([given.photo.path, *([] if beside is None else [beside.photo.path])])
    images = [pair.load(number) for number in range(len(pair))]
    seen = see(encoder, images)
    if seen is None:
        return None
    squares = [central_square(image, encoder.config.resize, encoder.config.crop) for image in images]
    attention = attention_picture(squares[0], seen.attention[0], seen.grid)
    if beside is None:
        return Reasons(attention, None, [], 0.0, "")
    matches = match_patches(seen.patches[0], seen.patches[1], seen.attention[0])
    drawn = matches[:MATCHES]
    return Reasons(
        attention, matches_picture(squares[0], squares[1], drawn, seen.grid),
        drawn, sum(match.weight * match.cosine for match in matches),
        f"Patches of {given.photo.name} beside those of {beside.photo.name} ({beside.label}) that they match",
    )  # fmt: skip
