"""Colours and marker shapes of the figures, for readers with any colour vision, on light and on dark ground.

Series are told apart by shape as well as by hue: the first eight have eight shapes, and all pairs of shape and
hue of the first 64 differ. Sequential scales have one hue and go one way in lightness. Contrast is WCAG's.
"""

INK, GROUND = "#1b1f24", "#ffffff"
THEMES = {
    "light": {
        "ink": INK,
        "muted": "#57606a",
        "ground": GROUND,
        "panel": "#ffffff",
        "line": "#d0d7de",
        "link": "#0b5394",
    },
    "dark": {
        "ink": "#e6e8eb",
        "muted": "#a3adb8",
        "ground": "#0f1419",
        "panel": "#161c23",
        "line": "#39424d",
        "link": "#8cc4ff",
    },
}

OKABE_ITO = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#000000")
"""Okabe and Ito's palette; on dark ground its black is a light grey."""

SHAPES = {
    "circle": "M-1 0A1 1 0 1 0 1 0A1 1 0 1 0 -1 0Z",
    "square": "M-.9 -.9H.9V.9H-.9Z",
    "triangle": "M0 -1.2L1.15 .85H-1.15Z",
    "diamond": "M0 -1.3L1.1 0L0 1.3L-1.1 0Z",
    "inverted triangle": "M0 1.2L1.15 -.85H-1.15Z",
    "plus": "M-.42 -1.2H.42V-.42H1.2V.42H.42V1.2H-.42V.42H-1.2V-.42H-.42Z",
    "cross": "M-1.15 -.6L-.6 -1.15L0 -.55L.6 -1.15L1.15 -.6L.55 0L1.15 .6L.6 1.15L0 .55L-.6 1.15L-1.15 .6L-.55 0Z",
    "hourglass": "M-1.05 -1.1H1.05L-1.05 1.1H1.05Z",
}
"""SVG paths of about one unit in radius."""

SEQUENTIAL = (
    "#f7fbff",
    "#deebf7",
    "#c6dbef",
    "#9ecae1",
    "#6baed6",
    "#4292c6",
    "#2171b5",
    "#08519c",
    "#08306b",
)
"""Blues from least to most on light ground; on dark ground the other way round."""


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb`, 0 to 1."""
    channels = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def series(at: int) -> tuple[int, int]:
    """Hue and shape of a series, as positions in `OKABE_ITO` and `SHAPES`."""
    turn, hue = divmod(at, len(OKABE_ITO))
    return hue, (hue + turn) % len(SHAPES)


def fills(theme: str) -> list[str]:
    """Marker colours of a theme."""
    return [("#e8e8e8" if theme == "dark" and colour == "#000000" else colour) for colour in OKABE_ITO]


def outline(colour: str, theme: str) -> str:
    """The colour, mixed with ink until it stands out from the panel (contrast 3)."""
    ink, panel = THEMES[theme]["ink"], THEMES[theme]["panel"]
    for step in range(0, 21):
        mixed = _mix(colour, ink, step / 20)
        if contrast(mixed, panel) >= 3:
            break
    return mixed


def _mix(one: str, other: str, share: float) -> str:
    pairs = ((int(one[at : at + 2], 16), int(other[at : at + 2], 16)) for at in (1, 3, 5))
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def scale(theme: str) -> list[tuple[str, str]]:
    """Steps of the sequential scale of a theme, least first: ground and the ink that is read on it."""
    steps = SEQUENTIAL if theme == "light" else SEQUENTIAL[::-1]
    return [(step, max((INK, GROUND), key=lambda ink: contrast(ink, step))) for step in steps]


def css() -> str:
    """Custom properties of both themes, and the classes that use them."""
    blocks = {theme: ":root{" + ";".join(_properties(theme)) + "}" for theme in THEMES}
    classes = [f".c{at}{{fill:var(--c{at});stroke:var(--o{at})}}" for at in range(len(OKABE_ITO))]
    classes += [
        f".q{at}{{background:var(--q{at});color:var(--i{at});fill:var(--q{at})}}" for at in range(len(SEQUENTIAL))
    ]
    dark = f"@media screen and (prefers-color-scheme:dark){{{blocks['dark']}}}"
    return "\n".join((blocks["light"], dark, *classes))


def _properties(theme: str) -> list[str]:
    named = [f"--{name}:{colour}" for name, colour in THEMES[theme].items()]
    markers = [f"--c{at}:{fill};--o{at}:{outline(fill, theme)}" for at, fill in enumerate(fills(theme))]
    steps = [f"--q{at}:{step};--i{at}:{ink}" for at, (step, ink) in enumerate(scale(theme))]
    return [*named, *markers, *steps, f"color-scheme:{theme}"]


def for_script() -> dict[str, dict[str, object]]:
    """Both themes, as the page's script draws with them."""
    return {
        theme: {**THEMES[theme], "fills": fills(theme), "outlines": [outline(fill, theme) for fill in fills(theme)]}
        for theme in THEMES
    }
