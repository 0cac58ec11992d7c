"""Puts data into a page's template."""
import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def filled(template, data):
    """Returns the page of a template in this folder: the style and the functions that pages share,
    and `data`, which becomes JSON, in their places."""
    shared = (FOLDER / "shared.html").read_text(encoding="utf-8")
    page = (FOLDER / template).read_text(encoding="utf-8").replace("{{SHARED}}", shared)
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return page.replace("{{DATA}}", text)
