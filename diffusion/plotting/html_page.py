"""HTML pages that are one file each: no network, light and dark, on paper and on a phone."""

import base64
import html
import io

import numpy as np
from PIL import Image

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --paper: #fff; --line: #d4d4d8; --faint: #5f6068;
  --mark: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf0; --paper: #161618; --line: #3a3a40; --faint: #a0a0aa; --mark: #7db7ff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
img { max-width: 100%; height: auto; background: #fff; }
table { border-collapse: collapse; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: left; }
.wide { overflow-x: auto; }
.faint { color: var(--faint); }
a { color: var(--mark); }
@media print {
  :root { --ink: #000; --paper: #fff; --line: #999; --faint: #444; }
  .screen { display: none; }
  figure, tr { break-inside: avoid; }
}
"""


def html_page(title: str, body: str, style: str = "", script: str = "") -> str:
    """Returns a document; title is text, body HTML, style CSS and script JavaScript.

    Its policy forbids whatever is not in the file itself, so that a page shows the same everywhere.
    """
    policy = "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'"
    policy += "; script-src 'unsafe-inline'"
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>",
        f"<style>{STYLE}{style}</style>\n</head>\n<body>\n{body}",
        *([f"<script>\n{script}\n</script>"] if script else []),
        "</body>\n</html>\n",
    ]
    return "\n".join(parts)


def png_uri(image: np.ndarray | bytes) -> str:
    """Returns the data URI of an image uint8[h, w, 1 or 3], or of the bytes of a PNG file."""
    if not isinstance(image, bytes):
        file = io.BytesIO()
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "png")
        image = file.getvalue()
    return "data:image/png;base64," + base64.b64encode(image).decode()
