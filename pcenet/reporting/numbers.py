"""Shares and scores as text: "83.08%" in tables, "83.08 %" in prose."""

from __future__ import annotations

SCORES = {"top1": "top-1", "miou": "mIoU"}  # the scores that count, and what tables call them


def percent(value: float | None) -> str:
    """A share as a percentage, or n/a."""
    return "n/a" if value is None else f"{value:.2%}"


def score_digits(images: int) -> int:
    """Decimals of a percentage that this many images support: no finer than one image of them, and 2 at most."""
    return 0 if images <= 100 else 1 if images <= 1000 else 2


def score_text(score: float | None, images: int) -> str:
    """A score as a percentage, or n/a; no digit is finer than one of the images that it was measured on."""
    return "n/a" if score is None else f"{score:.{score_digits(images)}%}"


def share_text(share: float) -> str:
    """A share as a percentage in prose, with one decimal."""
    return f"{100 * share:.1f} %"


def in_prose(score: float, images: int) -> str:
    """As `score_text`, in prose."""
    return f"{100 * score:.{score_digits(images)}f} %"
