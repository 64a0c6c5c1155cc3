"""The layout of the page: its components, and the functions of `events` that they call."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from smkd.app import events
from smkd.app.support import Group, Support
from smkd.classify.choose_features import Reader
from smkd.classify.encoder import Encoder

REJECT = 0.3
"""Below the even 0.5: most photographs that are tried are of a known class."""
TOP = 5
THEME = gr.themes.Soft(
    primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], text_size="md"
).set(
    # contrasts of 4.5 to 1 and more
    block_label_text_color="*primary_700", block_title_text_color="*primary_700",
    block_info_text_color="*neutral_600", body_text_color_subdued="*neutral_600",
    button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700",
)  # fmt: skip
# an event reads the state of the page and writes it back: of two at a time, one would undo what the other did
TURNS: dict[str, Any] = {"concurrency_id": "state", "concurrency_limit": 1}
_when = partial(gr.on, **TURNS)
CSS = """
.gradio-container { max-width: 1320px !important; width: 100% !important; margin: 0 auto !important; }
.gradio-container main { width: 100%; }
#classes { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 280px), 1fr)); gap: 14px; }
.card { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 10px; }
/* labels above pictures instead of over them, and no empty space below */
.block > label.float { position: static; width: fit-content; margin: 6px 0 6px 6px; }
.grid-wrap { min-height: 0 !important; padding-top: 0 !important; }
.grid-container { padding-top: 0 !important;
                  grid-template-columns: repeat(auto-fill, minmax(max(var(--thumb, 70px), 18%), 1fr)) !important; }
.gallery-container:has(input) .grid-container { padding-top: 30px !important; }
#tried, #nearest { --thumb: 84px; }
.card .grid-wrap { max-height: 320px; overflow-y: auto; }
/* on a telephone the answers are above the photographs */
@media (max-width: 700px) { #answers-beside { order: -1; } }
.block:has(> .gallery-container) { position: relative; }
.gallery-container { position: static !important; }
.caption-label { font-size: .75rem !important; max-width: calc(100% - 8px) !important; white-space: normal !important; }
.said:not(:has(p)) { display: none; }
.said p { margin: 0; padding: .55rem .8rem; border-radius: 8px; background: var(--background-fill-secondary);
          border-left: 4px solid var(--color-accent); color: var(--body-text-color); overflow-wrap: anywhere; }
.said ul.shares { columns: 14rem; margin: .5rem 0 0; font-size: .9rem; } .said li { overflow-wrap: anywhere; }
.said p.wrong { border-left-color: #d33; }
.answer { font-size: 1.3rem; overflow-wrap: anywhere; } .answer strong { font-weight: 650; }
.answer small { display: block; font-size: .9rem; color: var(--body-text-color-subdued); }
"""


def build_page(reader: Reader, start: Support, place: Path, about: str) -> gr.Blocks:
    """The page.

    Args:
        reader: of the backbone of every classifier.
        start: classes that are there when the page opens.
        place: folder for files of the page.
        about: a sentence about the backbone.
    """
    encoder = reader.encoder
    page: gr.Blocks = gr.Blocks(title="smkd", analytics_enabled=False, delete_cache=(3600, 86400))
    with page:
        support, lesson, queries, chosen = gr.State(start), gr.State(None), gr.State(()), gr.State(0)
        # cards are made anew only when this changes: an event of a card that is gone would be an error
        drawn = gr.State(0)
        gr.Markdown(
            f"# A classifier from a few photographs\n{about} The photographs stay on the machine that runs smkd."
        )

        gr.Markdown("## 1. Photographs of each class")
        gr.render([support], [page.load, drawn.change], **TURNS)(partial(_cards, encoder, support, drawn))
        with gr.Row():
            more = gr.Button("Add a class", min_width=140)
            packed = gr.UploadButton("Add a zip of class folders", file_types=[".zip"], min_width=140)
        said = gr.HTML(elem_classes="said")
        _when(more.click, events.add_class, [support, drawn], [support, drawn])
        added = _when(
            packed.upload, partial(events.add_zip, encoder, place), [packed, support, drawn], [support, drawn, said]
        )

        gr.Markdown("## 2. Learn")
        button = gr.Button("Learn", variant="primary", elem_id="learn")
        learned = gr.HTML(elem_classes="said", elem_id="learned")
        download = gr.DownloadButton("Download the classifier", visible=False, elem_id="download")
        taught = partial(events.press_learn, reader, place)
        before, after = [support, lesson, download], [lesson, learned, download]
        _when(button.click, taught, before, after)
        # a folder or a zip brings classes that are complete
        for happens in (page.load, added.then):
            happens(partial(taught, ready=True), before, after, **TURNS)

        gr.Markdown("## 3. Try photographs")
        with gr.Row(elem_id="try"):
            with gr.Column(min_width=300):
                tried = _gallery("Photographs to classify", elem_id="tried")
                reject = gr.Slider(
                    0, 1, REJECT, step=0.05, label="None of these, if the chance of any class is below",
                    info="0 never; 0.5 where a known and an unknown class are as likely; 1 nearly always",
                )  # fmt: skip
                weighed = gr.HTML(elem_classes="said", elem_id="threshold")
                refused = gr.HTML(elem_classes="said")
                table = gr.DownloadButton("Download the answers (CSV)", visible=False, elem_id="answers")
            with gr.Column(min_width=300, elem_id="answers-beside"):
                answered = gr.HTML(elem_classes="answer", elem_id="answer")
                chances = gr.Label(
                    label="Probability of each class", num_top_classes=TOP, show_heading=False, visible=False
                )
        shown = [answered, chances, *_reasons()]
        _when(
            [tried.upload, tried.delete, tried.change], partial(events.take, encoder), [tried, queries],
            [queries, tried, refused], trigger_mode="always_last",
        )  # fmt: skip
        given = [lesson, queries, reject]
        # of the slider not `release`, which keys do not give
        _when(
            [queries.change, lesson.change, reject.change], events.show, [chosen, *given], [tried, *shown],
            trigger_mode="always_last",
        )  # fmt: skip
        _when(
            [lesson.change, reject.change], events.threshold, [lesson, reject], [weighed], trigger_mode="always_last",
            show_progress="hidden",
        )  # fmt: skip
        _when(
            [queries.change, lesson.change, reject.change], partial(events.save_answers, place), [*given, table],
            [table], trigger_mode="always_last", show_progress="hidden",
        )  # fmt: skip
        # a press while another is being answered would be dropped, and the gallery does not tell it twice
        _when(tried.select, events.press, given, [chosen, tried, *shown], trigger_mode="multiple")
    return page


def _gallery(label: str, **options: Any) -> gr.Gallery:
    """A place to drop photographs, which shows them."""
    # any file may come: reading it says in one line what is wrong with it, the browser's own refusal does not
    return gr.Gallery(
        label=label, type="filepath", file_types=["file"], sources=["upload", "clipboard"], height="auto",
        object_fit="cover", allow_preview=False, buttons=[], interactive=True, **options,
    )  # fmt: skip


def _reasons() -> list[Any]:
    """Components that say why."""
    nearest = gr.Gallery(
        label="Nearest photographs, with the cosine of the features", height="auto", object_fit="cover",
        interactive=False, buttons=[], visible=False, elem_id="nearest",
    )  # fmt: skip
    with gr.Row():
        attention = gr.Image(
            label="Attention of [CLS]", interactive=False, buttons=["fullscreen"], visible=False, min_width=300,
            scale=2, elem_id="attention",
        )  # fmt: skip
        with gr.Column(min_width=300, scale=4):
            matches = gr.Image(
                label="Matched patches, to the right the nearest photograph", interactive=False,
                buttons=["fullscreen"], visible=False, elem_id="matches",
            )  # fmt: skip
            words = gr.HTML(elem_id="words")
    return [nearest, attention, matches, words]


def _cards(encoder: Encoder, state: gr.State, drawn: gr.State, support: Support) -> None:
    """A card a class: its name, its photographs, and a button that removes it."""
    with gr.Row(elem_id="classes"):
        for group in support.groups:
            with gr.Column(min_width=0, elem_classes="card"):
                _card(encoder, state, drawn, group)


def _card(encoder: Encoder, state: gr.State, drawn: gr.State, group: Group) -> None:
    key = group.number
    name = gr.Textbox(group.name, label=f"Name of class {key}", max_lines=1, interactive=True)
    photos = _gallery(events.photographs(group.name), value=[photo.path for photo in group.photos])
    said = gr.HTML(elem_classes="said")
    remove = gr.Button(events.removal(group.name), size="sm")
    _when(
        [name.submit, name.blur], partial(events.rename_class, key), [name, state], [state, photos, remove, said],
        show_progress="hidden", trigger_mode="always_last",
    )  # fmt: skip
    _when(
        [photos.upload, photos.delete, photos.change], partial(events.set_photos, encoder, key), [photos, state],
        [state, photos, said], show_progress_on=photos, trigger_mode="always_last",
    )  # fmt: skip
    _when(remove.click, partial(events.remove_class, key), [state, drawn], [state, drawn])
