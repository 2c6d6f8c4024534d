"""What a browser would see of a report."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from moesys.report.page import render
from moesys.report.run import read_run


class Page(HTMLParser):
    """What a browser would see of a page: ids, attributes, texts, and the charts' numbers."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.attributes: list[tuple[str, str, str]] = []
        self.images: list[dict[str, str]] = []
        self.ids: set[str] = set()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.charts: dict[str, dict[str, Any]] = {}
        self._title = ""
        self._json = False
        self.feed(html)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.attributes += [(tag, name, value) for name, value in values.items()]
        if "id" in values:
            self.ids.add(values["id"])
        if tag == "img":
            self.images.append(values)
        self._json = values.get("type") == "application/json"
        if tag not in ("meta", "img", "line", "path", "circle", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in ("line", "path", "circle", "rect"):
            return
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._json and self.open[-1] == "script":
            self.charts[self._title] = json.loads(data)
            return
        if self.open[-2:] == ["figcaption", "b"]:
            self._title = data
        if data.strip() and self.open[-1] not in ("style", "script"):
            self.texts.append(data.strip())

    def series(self, chart: str, name: str) -> tuple[list[float], list[float]]:
        found = {one["name"]: one for one in self.charts[chart]["series"]}
        return found[name]["x"], found[name]["y"]

    def tile(self, label: str) -> tuple[str, str]:
        at = self.texts.index(label)
        return self.texts[at + 1], self.texts[at + 2]


def page_of(folder: Path) -> Page:
    return Page(render(read_run(folder)))
