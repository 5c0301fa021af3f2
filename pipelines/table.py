"""The table at the end of a run: one row per checkpoint, its price beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

HEADINGS = {
    "stage": "stage",
    "blocks": "blocks",
    "parameters": "weights",
    "bytes": "size",
    "perplexity": "perplexity",
    "kl": "KL",
    "agreement": "top-1",
    "prefill": "prefill tok/s",
    "decode": "decode tok/s",
    "seconds": "seconds",
    "peak_bytes": "peak",
}


def rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One dict per checkpoint and per exported graph, keyed as `HEADINGS`."""
    stages = {stage["label"]: stage for stage in record["stages"]}
    found = []
    for label, stage in stages.items():
        if stage["verb"] == "evaluate":
            name = label.removeprefix("evaluate ")
            maker = stages["model" if name == "original" else name]
            found.append(_row(name, maker, stage["metrics"]))
        if stage["verb"] == "export" and "onnx" in stage["metrics"]["formats"]:
            found.append(_row("onnx", stage, stage["metrics"]["onnx"]))
    return found


def cells(row: dict[str, Any]) -> list[str]:
    """The row in words, in the order of `HEADINGS`."""
    words = {
        name: _FORMAT[name](row[name]) if row.get(name) is not None else "-" for name in HEADINGS
    }
    if row.get("sparsity"):
        words["parameters"] += f" ({100 * row['sparsity']:.0f} % of linears zero)"
    return list(words.values())


def protocol(record: dict[str, Any]) -> str:
    """One sentence on how little or how much the perplexities rest on."""
    for stage in record["stages"]:
        if stage["verb"] == "evaluate":
            p = stage["metrics"]["protocol"]
            return (
                f"perplexity over {p['windows']} held-out windows of {p['length']} tokens "
                f"({p['predicted_tokens']:,} predicted tokens, stride {p['stride']}); KL (nats per "
                "token) and top-1 agreement are against the original"
            )
    return "no text.evaluation in the configuration, so no perplexity"


def healing(record: dict[str, Any]) -> str | None:
    """What healing did to the loss that pruning added, in nats per token.

    A healing that found nothing better than what it began with is named.
    """
    idle = [
        f"{s['label']} kept the unhealed weights: no evaluation found a lower held-out loss than "
        f"{s['metrics']['held_out']['before']:.3f}"
        for s in record["stages"]
        if s["verb"] == "heal" and (s["metrics"].get("held_out") or {}).get("step") == 0
    ]
    return "; ".join(filter(None, (_closed(record), *idle))) or None


def _closed(record: dict[str, Any]) -> str | None:
    nll = {
        s["label"].removeprefix("evaluate "): s["metrics"]["nll"]
        for s in record["stages"]
        if s["verb"] == "evaluate"
    }
    if not {"original", "prune", "heal"} <= nll.keys():
        return None
    added, closed = nll["prune"] - nll["original"], nll["prune"] - nll["heal"]
    if added <= 0:
        return None
    return (
        f"pruning added {added:.3f} nats per token; healing closed {closed:.3f} "
        f"({100 * closed / added:.0f} %)"
    )


def added_loss(record: dict[str, Any]) -> list[str]:
    """How added loss spreads, per checkpoint that was quantized, asked about or needs a look."""
    lines = []
    for stage in record["stages"]:
        found = stage["metrics"].get("added_loss") if stage["verb"] == "evaluate" else None
        name = stage["label"].removeprefix("evaluate ")
        told = name == "model" or name.startswith("quantize")
        if not found or not (told or found["flags"]):
            continue
        spread = ", ".join(f"{key} {found[key]:.3f}" for key in ("mean", "p50", "p95", "p99"))
        correlation = found["norm_correlation"]
        against = "" if correlation is None else f"; rank correlation with |h| {correlation:+.2f}"
        lines.append(
            f"{name}: added loss by window: {spread}; most in windows "
            f"{', '.join(map(str, found['worst']))}{against}"
        )
        lines += [f"{name}: look at the inputs: {flag}" for flag in found["flags"]]
    return lines


def markdown(record: dict[str, Any]) -> str:
    """The table as Markdown, for a README or a model card."""
    lines = ["| " + " | ".join(HEADINGS.values()) + " |", "|" + "---|" * len(HEADINGS)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows(record)]
    return "\n".join(lines)


def _row(name: str, maker: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    speed = metrics.get("speed") or {}
    return {
        "stage": name,
        "blocks": metrics.get("blocks"),
        "parameters": metrics.get("parameters"),
        "bytes": metrics.get("bytes"),
        "perplexity": metrics.get("perplexity"),
        "kl": metrics.get("kl"),
        "agreement": metrics.get("top1_agreement"),
        "prefill": speed.get("prefill"),
        "decode": speed.get("decode"),
        "seconds": maker["seconds"],
        "peak_bytes": maker["peak_bytes"],
        "sparsity": maker["metrics"].get("sparsity"),
    }


def rate(speed: dict[str, float], digits: int) -> str:
    """Median tokens/s and the farthest repetition from it."""
    median = speed["median"]
    spread = max(speed["max"] - median, median - speed["min"])
    return f"{median:.{digits}f} ±{spread:.{digits}f}"


def size(count: float) -> str:
    """Bytes in words, in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


_FORMAT: dict[str, Callable[[Any], str]] = {
    "stage": str,
    "blocks": str,
    "parameters": lambda n: f"{n / 1e6:.1f} M" if n < 1e9 else f"{n / 1e9:.2f} B",
    "bytes": size,
    "perplexity": lambda p: f"{p:.2f}" if p < 1e4 else f"{p:.2e}",
    "kl": lambda k: f"{k:.3f}",
    "agreement": lambda a: f"{100 * a:.1f} %",
    "prefill": lambda s: rate(s, 0),
    "decode": lambda s: rate(s, 1),
    "seconds": lambda s: f"{s:.1f}",
    "peak_bytes": size,
}
