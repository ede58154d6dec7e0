"""A certificate for people, from its plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from treesearch.methods.claims import Bias, Standing


def lines(found: Mapping[str, Any]) -> list[str]:
    """A certificate, from `asdict`, for people."""
    kl = "-" if found["kl"] is None else f"{found['kl']:.3f}"
    return [
        f"log Z: {_log_z_line(found['log_z'])}",
        f"base law p: {found['base_law']}",
        f"sample size: {_size_line(found)}; lineages: {found['lineages']}",
        f"KL(π̂‖p): {kl} ({found['kl_source']})",
        *(f"bias, {flag['name']}: {flag['reason']}" for flag in found["flags"]),
        *([] if found["flags"] else ["bias: none known"]),
        f"over-optimisation: {alarm_line(found['alarm'])}",
        f"hash: {found['hash']} (settings {found['settings_hash']}, tree {found['tree_hash']})",
        *(f"hash, caveat: {caveat}" for caveat in found["caveats"]),
    ]


def _size_line(found: Mapping[str, Any]) -> str:
    """How many samples there are, and what they are worth where they have weights towards π."""
    if any(flag["name"] == Bias.GREEDY for flag in found["flags"]):
        return f"{found['samples']} samples without weights"
    return f"ESS {found['ess']:.1f}; {found['distinct_leaves']} of {found['samples']} samples carry weight"


def _log_z_line(found: Mapping[str, Any]) -> str:
    value = "-" if found["value"] is None else f"{found['value']:.3f}"
    if found["high"] is None:
        return f"{value}, no interval: {found['reason']}"
    low = "-∞" if found["low"] is None else f"{found['low']:.3f}"
    doubt = "" if found["standing"] == Standing.OK else f"; {found['standing']}: {found['reason']}"
    return f"{value}, 95 % interval {low} .. {found['high']:.3f} ({found['source']}){doubt}"


def alarm_line(found: Mapping[str, Any]) -> str:
    """The over-optimisation alarm, from `asdict`, for people."""
    return f"ALARM, {found['reason']}" if found["fires"] else found["reason"]
