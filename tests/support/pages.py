"""How tests read a report: its text, tags and attributes, and whether every tag is closed."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "img", "br", "link", "hr", "input", "path", "use"}


class Page(HTMLParser):
    """Collects text, attributes and unbalanced tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags, self.open, self.attributes = "", [], [], []
        self.faults: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)

    def handle_data(self, data):
        self.text += data


def check_self_contained(html: str) -> None:
    """Every tag is closed, and nothing outside of the page is referred to: no script, no server, no network."""
    page = Page(html)
    assert not page.faults
    assert not page.open
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert not re.search(r"https?:|//\w|@import", re.sub(r"base64,[A-Za-z0-9+/=]+", "", html).replace("s3://", ""))
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("data:image/png;base64,", "#")), (name, value[:60])
        assert not name.startswith("on")
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
