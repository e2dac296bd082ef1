"""The image tower, frozen or trained: any timm model that gives a map or a sequence of features.

Shapes: B images, S image side in pixels, P image tokens, Dv tower width.

A vision transformer loses its last block and final norm (BLIP-2 reads the second last layer,
section 3.4 of the paper) and gives all tokens, class token first. A convolutional tower gives its
last feature map, one token per cell (CLIP ResNets: the map before attention pooling).
`ln_vision`, the trainable norm that follows the tower, belongs to the Q-Former.
"""

import contextlib
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from blip2_train.errors import UserError
from blip2_train.models import float8
from blip2_train.models.freezing import EvalOnly, state_digest
from blip2_train.models.tower_training import (
    Features,
    RecomputableTower,
    freeze_unread,
    reference_positions,
    resized_positions,
    without_values,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PRECISIONS = ("native", "float8")
# Arguments of timm that other keys stand for, or that would bring weights from another place.
SET_ELSEWHERE = {
    "num_classes", "pretrained", "img_size", "checkpoint_path", "pretrained_cfg",
    "pretrained_cfg_overlay", "cache_dir",
}  # fmt: skip


class VisionTower(EvalOnly, RecomputableTower):
    """A timm model as a source of image tokens, frozen unless it is `trainable`.

    Trained or not, it computes in eval mode: no dropout, no dropped paths, batch norms with the
    statistics that they have.

    Args:
        name: timm model, with the tag of its weights ("eva_giant_patch14_clip_224.laion400m").
        image_size: side in pixels (S); None takes the weights' own. Position embeddings are
            interpolated where it differs.
        weights: "pretrained" (downloaded by timm), "random" (drawn from `seed`), or the path of
            a file of timm weights, for machines without a network.
        drop_last_block: take the second last block's output; only for transformers.
        dtype: "float32" or "bfloat16", in which weights are stored and features are computed.
        precision: "native", which is `dtype`, or "float8": linear layers compute in float8 from
            `convert` on, features stay in `dtype`, which must be bfloat16.
        trainable: it learns with the rest: weights in float32, computed in the precision of the
            training (autocast), with a gradient, and stored in checkpoints.
        gradient_checkpointing: of a trained tower: recompute blocks in the backward pass instead of
            keeping their activations. Features and gradients stay the same.
        seed: of the random weights: where frozen, they are not in checkpoints, so each start draws
            them again.
        options: further arguments of the timm model, such as its depth.

    Raises:
        UserError: the model or the weights cannot be had, there is no block to drop, nothing that
            float8 could compute, or a trained tower is not in float32 or cannot recompute blocks.
    """

    group = "vision"

    def __init__(
        self,
        name: str,
        *,
        image_size: int | None = None,
        weights: str = "pretrained",
        drop_last_block: bool = True,
        dtype: str = "float32",
        precision: str = "native",
        trainable: bool = False,
        gradient_checkpointing: bool = False,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check_precision(precision, dtype)
        _check_trainable(trainable, gradient_checkpointing, precision, dtype)
        self.name = name
        self.weights = weights
        self.precision = precision
        self.trainable = trainable
        self.tower = create_tower(
            name,
            image_size=image_size,
            weights=weights,
            seed=seed,
            drop_last_block=drop_last_block,
            options=options,
        )
        self.image_size, self.mean, self.std = expected_input(self.tower, image_size)
        if precision == "float8" and not float8.suitable_linears(self.tower):
            raise UserError(
                f"vision.precision=float8: {name} has no linear layer whose sizes are multiples of "
                f"{float8.MULTIPLE}; set vision.precision=native"
            )
        self._digest: str | None = None  # of the weights before `convert`
        self.tower.to(DTYPES[dtype])
        self.requires_grad_(trainable).eval()
        shape = feature_shape(image_tokens, self.tower, self.image_size, name=name)
        self.num_tokens, self.width = shape[1:]
        if trainable:
            freeze_unread(image_tokens, self.tower, self.image_size)
        self.gradient_checkpointing = gradient_checkpointing

    @property
    def dtype(self) -> torch.dtype:
        """Of the features."""
        return next(self.tower.parameters()).dtype

    def forward(self, image: Tensor) -> Tensor:
        """Image tokens; of a frozen tower without gradient and outside autocast.

        Args:
            image: [B, 3, S, S], uint8 or already normalised float.

        Returns:
            [B, P, Dv] before `ln_vision`, in the tower's dtype; of a trained tower under autocast
            in what its last sum comes out in.
        """
        if image.dtype == torch.uint8:
            image = normalise(image, self.mean, self.std)
        image = image.to(self.dtype)
        if self.trainable:
            return image_tokens(self.tower, image)
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            return image_tokens(self.tower, image)

    def fitted(self, name: str, value: Tensor) -> Tensor:
        """A weight of another such tower, its table of positions brought to this image size.

        Args:
            name: of the weight, as this module's `state_dict` has it.
            value: of that tower.
        """
        own = self.state_dict().get(name)
        is_table = name == "tower.pos_embed" and own is not None and own.ndim == value.ndim == 3
        if not is_table or own.shape == value.shape:  # type: ignore[union-attr]
            return value
        return resized_positions(self.tower, value)

    @torch.no_grad()
    def blank(self) -> Tensor:
        """Tokens [1, P, Dv] of the least informative image."""
        device = next(self.tower.parameters()).device
        return self(blank_image(self.mean, self.image_size).to(device))

    def made_up(self, samples: int) -> Tensor:
        """Input of the right shape: black pictures."""
        return torch.zeros(samples, 3, self.image_size, self.image_size, dtype=torch.uint8)

    def convert(self) -> None:
        """Goes over to `precision` on the device where the weights are; "native" needs nothing.

        A step of its own and not the end of construction: training compares the features before
        and after it on the device that trains, and a GPU rounds a billion weights at once.

        Raises:
            UserError: the device has no float8 products.
        """
        if self.precision == "native" or self._digest is not None:
            return
        float8.check_device(next(self.tower.parameters()).device)
        digest = self.digest()
        float8.quantize_linears(self.tower)
        self._digest = digest

    def digest(self) -> str:
        """SHA-256 of the tower's weights, be they converted since or not.

        The identity that a checkpoint records in the place of frozen ones.
        """
        return self._digest or state_digest(self.tower.state_dict())


def blank_image(mean: Sequence[float], size: int) -> Tensor:
    """The picture that normalisation turns into zeros: the least informative input to the tower.

    Args:
        mean: per channel, in units of [0, 1].
        size: side in pixels (S).

    Returns:
        uint8 [1, 3, S, S], exact to half a step of 8 bits.
    """
    colour = torch.tensor([round(255 * value) for value in mean], dtype=torch.uint8)
    return colour[None, :, None, None].repeat(1, 1, size, size)


def normalise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scales pixels to [0, 1] and normalises each channel, on any device.

    Args:
        image: uint8 [B, 3, S, S].
        mean: per channel, in units of [0, 1].
        std: per channel, in units of [0, 1].

    Returns:
        float32 [B, 3, S, S].
    """
    out = image.float().div_(255)
    # Channel by channel with plain numbers: a tensor of means would be copied to the device in
    # every step, and the host would wait for it.
    for channel in range(out.shape[1]):
        out[:, channel].sub_(mean[channel]).div_(std[channel])
    return out


def image_tokens(tower: nn.Module, image: Tensor, key: str = "vision") -> Tensor:
    """A timm model's features as a sequence: [B, 3, S, S] -> [B, P, Dv].

    Raises:
        UserError: the model gives several maps; names the configuration group `key`.
    """
    features = tower.forward_features(image)  # type: ignore[operator]
    if not isinstance(features, Tensor):
        raise UserError(
            f"{key}: {type(tower).__name__} gives several feature maps, not one; take another "
            "timm model"
        )
    if features.ndim == 4:  # [B, Dv, h, w], or [B, h, w, Dv] of models that say so
        if getattr(tower, "output_fmt", "NCHW") == "NHWC":
            return features.flatten(1, 2)
        return features.flatten(2).transpose(1, 2)
    return features


def create_tower(
    name: str,
    *,
    image_size: int | None,
    weights: str,
    seed: int,
    drop_last_block: bool = False,
    options: Mapping[str, Any] | None = None,
    key: str = "vision",
) -> nn.Module:
    """A timm model without classifier, with all of its weights; float32 and in training mode.

    Args:
        name: see `VisionTower`, as are the next four.
        image_size: side in pixels, or None.
        weights: "pretrained", "random" or a path.
        seed: of random weights; nobody else's random numbers are disturbed.
        drop_last_block: without the last block, the final norm and the head.
        options: further arguments of the timm model.
        key: configuration group that errors name.

    Raises:
        UserError: the model or some of its weights cannot be had, or there is no block to drop.
    """
    with _recorded_missing_keys() as missing, reference_positions():
        tower = _create(name, image_size, weights, seed, dict(options or {}), key)
    if drop_last_block:
        _drop_last_block(name, tower, key)
    if lacking := sorted(set(missing) & set(tower.state_dict())):
        raise UserError(
            f"{key}.weights={weights} lacks {len(lacking)} weights of {name}, the first is "
            f"{lacking[0]}; give a file of this model's weights"
        )
    # Convolutions are faster with channels last, on processors and GPUs; nothing else notices.
    return tower.to(memory_format=torch.channels_last)


def expected_input(
    tower: nn.Module, image_size: int | None
) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Side in pixels, and mean and std per channel, of a timm model's images.

    Args:
        tower: any timm model.
        image_size: the side if it is not the weights' own.
    """
    pretrained: dict[str, Any] = tower.pretrained_cfg  # type: ignore[assignment]
    return image_size or pretrained["input_size"][-1], pretrained["mean"], pretrained["std"]


def feature_shape(
    features: Features,
    tower: nn.Module,
    image_size: int,
    *,
    name: str,
    key: str = "vision",
) -> torch.Size:
    """Shape of one image's features, without computing them.

    Args:
        features: see `without_values`, as the next two.
        tower: in eval mode.
        image_size: side in pixels (S).
        name: of the model, for errors.
        key: configuration group that errors name.

    Raises:
        UserError: the model does not take images of this size.
    """
    try:
        return without_values(features, tower, image_size)[0].shape
    except AssertionError as error:  # timm's checks of the input's size
        raise UserError(f"{key}.image_size={image_size} does not suit {name}: {error}") from error


def _check_precision(precision: str, dtype: str) -> None:
    if precision not in PRECISIONS:
        raise UserError(f"vision.precision={precision} must be one of {', '.join(PRECISIONS)}")
    if precision == "float8":
        if dtype != "bfloat16":
            raise UserError(
                f"vision.precision=float8 gives features in bfloat16, and vision.dtype={dtype}; "
                "set vision.dtype=bfloat16"
            )
        float8.check_package()


def _check_trainable(
    trainable: bool, gradient_checkpointing: bool, precision: str, dtype: str
) -> None:
    if trainable and (dtype != "float32" or precision != "native"):
        raise UserError(
            "vision.trainable=true trains float32 weights, in the precision of the training: set "
            f"vision.dtype=float32 and vision.precision=native, not {dtype} and {precision}"
        )
    if gradient_checkpointing and not trainable:
        raise UserError(
            "vision.gradient_checkpointing=true is for a tower that is trained: set "
            "vision.trainable=true, or vision.gradient_checkpointing=false"
        )


def _create(
    name: str, image_size: int | None, weights: str, seed: int, given: dict[str, Any], key: str
) -> nn.Module:
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
        raise UserError(f"{key}.name={name} is not a timm model; close names: {close}")
    try:
        published = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = [full.partition(".")[2] for full in timm.list_pretrained(name.partition(".")[0])]
        raise UserError(f"{key}.name={name}: {error} Its tags: {', '.join(tags)}") from error
    assert published is not None
    if taken := sorted(SET_ELSEWHERE & set(given)):
        raise UserError(f"{key}.options may not set {', '.join(taken)}; other keys say it")
    options: dict[str, Any] = {"num_classes": 0, **given}
    if weights not in ("pretrained", "random"):
        if not Path(weights).is_file():
            raise UserError(
                f"{key}.weights={weights} is no file; give a file of timm weights, "
                "'pretrained' or 'random'"
            )
        # the weights' own format may be another one
        options["pretrained_cfg_overlay"] = {"file": weights, "custom_load": False}
    if image_size is not None and image_size != published.input_size[-1]:
        options["img_size"] = image_size
    # A file of another kind fails in as many ways as there are kinds.
    unreadable = (OSError, RuntimeError) if weights in ("pretrained", "random") else (Exception,)
    # The draw must not depend on, or disturb, anybody else's random numbers (weights are drawn on
    # the CPU; torch.manual_seed would seed the GPUs too).
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            try:
                return timm.create_model(name, pretrained=weights != "random", **options)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
                options.pop("img_size")  # convolutional towers take any size
                return timm.create_model(name, pretrained=weights != "random", **options)
        except Exception as error:
            if given and weights == "random":  # nothing else can be wrong, in as many ways
                raise UserError(f"{key}.options={given} do not suit {name}: {error}") from error
            if not isinstance(error, unreadable):
                raise
            source = "download" if weights == "pretrained" else f"file {weights}"
            raise UserError(
                f"the weights of {key}.name={name} could not be loaded ({source}): "
                f"{(str(error) or type(error).__name__).splitlines()[0]}; without a network set "
                f"{key}.weights to a file of timm weights"
            ) from error


@contextlib.contextmanager
def _recorded_missing_keys() -> Iterator[list[str]]:
    """Names that loading leaves at their random values: timm passes over them in silence."""
    missing: list[str] = []
    original = nn.Module.load_state_dict

    def load_state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        missing.extend(result.missing_keys)
        return result

    nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign]
    try:
        yield missing
    finally:
        nn.Module.load_state_dict = original  # type: ignore[method-assign]


def _drop_last_block(name: str, tower: nn.Module, key: str) -> None:
    blocks = getattr(tower, "blocks", None)
    is_transformer = hasattr(tower, "pos_embed") or hasattr(tower, "rope")
    is_transformer &= not hasattr(tower, "stages") and not hasattr(tower, "stage_ends")
    if not is_transformer or blocks is None or len(blocks) < 2:
        raise UserError(
            f"{key}.drop_last_block=true needs a plain transformer of two or more blocks, which "
            f"{name} is not; set {key}.drop_last_block=false"
        )
    tower.prune_intermediate_layers([len(blocks) - 2], prune_norm=True, prune_head=True)  # type: ignore[operator]
