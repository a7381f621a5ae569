"""A small picture in the terminal, by what the terminal can: kitty's or iTerm2's images, else half blocks in colour."""

from __future__ import annotations

import base64
import io
import os
import shutil
import sys
from collections.abc import Mapping
from typing import TextIO

from PIL import Image
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style

COLUMNS = 48
"""Width of a preview in characters, where the terminal is as wide."""
CHUNK = 4096
"""Bytes of base64 in one of kitty's messages (https://sw.kovidgoyal.net/kitty/graphics-protocol/)."""
KITTY = ("xterm-kitty", "xterm-ghostty")
ITERM = ("iTerm.app", "WezTerm", "vscode", "mintty")


def preview(picture: Image.Image, *, file: TextIO | None = None, environ: Mapping[str, str] = os.environ) -> bool:
    """Shows the picture below the cursor; whether the terminal could. Nothing is written to what is no terminal, or to one
    of fewer than 256 colours (NO_COLOR included)."""
    file = file or sys.stdout
    assert file is not None
    if not file.isatty() or "NO_COLOR" in environ or environ.get("TERM", "dumb") == "dumb":
        return False
    columns = min(COLUMNS, shutil.get_terminal_size().columns - 1)
    if environ.get("TERM") in KITTY or "KITTY_WINDOW_ID" in environ:
        file.write(kitty(picture, columns))
    elif environ.get("TERM_PROGRAM") in ITERM:
        file.write(iterm(picture, columns))
    else:
        console = Console(file=file, force_terminal=True, _environ=environ)
        if console.color_system not in ("256", "truecolor"):
            return False
        console.print(half_blocks(picture, columns), end="")
    file.flush()
    return True


def kitty(picture: Image.Image, columns: int) -> str:
    """The picture as messages of kitty's graphics protocol: PNG, direct, `columns` wide, no replies."""
    data = _png(picture)
    parts = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    first = f"a=T,f=100,q=2,c={columns},"
    messages = [
        f"\x1b_G{first if k == 0 else ''}m={int(k + 1 < len(parts))};{part}\x1b\\" for k, part in enumerate(parts)
    ]
    return "".join(messages) + "\n"


def iterm(picture: Image.Image, columns: int) -> str:
    """The picture as iTerm2's inline file (https://iterm2.com/documentation-images.html)."""
    return f"\x1b]1337;File=inline=1;width={columns};preserveAspectRatio=1:{_png(picture)}\x07\n"


def half_blocks(picture: Image.Image, columns: int) -> Segments:
    """Two pixels a character: the upper one in the ink of a half block, the lower one behind it."""
    rows = max(1, round(columns * picture.height / picture.width / 2))
    small = picture.convert("RGB").resize((columns, 2 * rows), Image.Resampling.BOX)
    pixel = small.load()
    assert pixel is not None
    segments = list[Segment]()
    for row in range(rows):
        for column in range(columns):
            upper, lower = ("#{:02x}{:02x}{:02x}".format(*pixel[column, 2 * row + k]) for k in (0, 1))  # type: ignore[misc]
            segments.append(Segment("▀", Style(color=upper, bgcolor=lower)))
        segments.append(Segment("\n"))
    return Segments(segments)


def _png(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.convert("RGB").save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()
