"""BLIP-2 pre-training: stage 1 and stage 2 (arXiv 2301.12597)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    import torch

    from blip2_train.evaluation.inference import Blip2

__version__ = "0.1.0"


def load(
    path_or_run: str | Path,
    device: str | torch.device = "cpu",
    *,
    dtype: str | torch.dtype | None = None,
    int8: bool | Collection[str] = False,
    changes: Mapping[str, Any] | None = None,
) -> Blip2:
    """Load a trained model to use.

    Args:
        path_or_run: a checkpoint file, or the folder of a run, of which the newest one is taken.
        device: "cpu", "cuda", "cuda:1", ...
        dtype: in which everything computes, "float32" or "bfloat16" (or torch's); None: frozen
            parts as they were configured, the rest in float32.
        int8: True, or some of "qformer" and "language_model": their linear layers keep weights of 8
            bits (needs `blip2-train[torchao]`).
        changes: keys of the checkpoint's configuration that are other here, such as
            {"vision.weights": FILE} where the tower lies somewhere else.

    Returns:
        An object with `encode_image`, `encode_text`, `match`, `caption` and `generate`.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or its frozen parts cannot be had.
    """
    from blip2_train.training import loading  # torch and Lightning take seconds to import

    return loading.load(path_or_run, device, dtype=dtype, int8=int8, changes=changes)
