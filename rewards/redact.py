"""Secrets in addresses and expressions: what a file, a card, a log or an error may show of them.

    http://host:8000/v1/score              shown: its path holds nothing but words of usual APIs
    http://host/hooks/T0K3N?key=S3CR3T     http://host/***
    vlm_judge("...", api_key="S3CR3T")     vlm_judge("...", api_key="***")

Whether a segment of a path is a key cannot be seen, so that all but the words in PLAIN count as one.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

STRUCK = "***"
PLAIN = set("api openai chat completions completion predict prediction predictions infer inference invoke".split())  # noqa: SIM905
PLAIN |= set("invocations model models generate classify rank reward rewards score scores scorer evaluate".split())  # noqa: SIM905
PLAIN |= {"judge", "grade", "rate", "aesthetic", "images"}
_VERSION = re.compile(r"v\d{1,2}(alpha|beta)?\d?")
_URL = re.compile(r"[A-Za-z][\w+.-]*://[^\s\"'<>]+")
_PLUGIN = re.compile(r"\s*[^()\s'\"]+:(?=[A-Za-z_][\w.]*\s*(\(|$))")  # ./file.py: or package.module: before a call
_SECRET = re.compile(
    r"(^|[_-])(api[_-]?key|key|token|secret|pass|password|passwd|pwd|authorization|credentials?)$", re.I
)


def public_url(url: str) -> str:
    """A URL as it may be shown: whole where it cannot hold a secret, else its scheme and host."""
    try:
        parts = urlsplit(url)
        host = f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)
    except ValueError:
        return STRUCK
    return url if not secrets_of(url) else f"{parts.scheme}://{host}/{STRUCK}"


def marked_url(url: str) -> str:
    """`public_url` with four bytes of a hash of its path where that is hidden: other scorers of one host differ."""
    shown = public_url(url)
    path = urlsplit(url).path if shown != STRUCK else url
    return shown if shown == url else f"{shown}{hashlib.blake2b(path.encode(), digest_size=4).hexdigest()}"


def secrets_of(url: str) -> list[str]:
    """The parts of a URL that may be secret, as written and decoded, the longest first."""
    try:
        parts = urlsplit(url)
        _ = parts.port
        login = [parts.username, parts.password]
    except ValueError:
        return [url]
    path = [s for s in parts.path.split("/") if not (s in PLAIN or _VERSION.fullmatch(s) or s.startswith(STRUCK))]
    query = [parts.query, parts.fragment, *(value for _, value in parse_qsl(parts.query, keep_blank_values=True))]
    found = {text for part in (*login, *path, *query) if part for text in (part, unquote(part))}
    return sorted(found, key=len, reverse=True)


def struck(text: str, secrets: list[str]) -> str:
    """A text without secrets, plain or as JSON writes them."""
    for form in (form for secret in secrets if secret for form in (secret, json.dumps(secret)[1:-1])):
        text = text.replace(form, STRUCK)
    return text


def redacted(expression: str) -> str:
    """An expression (of a kernel, a reward or a method) whose secrets are struck out; unchanged where it holds none."""
    where = found[0] if (found := _PLUGIN.match(expression)) else ""
    try:
        tree = ast.parse(expression[len(where) :].strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError):
        return _URL.sub(lambda found: public_url(found[0]), expression)
    strike = _Strike()
    tree = strike.visit(tree)
    return where + ast.unparse(tree) if strike.found else expression


class _Strike(ast.NodeTransformer):
    """Strings that are URLs, or belong to a name such as api_key."""

    found = False

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return (
            self._put(node, _URL.sub(lambda m: public_url(m[0]), node.value)) if isinstance(node.value, str) else node
        )

    def visit_keyword(self, node: ast.keyword) -> ast.keyword:
        node.value = self._named(node.arg, node.value)
        return node

    def visit_Dict(self, node: ast.Dict) -> ast.Dict:
        named = [k.value if isinstance(k, ast.Constant) else None for k in node.keys]
        node.values = [self._named(name, value) for name, value in zip(named, node.values, strict=True)]
        return node

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        text = _joined(node)  # "http://host/" + "key" is one address
        return self.generic_visit(node) if text is None else self.visit_Constant(ast.Constant(text))

    def _named(self, name: Any, value: ast.expr) -> ast.expr:
        if not isinstance(name, str) or not _SECRET.search(name) or _joined(value) is None:
            return self.visit(value)
        return self._put(ast.Constant(_joined(value)), STRUCK)

    def _put(self, node: ast.Constant, text: str) -> ast.Constant:
        self.found |= text != node.value
        return ast.copy_location(ast.Constant(text), node)


def _joined(node: ast.expr) -> str | None:
    """The text that a string or a sum of strings is, None for anything else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _joined(node.left), _joined(node.right)
        return None if left is None or right is None else left + right
    return None
