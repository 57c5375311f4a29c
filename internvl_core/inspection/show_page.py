"""A sample as one HTML file that needs nothing else: pictures inlined, every text escaped."""

import base64
import html
import io
import json
import os
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from string import Template

from PIL import Image

from internvl_core.data.encoding import Encoding
from internvl_core.data.records import IMAGE_TAG, VIDEO_TAG, Turn
from internvl_core.errors import DataError, Reason
from internvl_core.inspection.sample_view import Picture, SampleView, Token

PLAIN_WORDS = {
    Reason.RECORD: "The record does not say what a record must say.",
    Reason.NOT_JSON: "The line is not one JSON object.",
    Reason.ENCODING: "The text is damaged: its bytes or escapes are no characters.",
    Reason.LINE_TOO_LONG: "The line is far too long for a record.",
    Reason.TURNS: "The turns are not in order: an optional system turn, then human and gpt in turn.",
    Reason.NO_TARGET: "There is no answer to learn from.",
    Reason.TAGS: "The text has another number of placeholders than there are media.",
    Reason.CONTROL_TOKEN: "The text spells a token that steers the model, which text must not.",
    Reason.PATH: "A file's name leads out of the data set's folder, or is no name.",
    Reason.MISSING: "A file is not there.",
    Reason.MEDIA: "A file cannot be read as a picture or a video.",
    Reason.MEDIA_SIZE: "A picture or a video is absurdly small, large, long or thin.",
    Reason.SIZE_MISMATCH: "The picture is not as large as the record says.",
    Reason.TOO_LONG: "The sample is longer than the stage's limit. That is no fault; it is left out.",
    Reason.TOO_MANY_TILES: "The sample has more tiles than a pack holds. That is no fault; it is left out.",
}

_KINDS = {"text": "text", "image": "image", "multi_image": "images", "video": "video"}
_SIDES = {"system": "System", "human": "Human", "gpt": "Assistant"}
# Below it JPEG blurs what is to be looked at, and PNG is small.
_EXACT_SIDE_PX = 160
_SHOWN_WIDTH_PX, _SHOWN_HEIGHT_PX = 720, 560
_MAX_RAW_CHARACTERS = 20_000


def write_page(path: Path, view: SampleView, encoding: Encoding) -> None:
    """Write the page; a reader of the old one at that path sees either the old or the new."""
    page = Template(
        resources.files("internvl_core.inspection").joinpath("show.html").read_text(encoding="utf-8")
    ).substitute(
        title=html.escape(f"{view.meta.name}, line {view.line}"),
        place=html.escape(f"{view.meta.annotation}:{view.line}"),
        verdict=_write_verdict(view.problems),
        problems="".join(_write_problem(problem) for problem in view.problems),
        counts="".join(_write_counts(view)),
        sections="\n".join(_write_sections(view, encoding)),
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)


def _write_verdict(problems: Sequence[DataError]) -> str:
    if not problems:
        return '<span class="badge good">✓ trained on</span>'
    return f'<span class="badge bad">✗ left out: {html.escape(problems[0].reason.value.replace("_", " "))}</span>'


def _write_problem(problem: DataError) -> str:
    return (
        f'<div class="problem"><strong>{html.escape(PLAIN_WORDS[problem.reason])}</strong>'
        f"<p>{html.escape(str(problem))}</p></div>"
    )


def _write_counts(view: SampleView) -> Iterator[str]:
    if view.content is None:
        return
    yield _write_count("Kind", _KINDS[view.content.kind], f"{len(view.turns)} turns")
    if view.tokens is not None:
        share = view.num_learnt / max(view.num_tokens, 1)
        yield _write_count("Tokens", f"{view.num_tokens:,}", f"of at most {view.max_seq_length:,}")
        yield _write_count("Learnt", f"{view.num_learnt:,}", f"{share:.1%} of the tokens")
    if view.pictures:
        things = "frames" if view.content.video else "images" if len(view.pictures) > 1 else "image"
        limit = "" if view.max_tiles is None else f", of at most {view.max_tiles:,}"
        yield _write_count("Tiles", f"{view.num_tiles:,}", f"from {len(view.pictures)} {things}{limit}")
        yield _write_count("Image tokens", f"{view.num_image_tokens:,}", _tell_rate(view))


def _tell_rate(view: SampleView) -> str:
    return f"{view.num_image_tokens // max(view.num_tiles, 1)} a tile"


def _write_count(name: str, value: str, hint: str) -> str:
    return (
        f'<div class="tile"><dt>{name}</dt><dd class="value">{html.escape(value)}</dd>'
        f'<dd class="soft">{html.escape(hint)}</dd></div>'
    )


def _write_sections(view: SampleView, encoding: Encoding) -> Iterator[str]:
    if view.pictures:
        name = "Frames" if view.content and view.content.video else "Pictures"
        yield _write_section(name, _tell_pictures(view), "".join(_write_pictures(view, encoding.tiling.tile_size)))
    if view.turns:
        yield _write_section("Conversation", "As the template gets it.", "".join(map(_write_turn, view.turns)))
    if view.content is not None:
        yield _write_section("Tokens", *_write_tokens(view))
    yield _write_section("The line", "As it stands in the file.", f"<pre>{html.escape(_indent(view.raw))}</pre>")
    settings = json.dumps(encoding.to_json(), indent=2, ensure_ascii=False)
    yield _write_section("Settings", "What tokens and tiles follow from.", f"<pre>{html.escape(settings)}</pre>")


def _write_section(name: str, hint: str, body: str) -> str:
    return f'<section><h2>{name}</h2><p class="soft">{hint}</p>{body}</section>'


def _tell_pictures(view: SampleView) -> str:
    if view.content and view.content.video:
        clip = view.content.clip
        part = f", from {clip[0]:g} s to {clip[1]:g} s" if clip else ""
        return f"{html.escape(view.content.video)}{part}; the frames of the first epoch, a tile each."
    return "The lines show how a picture is cut; the numbers are the order in which the model reads the tiles."


def _write_pictures(view: SampleView, tile_size: int) -> Iterator[str]:
    if view.content and view.content.video:
        yield f'<div class="frames">{"".join(map(_write_frame, view.pictures))}</div>'
        return
    sizes: Sequence[tuple[int, int] | None] = (view.content and view.content.sizes) or [None] * len(view.pictures)
    for number, (picture, size) in enumerate(zip(view.pictures, sizes, strict=True), start=1):
        yield f'<div class="picture">{_write_picture(number, picture, size, tile_size)}</div>'


def _write_frame(picture: Picture) -> str:
    return f"<figure>{_write_image(picture.tiles[0], picture.title)}<figcaption>{picture.title}</figcaption></figure>"


def _write_picture(number: int, picture: Picture, said: tuple[int, int] | None, tile_size: int) -> str:
    assert picture.whole is not None
    assert picture.size is not None
    cells = picture.columns * picture.rows
    grid = "".join(f"<span><b>{cell}</b></span>" for cell in range(1, cells + 1))
    thumbnail = ""
    if picture.has_thumbnail:
        thumbnail = (
            f'<figure class="thumbnail">{_write_image(picture.tiles[-1], "thumbnail")}'
            f"<figcaption><b>{cells + 1}</b> thumbnail</figcaption></figure>"
        )
    tiles = "".join(_write_image(tile, f"tile {place}") for place, tile in enumerate(picture.tiles[:cells], start=1))
    columns = f"grid-template-columns: repeat({picture.columns}, 1fr)"
    width, height = picture.size
    is_other = said is not None and said != picture.size
    record = f" The record says {said[0]} × {said[1]} px." if is_other and said else ""
    return (
        f"<h3>Image {number} · {html.escape(picture.title)}</h3>"
        f'<p class="soft">{width} × {height} px → {_count_tiles(picture)} = {picture.num_tokens:,} tokens.{record}</p>'
        f'<div class="cut"><figure class="over" style="width: {_choose_width(picture.size)}px">'
        f"{_write_image(picture.whole, picture.title)}"
        f'<div class="grid" style="{columns}">{grid}</div></figure>{thumbnail}</div>'
        f"<details><summary>The tiles as the model reads them, {tile_size} × {tile_size} px each</summary>"
        f'<div class="mosaic" style="{columns}">{tiles}</div></details>'
    )


def _choose_width(size: tuple[int, int]) -> int:
    width, height = size
    return round(min(_SHOWN_WIDTH_PX, _SHOWN_HEIGHT_PX * width / height))


def _count_tiles(picture: Picture) -> str:
    cells = picture.columns * picture.rows
    if cells == 1:
        return "1 tile"
    thumbnail = " + thumbnail" if picture.has_thumbnail else ""
    return f"{picture.columns} × {picture.rows} tiles{thumbnail}"


def _write_image(image: Image.Image, title: str) -> str:
    buffer = io.BytesIO()
    is_small = max(image.size) <= _EXACT_SIDE_PX
    image.save(buffer, format="PNG" if is_small else "JPEG", **({} if is_small else {"quality": 88}))
    kind = "png" if is_small else "jpeg"
    content = base64.b64encode(buffer.getvalue()).decode()
    css = ' class="small"' if is_small else ""
    return f'<img{css} alt="{html.escape(title)}" src="data:image/{kind};base64,{content}">'


def _write_turn(turn: Turn) -> str:
    side = turn["from"]
    text = html.escape(turn["value"])
    for tag in (IMAGE_TAG, VIDEO_TAG):
        text = text.replace(html.escape(tag), f"<mark>{html.escape(tag)}</mark>")
    body = text or '<span class="soft">(empty)</span>'
    return f'<div class="turn {side}"><div class="side">{_SIDES[side]}</div><p>{body}</p></div>'


def _write_tokens(view: SampleView) -> tuple[str, str]:
    if view.tokens is None:
        reason = (
            "The record cannot be encoded, see above." if view.problems else "No tokenizer was given: add --tokenizer."
        )
        return reason, ""
    legend = (
        '<p class="legend"><span class="token learnt">learnt</span> the loss counts it '
        '<span class="token">read</span> the model only reads it '
        '<span class="token control">control</span> a token that no text may spell</p>'
    )
    body = "".join(_write_token(token, view.max_seq_length) for token in view.tokens)
    return "Point at one for its place and its id.", f'{legend}<div class="tokens">{body}</div>'


def _write_token(token: Token, max_seq_length: int) -> str:
    limit = ""
    if token.position <= max_seq_length < token.position + token.count:
        limit = f'<span class="limit">max_seq_length {max_seq_length:,}</span>'
    classes = ["token", *(["learnt"] if token.is_learnt else []), *(["control"] if token.is_control else [])]
    times = f"<i>× {token.count:,}</i>" if token.count > 1 else ""
    line_end = "<br>" if "\n" in token.text else ""
    title = html.escape(f"{token.position}: id {token.token_id}, {token.name}{', learnt' if token.is_learnt else ''}")
    return f'{limit}<span class="{" ".join(classes)}" title="{title}">{_spell(token.text)}{times}</span>{line_end}'


def _spell(text: str) -> str:
    """Make white space visible; nothing stands for the rest of a character."""
    if not text:
        return "…"
    return html.escape(text).replace(" ", "·").replace("\n", "↵").replace("\t", "⇥")


def _indent(raw: bytes) -> str:
    text = raw.decode(errors="backslashreplace").strip()
    if len(text) > _MAX_RAW_CHARACTERS:
        return f"{text[:_MAX_RAW_CHARACTERS]}\n... {len(text) - _MAX_RAW_CHARACTERS:,} more characters"
    try:
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return text
