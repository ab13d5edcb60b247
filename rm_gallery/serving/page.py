"""The page at `/`: a form that scores answers in a browser. It is the same for every server and names no model."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from rm_gallery.html_page import render

_MARKER = "rm-gallery-serve"


def make_page() -> tuple[str, dict[str, str]]:
    """The page, and the headers that let it run its own script and reach its own server alone."""
    script = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return render("serving/page.html.jinja", _MARKER, script=script), headers
