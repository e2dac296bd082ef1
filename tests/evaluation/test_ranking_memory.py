"""Retrieval at the size of COCO's test split.

Proven: 25,000 captions against 5,000 images of 32 queries take less than 2 GB of memory beyond the
features, shortlists of 128 and ranks included. The time is printed (`pytest -s`).
"""

import subprocess
import sys

import pytest

CODE = """
import resource, sys, time, torch
from blip2_train.evaluation.ranking import contrast
from blip2_train.evaluation.retrieval import recalls_of_ranks

images, captions = int(sys.argv[1]), int(sys.argv[2])
generator = torch.Generator().manual_seed(0)
feats = torch.randn(images, 32, 256, generator=generator)
feats /= feats.norm(dim=-1, keepdim=True)
owner = torch.arange(captions) % images
texts = feats[owner, 0] + 0.3 * torch.randn(captions, 256, generator=generator)
texts /= texts.norm(dim=-1, keepdim=True)
contrast(feats[:8], texts[:8], owner[:8], k=2)  # what libraries allocate once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
found = contrast(feats, texts, owner, k=128)
seconds = time.perf_counter() - began
more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
metrics = recalls_of_ranks(found.rank_i2t, found.rank_t2i)
assert found.captions.index.shape == (images, 128) and found.images.index.shape == (captions, 128)
print(f"{images} images, {captions} captions: {seconds:.1f} s, {more:.2f} GB more, "
      f"R@1 {metrics['i2t_r1']:.2f} and {metrics['t2i_r1']:.2f}", flush=True)
sys.exit(0 if more < 2 else 1)
"""


def measure(images: int, captions: int) -> None:
    words = [sys.executable, "-c", CODE, str(images), str(captions)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=1200)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_tenth_of_it() -> None:
    measure(500, 2500)


@pytest.mark.slow
def test_coco() -> None:
    measure(5000, 25000)
