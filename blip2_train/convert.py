r"""Converts models between ours, LAVIS and Hugging Face.

    blip2-convert --from lavis --to blip2-train blip2_pretrained.pth runs/released \
        experiment=stage1_vitg
    blip2-convert --from blip2-train --to hf runs/stage2_vitg_opt2_7b exported
    blip2-convert --from hf --to lavis exported blip2_opt.pth

SRC is a run's folder or one of its checkpoints, a .pth file of LAVIS, or a folder of Hugging Face.
DST is new: a run's folder, a file, a folder. LAVIS's files do not say what they are of: give
experiment=NAME and key=value as of blip2-train; they also say the data and schedule of a training.

Every weight is accounted for; what was written is read again, and its outputs are compared.
docs/interchange.md says what goes where.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from blip2_train.errors import UserError

if TYPE_CHECKING:  # imported where they are used: `--help` should not wait for torch
    from blip2_train.interchange.whole import Whole

KINDS = ("blip2-train", "lavis", "hf")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code (2 for a mistake of the user)."""
    args = _parser().parse_intermixed_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    try:
        convert(args)
    except (UserError, OSError, SafetensorError) as error:  # not the first: a full or bad disk
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


def convert(args: argparse.Namespace) -> None:
    """Read, write, read again, compare.

    Raises:
        UserError: the source cannot be read, the target cannot hold it, or it came out different.
    """
    if args.source == args.target:
        raise UserError(f"--from and --to are both {args.source}: there is nothing to convert")
    if os.path.lexists(args.dst):
        raise UserError(f"{args.dst} exists; give another name, or delete it")
    if not args.src.exists():
        raise UserError(f"{args.src}: there is no such file or folder")
    if not args.dst.absolute().parent.is_dir():
        raise UserError(f"{args.dst.absolute().parent} does not exist; make that folder first")
    from blip2_train.interchange.compare import differences, outputs
    from blip2_train.interchange.write import publish, write_lavis, write_ours

    cfg = _configuration(args)
    final = args.dst.absolute()
    with _work_folder(final) as folder:
        parts = folder / "parts"
        parts.mkdir()
        whole = _read(args.source, args.src, cfg, parts)
        print(f"{args.src}: {whole.account}")
        expected = outputs(whole)
        if args.target == "hf":
            written = folder / "folder"
            written.mkdir()
            gaps = _write_hf(whole, written, args)
            _judge(gaps, args.tolerance)
            print("read back from there:")
            gaps = differences(expected, outputs(_again(args, whole, written, folder)))
        elif args.target == "lavis":
            written = folder / "file"
            print(f"{args.dst}: {write_lavis(whole, written, trained_only=args.trained_only)}")
            again = _again(args, whole, written, folder)
            gaps = differences(expected, outputs(again))
        else:
            written = parts
            print(f"{args.dst}: {write_ours(whole, parts, final)}")
            from blip2_train.interchange.read import read_ours

            gaps = differences(expected, outputs(read_ours(written)))
        _judge(gaps, args.tolerance)
        publish(written, final)
    print(f"{args.dst} is written")


def _read(kind: str, path: Path, cfg: dict[str, Any] | None, work: Path) -> Whole:
    from blip2_train.interchange import read

    if kind == "blip2-train":
        return read.read_ours(path)
    if kind == "hf":
        return read.read_hf(path, cfg, work)
    assert cfg is not None
    return read.read_lavis(path, cfg, work)


def _again(args: argparse.Namespace, whole: Whole, written: Path, folder: Path) -> Whole:
    """What was written for others, read again as theirs."""
    import copy

    from blip2_train.interchange import read

    parts = folder / "again"
    parts.mkdir()
    if args.target == "hf":
        return read.read_hf(written, None, parts)
    return read.read_lavis(written, copy.deepcopy(whole.cfg), parts)


def _write_hf(whole: Whole, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    from blip2_train.interchange.compare import differences, hf_outputs, one_eps, outputs
    from blip2_train.interchange.hf_folder import load_hf, write_card, write_hf

    print(f"{args.dst}: {write_hf(whole, folder, args.max_shard_size)}")
    model = load_hf(folder, whole.cfg["stage"])
    theirs = hf_outputs(model, whole)
    true = differences(outputs(whole), theirs)
    eps = model.config.vision_config.layer_norm_eps
    print(
        f"with the true eps of ln_vision, {whole.model.qformer.ln_vision.eps:g}, outputs differ by "
        f"{max(true.values()):.1e}; with Hugging Face's one, {eps:g}, by:"
    )
    write_card(whole, folder, args.dst.name, model, max(true.values()))
    with one_eps(whole, eps):
        return differences(outputs(whole), theirs)


def _judge(gaps: dict[str, float], tolerance: float) -> None:
    """Prints the differences.

    Raises:
        UserError: one is too large.
    """
    for name, gap in gaps.items():
        print(f"  {name:<16} {gap:.1e}")
    worst = max(gaps, key=lambda name: gaps[name])
    print(f"largest difference: {gaps[worst]:.1e}, of {worst} (allowed: {tolerance:.0e})")
    if not gaps[worst] <= tolerance:  # also where it is no number
        raise UserError(
            f"what was written gives other outputs: {worst} differs by {gaps[worst]:.1e}, and "
            f"--tolerance is {tolerance:.0e}; nothing was kept"
        )


def _configuration(args: argparse.Namespace) -> dict[str, Any] | None:
    """The configuration of the overrides, None where there are none.

    Raises:
        UserError: they are missing, not needed, or wrong.
    """
    if args.source == "blip2-train":
        if args.overrides:
            raise UserError(
                f"{args.overrides[0]}: a checkpoint of ours knows its configuration; give no more"
            )
        return None
    if not args.overrides:
        if args.source == "lavis":
            raise UserError("a file of LAVIS does not say what it is of: give experiment=NAME")
        return None
    from blip2_train.config import to_plain
    from blip2_train.train import compose

    return to_plain(compose(args.overrides))


@contextlib.contextmanager
def _work_folder(final: Path) -> Iterator[Path]:
    """A folder beside the target, on the same disk, gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _size(text: str) -> str:
    if re.fullmatch(r"\d+[KMGT]B", text) is None:
        raise argparse.ArgumentTypeError(f"{text} is no size; give one such as 500MB or 5GB")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "blip2-convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--from", dest="source", choices=KINDS, required=True, help="what SRC is")
    parser.add_argument(
        "--to", dest="target", choices=KINDS, required=True, help="what DST will be"
    )
    parser.add_argument("src", type=Path, metavar="SRC")
    parser.add_argument("dst", type=Path, metavar="DST")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="as of blip2-train; experiment=NAME first"
    )
    parser.add_argument(
        "--max-shard-size", type=_size, default="5GB", metavar="SIZE",
        help="of hf's files of weights (5GB)",
    )  # fmt: skip
    parser.add_argument(
        "--trained-only", action="store_true",
        help="lavis: without image tower and language model, as its pre-training saves them",
    )  # fmt: skip
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, metavar="X",
        help="largest difference of outputs, in units of their largest entry or of 1 (1e-4)",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
