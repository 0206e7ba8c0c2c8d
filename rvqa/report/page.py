"""One self-contained HTML file: building markup that cannot be broken out of, the page around it, writing it.

Whatever is not `Html` is escaped where it enters markup, so names from untrusted files show as text. The page allows
its own style and its own script, by their hashes, and nothing else: no network, no other script.
"""

import base64
import hashlib
import html
import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import rvqa
from rvqa.io.files import require_writable, whole_file
from rvqa.report import colours
from rvqa.serving.asks import without_password

_VOID = frozenset({"meta", "br"})
_GENERATOR = "rvqa report"

DASH = "\u2013"
"""Stands where there is no number."""


class Html(str):
    """Markup that is safe as it is; only `el`, `text` and `join` make it."""

    __slots__ = ()


def text(value: Any) -> Html:
    """Value as markup: escaped, unless it is markup."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def join(parts: Iterable[Any]) -> Html:
    """Parts side by side."""
    return Html("".join(text(part) for part in parts))


def el(tag: str, *children: Any, **attributes: Any) -> Html:
    """One element; `class_` is class, `aria_label` aria-label, True a bare attribute, None and False none."""
    written = []
    for name, value in attributes.items():
        if value is not None and value is not False:
            name = name.rstrip("_").replace("_", "-")
            written.append(f" {name}" if value is True else f' {name}="{html.escape(str(value))}"')
    opened = f"<{tag}{''.join(written)}>"
    return Html(opened if tag in _VOID else f"{opened}{join(children)}</{tag}>")


def table(
    header: Sequence[Any], rows: Iterable[Sequence[Any]], *, caption: Any, strong: int | None = None, fit: bool = False
) -> Html:
    """Table whose first column names the rows; the others are numbers.

    Parameters
    ----------
    header, rows
        Cells, text or markup.
    caption
        What it shows.
    strong
        Row to stand out.
    fit
        No wider than its content.
    """
    head = el("tr", *(el("th", name, scope="col") for name in header))
    body = [
        el(
            "tr",
            el("th", row[0], scope="row"),
            *(el("td", cell) for cell in row[1:]),
            class_="strong" if at == strong else None,
        )
        for at, row in enumerate(rows)
    ]
    inner = el("table", el("caption", caption), el("thead", head), el("tbody", *body), class_="fit" if fit else None)
    return scroll(inner, "table, scrolls sideways where it is wider than the window")


def scroll(content: Html, label: str) -> Html:
    """Content that scrolls inside the page where it is wider, also from the keyboard."""
    return el("div", content, class_="scroll", tabindex="0", role="region", aria_label=label)


def number(value: float | None, digits: int = 3) -> str:
    """Rounded number; a dash for one that is not."""
    return DASH if value is None or value != value else f"{value:.{digits}f}"


def command_line() -> str:
    """The command that runs now, as a shell reads it."""
    name = Path(sys.argv[0]).name
    given = [without_password(each) if "://" in each else each for each in sys.argv[1:]]
    return shlex.join([*(["python", "-m", "rvqa"] if name == "__main__.py" else [name]), *given])


def is_report(path: str | Path) -> bool:
    """Tell whether a file is a report that rvqa wrote."""
    try:
        return f'content="{_GENERATOR}'.encode() in Path(path).read_bytes()[:1000]
    except OSError:
        return False


class Report:
    """Page that grows by sections and is written once.

    Parameters
    ----------
    title
        Heading of the page.
    lead
        One sentence on what was run.
    facts
        What stands under it, by name; rvqa's version and the date are added.
    command
        Command that made the results; None for none.
    """

    def __init__(self, title: str, *, lead: str, facts: Mapping[str, Any], command: str | None = None) -> None:
        self.title, self.lead, self.command = title, lead, command
        now = datetime.now().astimezone()
        self.facts = {**facts, "rvqa": rvqa.__version__, "Made": f"{now:%Y-%m-%d %H:%M %Z}"}
        self._sections: list[tuple[str, Html]] = []
        self._figures: list[dict[str, Any]] = []

    def figure(self, data: dict[str, Any]) -> int:
        """Keep what the script draws; its number goes into the canvas."""
        self._figures.append(data)
        return len(self._figures) - 1

    def add(self, heading: str, *blocks: Html) -> None:
        """Put a section at the end."""
        name = f"section-{len(self._sections) + 1}"
        self._sections.append((heading, el("section", el("h2", heading, id=name), *blocks, aria_labelledby=name)))

    def html(self) -> str:
        """Return the whole page."""
        style = colours.css() + files(__package__).joinpath("page.css").read_text(encoding="utf-8")
        script = files(__package__).joinpath("page.js").read_text(encoding="utf-8")
        policy = f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; img-src data:; "
        data = {"themes": colours.for_script(), "shapes": list(colours.SHAPES.values()), "figures": self._figures}
        head = el(
            "head",
            el("meta", charset="utf-8"),
            el("meta", name="generator", content=f"{_GENERATOR} {rvqa.__version__}"),
            el("meta", http_equiv="Content-Security-Policy", content=policy + "base-uri 'none'; form-action 'none'"),
            el("meta", name="viewport", content="width=device-width, initial-scale=1"),
            el("meta", name="color-scheme", content="light dark"),
            el("title", f"{self.title} | rvqa"),
            el("style", Html(style)),
        )
        body = el(
            "body",
            el("header", *self._header()),
            el("main", *(section for _, section in self._sections)),
            el("script", Html(_json(data)), type="application/json", id="data"),
            el("script", Html(script)),
        )
        return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"

    def write(self, path: str | Path, *, force: bool = False) -> None:
        """Write the page, whole or not at all.

        Raises
        ------
        rvqa.errors.InputError
            The file exists and `force` is not set, it is not named .html, or its folder is missing.
        """
        file = require_writable(path, force=force, suffix=".html")
        with whole_file(file) as scratch:
            scratch.write_bytes(self.html().encode("utf-8", "replace"))

    def _header(self) -> list[Html]:
        facts = [el("div", el("dt", name), el("dd", value)) for name, value in self.facts.items()]
        made = [el("p", "Made by", class_="label"), el("pre", el("code", self.command))] if self.command else []
        links = [
            el("li", el("a", heading, href=f"#section-{at}")) for at, (heading, _) in enumerate(self._sections, start=1)
        ]
        return [
            el("h1", self.title),
            el("p", self.lead, class_="lead"),
            el("dl", *facts, class_="facts"),
            *made,
            *([el("nav", el("ul", *links), aria_label="Sections")] if len(links) > 1 else []),
            el("noscript", el("p", "The scatter plots are drawn by this page's own script, which is switched off.")),
        ]


def _digest(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _json(data: Any) -> str:
    """JSON that is plain ASCII (so without U+2028) and cannot end or open a tag."""
    written = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return written.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
