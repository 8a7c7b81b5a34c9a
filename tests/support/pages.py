"""How tests read a report: its text, tags and attributes, and whether every tag is closed."""

from __future__ import annotations

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
