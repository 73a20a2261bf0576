"""``coordexp data render``: pictures of records with their objects drawn, and a page with the answer text beside each."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from coordexp.codec import CoordCodec
from coordexp.data.answers import record_instances
from coordexp.data.drawing import caption, class_color, ink, letters, paint
from coordexp.data.records import Record, open_image
from coordexp.data.rows import RecordObject
from coordexp.data.staging import atomic_text, staged_folder
from coordexp.grammar import render

_PAGE: Final = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem; color: #1a1a1a; background: #fff; }}
section {{ display: grid; grid-template-columns: minmax(0, 3fr) minmax(16rem, 2fr); gap: 1rem; margin: 0 0 2rem; }}
img {{ max-width: 100%; border: 1px solid #ccc; }}
h2 {{ font-size: 1rem; margin: 0 0 .4rem; overflow-wrap: anywhere; }}
ul {{ list-style: none; padding: 0; margin: .4rem 0; max-height: 22rem; overflow: auto; }}
li {{ margin: .2rem 0; }}
code {{ display: block; white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f4f4; padding: .6rem; font-size: 13px; }}
b {{ display: inline-block; min-width: 1.6em; padding: 0 .3em; margin-right: .5em; border-radius: 3px; text-align: center; }}
@media (max-width: 50rem) {{ section {{ grid-template-columns: 1fr; }} }}
</style>
<h1>{title}</h1>
{sections}
</html>
"""


def render_records(
    records: Sequence[Record],
    out: Path,
    *,
    title: str,
    predicted: Mapping[str, Sequence[RecordObject]] | None = None,
    codec: CoordCodec | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write ``out/NNNN.png`` and ``out/NNNN.txt`` (the answer) for every record in order, and ``out/index.html``.

    The pictures show the records' own pixels, and the ``predicted`` objects by image id, dashed; the answer is what training would
    teach, in bins of ``codec`` (``norm999``), crowds left out. ``out`` appears only when all is written.

    Raises:
        ConfigError: ``out`` is not empty.
        DataError: an image that cannot be used.
    """
    codec = codec or CoordCodec()
    sections = []
    with staged_folder(out) as folder:
        for number, record in enumerate(records, start=1):
            answer = render(record_instances(record, codec)[0]).text
            found = None if predicted is None else predicted.get(record.image_id, ())
            paint(open_image(record), record.objects, found or ()).save(folder / f"{number:04d}.png", compress_level=3)
            with atomic_text(folder / f"{number:04d}.txt") as file:
                file.write(answer + "\n")
            sections.append(_section(record, found, number, answer))
            if progress is not None:
                progress(number, len(records))
        with atomic_text(folder / "index.html") as file:
            file.write(_PAGE.format(title=html.escape(title), sections="\n".join(sections)))


def _section(record: Record, predicted: Sequence[RecordObject] | None, number: int, answer: str) -> str:
    heading = f"{html.escape(record.image_id)}, {record.width}×{record.height}, {len(record.objects)} objects"
    rows = "".join(_row(str(i), item) for i, item in enumerate(record.objects, start=1))
    listed = f"<ul>{rows}</ul>"
    if predicted is not None:
        listed += f"<h2>{len(predicted)} predicted</h2><ul>{''.join(_row(letters(i), item) for i, item in enumerate(predicted))}</ul>"
    alt = f"Image {html.escape(record.image_id, quote=True)} with its objects outlined"
    return (
        f'<section><div><img src="{number:04d}.png" alt="{alt}" loading="lazy"></div>'
        f"<div><h2>{heading}</h2>{listed}<code>{html.escape(answer)}</code></div></section>"
    )


def _row(tag: str, item: RecordObject) -> str:
    color = class_color(item.desc)
    return (
        f'<li><b style="background: rgb{color}; color: rgb{ink(color)}">{tag}</b>{html.escape(caption(item))}: {item.geometry} '
        f"{', '.join(f'{round(v, 2):g}' for v in item.values)}</li>"
    )
