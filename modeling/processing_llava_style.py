"""Processor: conversations and pictures -> what the model takes, each picture's placeholder at its full length."""

from typing import Any

from transformers.processing_utils import MultiModalData, ProcessorMixin

from .chat_templates import vicuna_template, with_images
from .token_grid import num_image_tokens


class LlavaStyleProcessor(ProcessorMixin):
    """Image processor and tokenizer under one roof.

    Args:
        image_processor (`LlavaStyleImageProcessor`): also knows how many tokens a canvas becomes (`downsampling`).
        tokenizer: of the language model; must know `image_token` as one token.
        chat_template (`str`, *optional*): the tokenizer's own where not given, and the paper's Vicuna v1.5 template
            where it has none. A template that only takes text is extended to take pictures (see `with_images`).
        image_token (`str`): the placeholder; the tokenizer's own `image_token` comes first.

    In text, one placeholder stands for one picture and is expanded to `num_image_tokens` of them.
    `apply_chat_template` pads on the left where it adds a generation prompt, unless told otherwise.
    """

    def __init__(self, image_processor, tokenizer, chat_template=None, image_token: str = "<image>"):
        self.image_token = getattr(tokenizer, "image_token", None) or image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        if tokenizer.encode(self.image_token, add_special_tokens=False) != [self.image_token_id]:
            raise ValueError(
                f"The tokenizer does not know {self.image_token!r} as one token: add it with "
                f"tokenizer.add_tokens([{self.image_token!r}], special_tokens=True) and resize the model's embeddings."
            )
        variables = {**tokenizer.special_tokens_map, "image_token": self.image_token}
        chat_template = chat_template or tokenizer.chat_template or vicuna_template(tokenizer)
        if isinstance(chat_template, dict):  # several by name
            chat_template = {**chat_template, "default": with_images(chat_template["default"], **variables)}
        else:
            chat_template = with_images(chat_template, **variables)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def default_template(self) -> str:
        """Jinja source of the template that is used where none is asked for by name."""
        template = self.chat_template
        return template["default"] if isinstance(template, dict) else template  # type: ignore[return-value]  # not None

    @property
    def template_variables(self) -> dict[str, str]:
        """What the chat template sees beside the messages: the special tokens by name, `image_token` among them."""
        return {**self.tokenizer.special_tokens_map, "image_token": self.image_token}

    def apply_chat_template(self, conversation, chat_template=None, *, processor_kwargs=None, **kwargs):
        """As everywhere in Transformers, but padded on the left where `add_generation_prompt` is set."""
        if kwargs.get("add_generation_prompt"):
            processor_kwargs = {"padding_side": "left", **(processor_kwargs or {})}
        if "image_token" in (chat_template or self.default_template):
            kwargs.setdefault("image_token", self.image_token)
        return super().apply_chat_template(conversation, chat_template, processor_kwargs=processor_kwargs, **kwargs)

    def prepare_inputs_layout(self, images=None, text=None, **kwargs):
        """Load every picture, and check that each text has as many placeholders as pictures."""
        texts = [text] if isinstance(text, str) else text
        nested = isinstance(images, list | tuple) and all(isinstance(row, list | tuple) for row in images)
        if nested and texts is not None and len(images) == len(texts):
            for row, (row_text, row_images) in enumerate(zip(texts, images, strict=True)):
                if row_text.count(self.image_token) != len(row_images):
                    raise ValueError(
                        f"Text {row} has {row_text.count(self.image_token)} {self.image_token} placeholders but "
                        f"{len(row_images)} pictures: each picture needs exactly one placeholder."
                    )
        if nested and not any(images):  # text-only rows
            images = None
        return super().prepare_inputs_layout(images=images, text=text, **kwargs)

    def _process_images(self, images, **kwargs: Any):
        """With the size of each canvas, unless the image processor or the caller decides."""
        if kwargs.get("return_image_sizes", self.image_processor.return_image_sizes) is None:
            kwargs["return_image_sizes"] = True
        return super()._process_images(images, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The placeholder of picture `image_idx` at its full length."""
        sizes = image_inputs.get("image_sizes")
        height, width = image_inputs["pixel_values"].shape[-2:] if sizes is None else sizes[image_idx]
        return self.image_token * self.count_image_tokens(int(height), int(width))

    def count_image_tokens(self, canvas_height: int, canvas_width: int) -> int:
        """Tokens that a canvas of this size, in pixels, becomes."""
        return num_image_tokens(canvas_height, canvas_width, self.image_processor.downsampling)

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs: Any) -> MultiModalData:
        """Tokens for pictures of these raw (height, width): what vLLM asks before it has any pixels."""
        if image_sizes is None:
            return MultiModalData()
        geometries = [self.image_processor.get_geometry(height, width) for height, width in image_sizes]
        counts = [self.count_image_tokens(g.canvas_height, g.canvas_width) for g in geometries]
        return MultiModalData(num_image_tokens=counts, num_image_patches=[1] * len(counts))
