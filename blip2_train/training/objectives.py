"""One stage-1 step: joins model, losses and other ranks (BLIP-2, section 3.2).

Shapes: B own samples, N = B * ranks, T text tokens (trimmed), M caption targets.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from blip2_train import losses
from blip2_train.distributed import (
    World,
    all_gather,
    all_gather_with_grad,
    all_reduce_sum,
    fetch_rows,
    request_rows,
)
from blip2_train.models.qformer import ImageKV
from blip2_train.models.stage1 import Blip2Stage1
from blip2_train.seeding import stable_hash

ALONE = World()
OBJECTIVES = ("itc", "itm", "lm")
Results = tuple[Any, ...]


@dataclass(frozen=True)
class ItcConfig:
    """Image-text contrast.

    Attributes:
        smoothing: label smoothing, in [0, 1).
        gradient: "reference": the gathered side carries no gradient, as in the reference, even on
            one process; "full": both sides learn, the gradient of the loss as written.
    """

    smoothing: float = 0.1
    gradient: str = "reference"


@dataclass(frozen=True)
class LmConfig:
    """Image-grounded captioning.

    Attributes:
        smoothing: label smoothing over the vocabulary, in [0, 1).
    """

    smoothing: float = 0.1


@dataclass(frozen=True)
class LossConfig:
    """What the total loss is.

    Attributes:
        weights: of "itc", "itm" and "lm"; a loss of weight 0 is not computed.
        normalise: "global" divides by counts over all ranks, so that the gradient does not depend
            on their number; "rank" is the reference's mean of per-rank means.
        itc: see `ItcConfig`.
        lm: see `LmConfig`.
    """

    weights: Mapping[str, float]
    normalise: str = "global"
    itc: ItcConfig = ItcConfig()
    lm: LmConfig = LmConfig()

    @property
    def on(self) -> tuple[str, ...]:
        """The objectives that are computed; ordered, for sums must be repeatable."""
        return tuple(name for name in OBJECTIVES if self.weights[name])

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the losses that are computed: "loss_itc", ..."""
        return tuple(f"loss_{name}" for name in self.on)


def stage1_step(
    model: Blip2Stage1,
    image_embeds: Tensor,
    batch: Mapping[str, Any],
    config: LossConfig,
    *,
    uniform: Tensor | None = None,
    negatives: tuple[Tensor, Tensor] | None = None,
    world: World = ALONE,
    parts: int = 1,
) -> dict[str, Tensor]:
    """Losses of one contrastive batch, and what they were computed from.

    Args:
        model: the stage-1 model.
        image_embeds: [B, P, Dv] tokens of the frozen tower.
        batch: `input_ids` and `attention_mask` int64 [B, T_max], `image_id` int64 [B],
            `text_index` int64 [n] and `lm_index` int64 [M] (see `data.batch`), and `text_length`:
            T, to which text is trimmed, the same on all ranks. For more than one part also
            `tokens`: list of B numbers, the tokens of each text.
        config: weights and variants of the losses.
        uniform: float64 [2, B] in [0, 1): the numbers that draw this rank's negative images and
            texts; needed for ITM unless `negatives` is given.
        negatives: (image, text) global row numbers, each int64 [B], instead of drawing them.
        world: the ranks that share the contrastive batch.
        parts: the Q-Former computes B / parts samples at a time, forgets all but what the losses
            are made of, and computes them once more in the backward pass (GradCache, arXiv
            2101.06983): the same losses and gradients in the memory of a part.

    Returns:
        `loss` (to call backward on) and `loss_itc`, `loss_itm`, `loss_lm` where computed: with
        `normalise=global` their mean over ranks is the loss of the global batch; and named
        intermediate tensors, for metrics and tests.
    """
    on, B = config.on, len(batch["input_ids"])
    image_id_all, *text_all = _gather_text(batch, world)
    image = None
    if parts == 1:  # where there are more, each projects its own images
        with record_function("image"):
            image = model.qformer.project_image(image_embeds)

    image_feats = text_feat = caption = None
    if on != ("itm",):
        with record_function("queries, text, captions"):
            encode = functools.partial(_encode, model, image, image_embeds, batch, on)
            image_feats, text_feat, caption = _in_parts(encode, image_embeds, parts)
    out = {"positive": losses.same_id(batch["image_id"], image_id_all)}
    if image_feats is not None and text_feat is not None:
        with record_function("contrast"):
            out |= {"image_feats": image_feats, "text_feat": text_feat}
            out |= _similarities(model, out, config.itc.gradient, world)
            out["loss_itc"] = losses.itc_loss(
                out["sim_i2t"], out["sim_t2i"], out["positive"], config.itc.smoothing
            )
    if "itm" in on:
        with record_function("negatives"):
            out |= _negatives(out, uniform, negatives)
            request = request_rows(out["neg_image_idx"], B, world) if world.size > 1 else None
    if caption is not None:  # runs while the negatives' row numbers travel to the host
        with record_function("words"):
            out |= _caption(model, caption, batch, config.lm.smoothing)
    if "itm" in on:
        with record_function("matching"):
            source, position = image_embeds, out["neg_image_idx"]
            if request is not None:
                source, position = fetch_rows(image_embeds, request)
            others = image
            if image is None or request is not None:
                others = model.qformer.project_image(source) if parts == 1 else None
            match = functools.partial(
                _match, model, image, others, image_embeds, source, position,
                batch, text_all, out["neg_text_idx"],
            )  # fmt: skip
            out |= _matching_loss(_in_parts(match, image_embeds, parts), out["has_negative"])

    _normalise(out, on, config.normalise, world)
    out["loss"] = torch.stack([config.weights[name] * out[f"loss_{name}"] for name in on]).sum()
    return out


def draw_uniform(seed: int, step: int, part: int, samples: int, world: World) -> Tensor:
    """This rank's slice of the numbers that draw the negatives of a contrastive batch.

    Every rank generates the numbers of all N rows from (seed, step, part) alone, so a row's
    negatives depend neither on the number of ranks nor on what ran before.

    Args:
        seed: of the run.
        step: optimizer step.
        part: contrastive batch within the step.
        samples: rows per rank (B).
        world: the ranks.

    Returns:
        float64 [2, B] on the host: row 0 draws images, row 1 texts.
    """
    generator = torch.Generator().manual_seed(stable_hash("negatives", seed, step, part))
    numbers = torch.rand(2, samples * world.size, generator=generator, dtype=torch.float64)
    return numbers[:, world.rank * samples : (world.rank + 1) * samples]


def _gather_text(batch: Mapping[str, Any], world: World) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [N], token ids and masks [N, T_max] of all ranks, in one collective."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    packed = torch.cat([batch["image_id"][:, None], ids, mask], dim=1)
    image_id, ids, mask = all_gather(packed, world).split([1, ids.shape[1], mask.shape[1]], dim=1)
    return image_id.squeeze(1), ids, mask


def _similarities(
    model: Blip2Stage1, out: dict[str, Tensor], gradient: str, world: World
) -> dict[str, Tensor]:
    gather = all_gather_with_grad if gradient == "full" else all_gather
    image_feats_all = gather(out["image_feats"], world)
    text_feat_all = gather(out["text_feat"], world)
    return {
        "sim_i2t": losses.max_similarity(out["image_feats"], text_feat_all) / model.temp,
        "sim_t2i": losses.max_similarity(image_feats_all, out["text_feat"]).T / model.temp,
    }


def _negatives(
    out: dict[str, Tensor], uniform: Tensor | None, given: tuple[Tensor, Tensor] | None
) -> dict[str, Tensor]:
    """One negative image for each text, and one negative text for each image."""
    allowed = ~out["positive"]
    if "sim_t2i" in out:
        weights_t2i = losses.negative_weights(out["sim_t2i"], out["positive"])
        weights_i2t = losses.negative_weights(out["sim_i2t"], out["positive"])
    else:  # without ITC there is no similarity to go by
        weights_t2i = weights_i2t = allowed.float()
    if given is None:
        assert uniform is not None, "ITM needs random numbers to draw negatives with"
        uniform = uniform.to(weights_t2i.device, non_blocking=True)
        image_index, _ = losses.draw_negatives(weights_t2i, uniform[0])
        text_index, _ = losses.draw_negatives(weights_i2t, uniform[1])
    else:
        image_index, text_index = given
    return {
        "neg_weights_t2i": weights_t2i,
        "neg_weights_i2t": weights_i2t,
        "neg_image_idx": image_index,
        "neg_text_idx": text_index,
        "has_negative": allowed.any(dim=1),
    }


def _in_parts(function: Callable[[slice], Results], image_embeds: Tensor, parts: int) -> Results:
    """What a function of some of the samples [B, ...] gives for all of them.

    Of more than one part nothing is kept but the results.
    """
    samples = len(image_embeds)
    if parts == 1:
        return function(slice(0, samples))

    def on_device(rows: slice, _: Tensor) -> Results:
        return function(rows)

    size = samples // parts
    rows = [slice(start, start + size) for start in range(0, samples, size)]
    # the tensor tells the checkpoint on which device dropout must be the same again
    results = [checkpoint(on_device, part, image_embeds, use_reentrant=False) for part in rows]
    return tuple(
        None if any(x is None for x in column) else torch.cat(column)
        for column in zip(*results, strict=True)
    )


def _text_index(batch: Mapping[str, Any], rows: slice) -> Tensor:
    """Positions b * T + t of the tokens of some rows, counted from the first of them."""
    index, T_max = batch["text_index"], batch["input_ids"].shape[1]
    if rows.stop - rows.start < len(batch["input_ids"]):
        before, own = (sum(batch["tokens"][:end]) for end in (rows.start, rows.stop))
        index = index[before:own] - rows.start * T_max
    return index // T_max * batch["text_length"] + index % T_max


def _encode(
    model: Blip2Stage1,
    image: ImageKV | None,
    image_embeds: Tensor,
    batch: Mapping[str, Any],
    on: tuple[str, ...],
    rows: slice,
) -> Results:
    """See `Blip2Stage1.encode`, for some rows; `image` is given where they are all."""
    T = batch["text_length"]
    return model.encode(
        image if image is not None else model.qformer.project_image(image_embeds[rows]),
        batch["input_ids"][rows, :T],
        batch["attention_mask"][rows, :T],
        _text_index(batch, rows),
        contrast="itc" in on,
        caption="lm" in on,
    )


def _caption(
    model: Blip2Stage1, states: Tensor, batch: Mapping[str, Any], smoothing: float
) -> dict[str, Tensor]:
    """Summed captioning loss; the head runs only where there is a token to predict."""
    index = batch["lm_index"]
    targets = batch["input_ids"].flatten()[index + 1]
    selected = states.index_select(0, torch.searchsorted(batch["text_index"], index))
    total = model.lm_loss_sum(selected, targets, smoothing)
    return {"lm_selected": selected, "lm_targets": targets, "loss_lm": total}


def _match(
    model: Blip2Stage1,
    image: ImageKV | None,
    others: ImageKV | None,
    image_embeds: Tensor,
    source: Tensor,
    position: Tensor,
    batch: Mapping[str, Any],
    text_all: list[Tensor],
    neg_text_idx: Tensor,
    rows: slice,
) -> Results:
    """Logits [b, 2] of (own, own), of (negative image, own text) and of (own image, negative text).

    The first and the last look at the same images, so their rows stand side by side. How long the
    negative texts are is known on the device alone, so their padding is computed too.

    Args:
        model: the stage-1 model.
        image: keys and values of the own images; None: they are projected here.
        others: those of `source`; None: they are projected here.
        image_embeds: [B, P, Dv] of the own images.
        source: [S, P, Dv] images among which the negative ones are.
        position: int64 [B], the negative images' rows of `source`.
        batch: see `stage1_step`.
        text_all: token ids and masks [N, T_max] of all ranks.
        neg_text_idx: int64 [B], the negative texts' rows of them.
        rows: b of the B samples.
    """
    T, b = batch["text_length"], rows.stop - rows.start
    own = _text_index(batch, rows)
    pair = own // T * (2 * T) + own % T  # in rows (image 0: own, negative; image 1: own, ...)
    padded = torch.arange(b * T, device=own.device)
    slots = torch.cat([pair, padded // T * (2 * T) + T + padded % T, 2 * b * T + own])

    def texts(own: Tensor, everyone: Tensor) -> Tensor:
        own, negative = own[rows, :T], everyone[neg_text_idx[rows], :T]
        return torch.cat([torch.stack([own, negative], dim=1).flatten(0, 1), own])

    project, place = model.qformer.project_image, position[rows]
    negative: tuple[ImageKV, int | Tensor]
    negative = (others, place) if others is not None else (project(source[place]), 1)
    ids, mask = text_all
    logits = model.match(
        [(image if image is not None else project(image_embeds[rows]), 2), negative],
        texts(batch["input_ids"], ids),
        texts(batch["attention_mask"], mask),
        slots,
    )
    pairs = logits[: 2 * b].unflatten(0, (b, 2))
    return pairs[:, 0], logits[2 * b :], pairs[:, 1]


def _matching_loss(pairs: Results, has_negative: Tensor) -> dict[str, Tensor]:
    """Summed loss of what `_match` gives: B pairs that match, then 2 B that do not."""
    logits = torch.cat(pairs)
    labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    labels[: len(has_negative)] = 1
    valid = has_negative.to(logits.dtype)
    row_weight = torch.cat([torch.ones_like(valid), valid, valid])
    return {
        "itm_logits": logits,
        "itm_labels": labels,
        "itm_row_weight": row_weight,
        "loss_itm": losses.itm_loss_sum(logits, labels, row_weight),
    }


def _normalise(out: dict[str, Tensor], on: tuple[str, ...], normalise: str, world: World) -> None:
    """Turns summed losses into means; ITC is a mean over B rows on every rank already."""
    counts = {}
    if "itm" in on:
        counts["loss_itm"] = (1 + 2 * out["has_negative"]).sum()
    if "lm" in on:
        targets = out["lm_targets"]
        counts["loss_lm"] = torch.full((), len(targets), device=targets.device)
    out |= mean_losses({name: out[name] for name in counts}, counts, normalise, world)


def mean_losses(
    sums: Mapping[str, Tensor], counts: Mapping[str, Tensor], normalise: str, world: World
) -> dict[str, Tensor]:
    """Summed losses over counts of this rank ("rank") or of all ranks ("global").

    DDP averages gradients over ranks, so with global counts a rank's share is scaled by their
    number.

    Args:
        sums: scalars.
        counts: int64 scalars under the same names.
        normalise: "global" or "rank".
        world: the ranks.
    """
    if not sums:
        return {}
    total, ranks = torch.stack(list(counts.values())), 1
    if normalise == "global":
        total, ranks = all_reduce_sum(total, world), world.size
    return {
        name: sums[name] * ranks / count
        for name, count in zip(counts, total.clamp(min=1), strict=True)
    }
