"""BibTeX of papers; a method states its own (`treesearch.methods.base.Method.papers`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

OWN = "@software{treesearch,\n  title = {treesearch: inference-time search for diffusion models},\n  year = {2026}\n}"


class Paper(NamedTuple):
    """A bibliographic entry.

    Args:
        kind: of BibTeX: article, inproceedings, incollection.
        key: its name.
        title, authors, venue, year: as BibTeX writes them.
    """

    kind: str
    key: str
    title: str
    authors: str
    venue: str
    year: int

    def bibtex(self) -> str:
        """The entry."""
        venue = "booktitle" if self.kind.startswith("in") else "journal"
        fields = {"title": self.title, "author": self.authors, venue: self.venue, "year": self.year}
        return f"@{self.kind}{{{self.key},\n" + ",\n".join(f"  {k} = {{{v}}}" for k, v in fields.items()) + "\n}"


def bibtex(papers: Iterable[Paper]) -> str:
    """Entries of this library and of papers, each once."""
    return "\n\n".join([OWN, *(paper.bibtex() for paper in dict.fromkeys(papers))])
