"""Megatron-Energon set up on the same shards with the same transforms; only where it is installed.

Its own preparation (an index in a folder `.nv-meta`) is written into a folder of links to the
shards, which are left as they are.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron import energon
from megatron.energon.flavors import BaseWebdatasetFactory

from blip2_train.benchmarks.pipelines import SHUFFLE_BUFFER, Stored

_DATASET = """sample_type:
  __module__: megatron.energon
  __class__: CaptioningSample
field_map:
  image: jpg
  caption: json[captions][0]
"""


class _Encoder(energon.DefaultTaskEncoder):
    decoder = energon.SampleDecoder(image_decode="pilrgb")

    def __init__(self, transform: Callable[[Any], torch.Tensor]) -> None:
        super().__init__()
        self._transform = transform

    @energon.stateless
    def encode_sample(self, sample: Any) -> Any:
        sample.image = self._transform(sample.image)
        return sample


def batches(
    stored: Stored, transform: Callable[[Any], torch.Tensor]
) -> Iterator[tuple[torch.Tensor, list[str]]]:
    """Images [B, 3, S, S] and the names of their shards; ends after `stored.batches`.

    Args:
        stored: the data.
        transform: PIL image -> [3, S, S].
    """
    folder = stored.files.with_name("energon")
    if not folder.exists():
        folder.mkdir()
        names = sorted(path.name for path in stored.shards.glob(f"{stored.split}-*.tar"))
        for name in names:
            (folder / name).symlink_to((stored.shards / name).resolve())
        with contextlib.redirect_stdout(io.StringIO()):  # its progress
            BaseWebdatasetFactory.prepare_dataset(
                folder, names, split_parts_ratio=[("train", 1.0)], workers=1
            )
        (folder / ".nv-meta" / "dataset.yaml").write_text(_DATASET)
    dataset = energon.get_train_dataset(
        folder,
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=stored.workers),
        batch_size=stored.batch,
        shuffle_buffer_size=SHUFFLE_BUFFER,
        max_samples_per_sequence=100,
        virtual_epoch_length=stored.batches,
        task_encoder=_Encoder(transform),
    )
    return _pairs(energon.get_loader(dataset))


def _pairs(loader: Any) -> Iterator[tuple[torch.Tensor, list[str]]]:
    for batch in loader:
        yield batch.image, [key.rpartition("/")[0] for key in batch.__key__]
