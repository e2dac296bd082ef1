"""BLIP-2 pre-training: stage 1 and stage 2 (arXiv 2301.12597)."""

__version__ = "0.1.0"
