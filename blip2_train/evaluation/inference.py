"""A trained model to use: `blip2_train.load` gives one.

Shapes: B images or texts, S image side in pixels, Q queries, E width of the contrastive features.
"""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from blip2_train.data.batch import tokenise
from blip2_train.data.images import BadImage, load_rgb, to_rgb
from blip2_train.data.language import LanguageTokenizer, decode, encode_prompts
from blip2_train.data.question_batch import question_ids
from blip2_train.data.text import clean_caption, clean_question
from blip2_train.data.transforms import EvalTransform
from blip2_train.errors import UserError
from blip2_train.evaluation.retrieval import chunks
from blip2_train.models.stage1 import widen

# PIL images or paths of image files; or uint8 [B, 3, S, S] of the model's image size.
Images = Sequence[Image.Image | str | Path] | Tensor

IMAGES_AT_ONCE = 64
TEXTS_AT_ONCE = 256


@dataclass
class Blip2:
    """A model with its weights, and how it reads images and text.

    Whatever is given is cut into parts, so that memory does not grow with it. Texts are cleaned as
    captions are in training (lower case, no sentence marks).

    Attributes:
        kind: "stage1", "stage2" or "clip".
        cfg: configuration of the training.
        model: of the kind, in evaluation mode, without gradients.
        device: where it is.
        step: optimizer steps that it was trained for.
        digest: of the checkpoint file.
        image_size: side in pixels of what the model sees (S).
        tokenizer: BERT's, of the Q-Former or of clip's texts; None where no text is read by it.
        language: the language model's tokenizer, of stage 2 alone.
        dtype: in which products are computed; frozen parts may be stored in another.
        path: of the checkpoint.
    """

    kind: str
    cfg: Mapping[str, Any]
    model: Any
    device: torch.device
    step: int
    digest: str
    image_size: int
    tokenizer: Any
    language: LanguageTokenizer | None
    dtype: torch.dtype
    path: Path

    @property
    def asks(self) -> bool:
        """Whether the Q-Former reads questions, which it was then trained on (stage 2)."""
        return self.kind == "stage2" and self.cfg["data"].get("text") == "questions"

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Within, trained weights compute in `dtype`; for whoever calls `model` directly."""
        wide = self.dtype == torch.float32
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=not wide)

    @torch.no_grad()
    def encode_image(self, images: Images) -> Tensor:
        """Contrastive features of images.

        Returns:
            float32 [B, Q, E] on the CPU, L2-normalised; Q = 1 of clip. An image and a text are as
            similar as the best of the image's queries.

        Raises:
            UserError: an image cannot be read, or the model was not trained by contrast.
        """
        self.needs("stage1", "clip", loss="itc")
        width = self._width()
        queries = 1 if self.kind == "clip" else self.model.qformer.num_query_tokens
        parts = [torch.empty(0, queries, width)]
        parts += [self._image_feats(part).float().cpu() for part in self._pixels(images)]
        return torch.cat(parts)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Contrastive features of texts.

        Returns:
            float32 [B, E] on the CPU, L2-normalised.

        Raises:
            UserError: the model was not trained by contrast.
        """
        self.needs("stage1", "clip", loss="itc")
        parts = [torch.empty(0, self._width())]
        texts = _list_of_texts(texts)
        for part in chunks(len(texts), TEXTS_AT_ONCE):
            parts.append(self.text_feats(*self.tokens(texts[part])).float().cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def match(self, images: Images, texts: Sequence[str]) -> Tensor:
        """Whether each image and the text of the same number belong together.

        Returns:
            float32 [B] on the CPU, the matching head's probability that they do.

        Raises:
            UserError: there are not as many texts as images, an image cannot be read, or the model
                was not trained to match.
        """
        self.needs("stage1", loss="itm")
        texts = _list_of_texts(texts)
        _same_number(images, texts, "texts")
        parts, start = [torch.empty(0)], 0
        for pixels in self._pixels(images):
            ids, mask = self.tokens(texts[start : start + len(pixels)])
            start += len(pixels)
            with self.autocast():
                image = self.model.qformer.project_image(self.model.vision(pixels))
                logits = self.model.match([(image, 1)], ids, mask)
            parts.append(widen(logits).softmax(dim=1)[:, 1].float().cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def caption(
        self,
        images: Images,
        *,
        prompt: str | None = None,
        num_beams: int = 5,
        max_new_tokens: int = 30,
        min_new_tokens: int = 1,
        length_penalty: float = 1.0,
        top_p: float | None = None,
    ) -> list[str]:
        """What the model says of images.

        Args:
            images: see `Images`.
            prompt: that captions continue, and which is not in them (stage 2); None: the one of
                the training.
            num_beams: 1: greedy.
            max_new_tokens: of a caption, its end included.
            min_new_tokens: before the end may stand.
            length_penalty: of beams, see `LanguageModel.generate`.
            top_p: None: the most likely caption; else nucleus sampling, with one beam.

        Returns:
            B captions.

        Raises:
            UserError: an image cannot be read, or the model writes no captions, or not so.
        """
        self.needs("stage1", "stage2", loss="lm")
        if self.asks:
            raise UserError(f"{self.path} answers questions and writes no captions: see generate")
        search = {"num_beams": num_beams, "length_penalty": length_penalty, "top_p": top_p}
        if self.kind == "stage2":
            search |= {"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens}
            start = self.cfg["data"]["prompt"] if prompt is None else prompt
            return self._continue(images, [start] * len(images), search)
        if prompt:
            raise UserError(
                f"prompt={prompt!r}: a stage-1 model continues no prompt; take a stage-2 model"
            )
        longest = self.model.qformer.position_embeddings.num_embeddings + 1
        said: list[str] = []
        for pixels in self._pixels(images):
            with self.autocast():
                image = self.model.qformer.project_image(self.model.vision(pixels))
                try:
                    ids = self.model.generate(
                        image,
                        max_length=min(max_new_tokens + 1, longest),  # [DEC] counts there
                        min_length=min_new_tokens + 1,
                        **search,
                    )
                except ValueError as error:
                    raise UserError(f"captions cannot be searched so: {error}") from error
            said += self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in said]

    @torch.no_grad()
    def generate(
        self,
        images: Images,
        prompts: Sequence[str],
        *,
        questions: Sequence[str] | None = None,
        image_of: Sequence[int] | None = None,
        num_beams: int = 5,
        max_new_tokens: int = 10,
        min_new_tokens: int = 1,
        length_penalty: float = -1.0,
        top_p: float | None = None,
    ) -> list[str]:
        """What a stage-2 model says to a prompt for each image, such as a question.

        Args:
            images: see `Images`.
            prompts: B texts, taken as they are.
            questions: B texts for the Q-Former to read, cleaned as in training, where it was
                trained with them (`asks`); None where it was not.
            image_of: number of the image of each prompt, where some share one; None: each has its
                own.
            num_beams: 1: greedy.
            max_new_tokens: of an answer, its end included.
            min_new_tokens: before the end may stand.
            length_penalty: of beams, see `LanguageModel.generate`; below 0 short answers win.
            top_p: None: the most likely answer; else nucleus sampling, with one beam.

        Returns:
            B texts, the prompts not in them.

        Raises:
            UserError: there are not as many prompts as images, or as questions, an image cannot be
                read, the model has no language model, or questions are missing or not read.
        """
        self.needs("stage2")
        prompts = _list_of_texts(prompts)
        if image_of is None:
            _same_number(images, prompts, "prompts")
        if self.asks is (questions is None):
            raise UserError(
                f"the Q-Former of {self.path} reads questions: give questions="
                if self.asks
                else f"the Q-Former of {self.path} reads no questions: leave questions= out"
            )
        if questions is not None and len(_list_of_texts(questions)) != len(prompts):
            raise UserError(f"{len(prompts)} prompts and {len(questions)} questions do not agree")
        return self._continue(
            images,
            prompts,
            {
                "num_beams": num_beams,
                "max_new_tokens": max_new_tokens,
                "min_new_tokens": min_new_tokens,
                "length_penalty": length_penalty,
                "top_p": top_p,
            },
            questions=questions,
            image_of=image_of,
        )

    # -- parts, also for tasks -------------------------------------------------------------------

    def needs(self, *kinds: str, loss: str | None = None) -> None:
        """Refuses what this model was not trained for.

        Args:
            kinds: that can do it.
            loss: of stage 1 that must have been trained.

        Raises:
            UserError: this is another kind, or was trained without that loss.
        """
        if self.kind not in kinds:
            raise UserError(
                f"{self.path} is of kind {self.kind}, and this needs {' or '.join(kinds)}; give "
                "the checkpoint of such a run"
            )
        weights = self.cfg["loss"].get("weights") if self.kind == "stage1" else None
        if loss is not None and weights is not None and not weights[loss]:
            raise UserError(
                f"{self.path} was trained with loss.weights.{loss}=0, so it never learned this; "
                "give a checkpoint that was trained with it"
            )

    def read(self, images: Images) -> Tensor:
        """uint8 [B, 3, S, S] of images, on the CPU.

        Raises:
            UserError: one cannot be read, or a tensor is not of that shape.
        """
        size = self.image_size
        if isinstance(images, Tensor):
            if images.dtype != torch.uint8 or images.shape[1:] != (3, size, size):
                raise UserError(
                    f"images of {images.dtype} {list(images.shape)} are not uint8 [B, 3, {size}, "
                    f"{size}], which this model reads; give PIL images or paths instead"
                )
            return images
        transform = EvalTransform(size)
        pixels = [transform(_open(image)) for image in _list_of_images(images)]
        return torch.stack(pixels) if pixels else torch.empty(0, 3, size, size, dtype=torch.uint8)

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask int64 [B, T] of cleaned texts, on the device; T is the longest of them."""
        longest = self.cfg["text"]["max_tokens"]
        cleaned = [clean_caption(text, self.cfg["data"]["max_words"]) for text in texts]
        ids, mask = tokenise(cleaned, self.tokenizer, longest)
        length = int(mask.sum(dim=1).max()) if len(ids) else longest
        return ids[:, :length].to(self.device), mask[:, :length].to(self.device)

    def text_feats(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, T] ids and mask -> [B, E] contrastive features, on the device."""
        with self.autocast():
            found = self.model.encode_text(ids, mask)
        return found if self.kind == "clip" else found[1]

    def _image_feats(self, pixels: Tensor) -> Tensor:
        with self.autocast():
            if self.kind == "clip":
                return self.model.encode_image(pixels)[:, None]
            image = self.model.qformer.project_image(self.model.vision(pixels))
            return self.model.encode_image(image).image_feats

    def _width(self) -> int:
        return self.model.text_proj.out_features

    def _pixels(self, images: Images) -> Iterable[Tensor]:
        if not isinstance(images, Tensor):
            images = _list_of_images(images)
        for part in chunks(len(images), IMAGES_AT_ONCE):
            yield self.read(images[part]).to(self.device)

    def _continue(
        self,
        images: Images,
        prompts: Sequence[str],
        search: Mapping[str, Any],
        *,
        questions: Sequence[str] | None = None,
        image_of: Sequence[int] | None = None,
    ) -> list[str]:
        """Text of the language model behind each prompt and its image."""
        assert self.language is not None, "stage 2 has a language model"
        model, said = self.model, list[str]()
        lm = model.language_model
        if not isinstance(images, Tensor):
            images = _list_of_images(images)
        image_of = list(range(len(prompts)) if image_of is None else image_of)
        for part in chunks(len(prompts), IMAGES_AT_ONCE):
            ids, mask = encode_prompts(prompts[part], self.language, encoder=lm.is_encoder_decoder)
            self._check_length(ids.shape[1], search["max_new_tokens"])
            seen = sorted(set(image_of[part]))  # each once through the tower
            rows = torch.tensor([seen.index(number) for number in image_of[part]])
            if isinstance(images, Tensor):
                pixels = self.read(images[torch.tensor(seen)])
            else:
                pixels = self.read([images[number] for number in seen])
            question = None if questions is None else self._question(questions[part])
            with self.autocast():
                tokens = model.vision(pixels.to(self.device))[rows.to(self.device)]
                out = model.generate(
                    model.qformer.project_image(tokens),
                    ids.to(self.device),
                    mask.to(self.device),
                    question=question,
                    end_token_id=self.language.end_id,
                    pad_token_id=self.language.pad_id,
                    **search,
                )
            said += decode(out, self.language)
        return said

    def _question(self, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask int64 [B, T] of questions as the Q-Former reads them, on the device."""
        text, words = self.cfg["text"], self.cfg["data"]["max_words"]
        cleaned = [clean_question(question, words) for question in questions]
        longest, bucket = text["max_question_tokens"], text["bucket"]
        ids, mask = question_ids(cleaned, self.tokenizer, longest, bucket)
        return ids.to(self.device), mask.to(self.device)

    def _check_length(self, prompt: int, new: int) -> None:
        lm, queries = self.model.language_model, self.model.qformer.num_query_tokens
        needed = queries + prompt + (0 if lm.is_encoder_decoder else new)
        if lm.max_positions is not None and needed > lm.max_positions:
            raise UserError(
                f"the language model reads {lm.max_positions} positions, and {queries} queries, a "
                f"prompt of {prompt} tokens and max_new_tokens={new} need {needed}; shorten them"
            )


def _open(image: Image.Image | str | Path) -> Image.Image:
    try:
        if isinstance(image, Image.Image):
            return to_rgb(image)
        return load_rgb(Path(image).read_bytes())
    except (OSError, BadImage) as error:
        raise UserError(f"the image {image} cannot be read: {error}") from error


def _list_of_images(images: Any) -> list[Any]:
    if isinstance(images, Image.Image | str | Path):
        raise UserError("images are a list of PIL images or paths; put the one image into a list")
    return list(images)


def _list_of_texts(texts: Any) -> list[str]:
    if isinstance(texts, str):
        raise UserError(f"texts are a list; put {texts!r} into one")
    return list(texts)


def _same_number(images: Images, texts: list[str], name: str) -> None:
    count = len(images) if isinstance(images, Tensor) else len(_list_of_images(images))
    if count != len(texts):
        raise UserError(f"{count} images and {len(texts)} {name}: there must be one for each image")
