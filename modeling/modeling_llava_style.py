"""The LLaVA-style vision-language model: encoder -> tap norm -> connector -> language model.

Layout of the weights, the same in both classes: `vision_tower` (any Transformers Backbone), `connector`,
`language_model` (any causal language model, whole, so that its own head, logit scaling and weight tying hold).
"""

import copy
import inspect
import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_llava_style import LlavaStyleConfig
from .connectors import Connector, ConnectorLinear
from .image_batches import check_image_tokens, check_tap_features, group_by_size
from .own_backbones import build_backbone, freeze_neutral_norms
from .rank_balance import dummy_picture, extra_work
from .token_grid import encoder_downsampling, grid_size
from .token_positions import TOKEN_POSITIONS

logger = logging.get_logger(__name__)


def parameter_free_layer_norm(features: torch.Tensor) -> torch.Tensor:
    """LayerNorm over the last axis, scale 1, shift 0, eps 1e-5, in float32: the norm the paper puts on VMamba's tap."""
    return nn.functional.layer_norm(features.float(), features.shape[-1:]).to(features.dtype)


TAP_NORMS = {"none": lambda features: features, "layernorm": parameter_free_layer_norm}


class LlavaStylePreTrainedModel(PreTrainedModel):
    config: LlavaStyleConfig
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, ConnectorLinear):
            super()._init_weights(module)
            return
        for parameter, value in zip((module.weight, module.bias), module.draw(), strict=True):
            init.copy_(parameter, value)


class LlavaStyleModel(LlavaStylePreTrainedModel):
    """Encoder, connector and language model, giving hidden states of the text without logits.

    Args:
        config: What to build.
        vision_tower: A Backbone to take as it is instead of building one from `config.vision_config`.
        language_model: A causal language model to take as it is instead of building one from `config.text_config`.

    Raises:
        ValueError: Unknown connector name, or a language model that takes no `inputs_embeds` or no key-value cache.
    """

    def __init__(
        self,
        config: LlavaStyleConfig,
        vision_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        if vision_tower is None:
            vision_tower = build_backbone(config.vision_config)  # type: ignore[arg-type]  # a config once it is made
        self.vision_tower = vision_tower
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        accepted = inspect.signature(language_model.forward).parameters
        for needed in ("inputs_embeds", "past_key_values"):
            if needed not in accepted:
                raise ValueError(
                    f"{type(language_model).__name__} takes no {needed} and cannot be the language model here: choose "
                    "a decoder-only transformer such as Llama, Qwen2 or Mistral."
                )
        tap_width: int = vision_tower.channels[-1]  # type: ignore[index, assignment]  # BackboneMixin
        text_width: int = language_model.get_input_embeddings().embedding_dim  # type: ignore[assignment]
        self.connector = Connector(
            config.connector,
            tap_width,
            text_width,
            config.connector_seed,
            connector_grid=config.connector_grid,
            connector_factor=config.connector_factor,
        )
        self.language_model = language_model
        self._language_model_takes = {name: name in accepted for name in ("position_ids", "logits_to_keep")}
        self._said_too_long = False
        self.post_init()
        self.train(self.training)

    def train(self, mode: bool = True) -> "LlavaStyleModel":
        """Switch the mode; a frozen encoder stays in `eval()` and out of the gradient.

        `from_pretrained` makes every loaded parameter trainable and then calls `eval()`, so this is also where a
        loaded model becomes frozen again.
        """
        super().train(mode)
        freeze_neutral_norms(self.vision_tower)
        if self.config.freeze_vision:
            self.vision_tower.requires_grad_(False)
            self.vision_tower.train(mode and self.config.vision_train_mode)
        return self

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def _run_tower(self, pixels: torch.Tensor) -> torch.Tensor:
        """Tap features [n, N, C] in row-major order of pixels [n, 3, H, W]."""
        pixels = pixels.to(self.vision_tower.device, self.vision_tower.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_vision):
            feature_map = self.vision_tower(pixels).feature_maps[-1]  # [n, C, h, w]
        return feature_map.flatten(2).transpose(1, 2)  # [n, h*w, C]

    def get_tap_features(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Features of each image at the tap, before tap norm and connector: what a feature cache stores.

        Args:
            pixel_values: [n, 3, H, W]; images smaller than the batch are padded at the bottom and right.
            image_sizes: [n, 2] height and width of each canvas in pixels; None means all fill H x W. The padding is cut
                off and images of equal size run together, so that each image gets what it would get alone.

        Returns:
            n tensors [N_i, C], rows of the grid one after the other.
        """
        features: dict[int, torch.Tensor] = {}
        for (height, width), indices in group_by_size(pixel_values, image_sizes).items():
            whole = len(indices) == len(pixel_values) and (height, width) == tuple(pixel_values.shape[-2:])
            pixels = pixel_values if whole else pixel_values[indices, :, :height, :width]
            for index, tokens in zip(indices, self._run_tower(pixels), strict=True):
                features[index] = tokens
        return [features[index] for index in range(len(pixel_values))]

    def _tap_features(self, pixel_values, image_sizes, image_features) -> list[torch.Tensor]:
        """Tap features from pixels or from the cache, one of which must be given."""
        if (pixel_values is None) == (image_features is None):
            raise ValueError("Give either pixel_values or image_features (cached tap features), not both or neither.")
        if pixel_values is not None:
            return self.get_tap_features(pixel_values, image_sizes)
        return check_tap_features(image_features, self.connector.in_features)

    def _grids(self, pixel_values, image_sizes, count: int) -> list[tuple[int, int]] | None:
        """Rows and columns of each image's features, where token positions or the connector need them."""
        readers = []
        if TOKEN_POSITIONS[self.config.token_positions] is not None:
            readers.append("token_positions")
        if self.connector.reduction is not None:
            readers.append(f"connector={self.connector.name!r}")
        if not readers:
            return None
        if image_sizes is None and pixel_values is None:
            raise ValueError(
                f"Cached image_features need image_sizes too, since {' and '.join(readers)} depends on the grid."
            )
        sizes = [pixel_values.shape[-2:]] * count if image_sizes is None else image_sizes.tolist()
        if len(sizes) != count:
            raise ValueError(f"image_sizes has {len(sizes)} rows for {count} image(s): give each image's canvas size.")
        downsampling = encoder_downsampling(self.config.vision_config)
        return [grid_size(height, width, downsampling) for height, width in sizes]

    def project(
        self, tap_features: Sequence[torch.Tensor], grids: Sequence[tuple[int, int]] | None = None
    ) -> list[torch.Tensor]:
        """Tap norm, token positions and connector on n tensors [N_i, C], giving n tensors [M_i, D].

        Args:
            grids: Rows and columns (h, w) of each image's features, h * w = N_i; needed where `token_positions` is set
                and where the connector makes fewer tokens, M_i of N_i.
        """
        lengths = [len(features) for features in tap_features]
        for index, (grid, length) in enumerate(zip(grids, lengths, strict=True) if grids is not None else ()):
            if math.prod(grid) != length:
                raise ValueError(
                    f"Image {index} has {length} features at the tap, but its size in image_sizes makes a grid of "
                    f"{grid[0]}x{grid[1]}: give the sizes of the canvases that the features were made of."
                )
        weight: torch.Tensor = self.connector.layers[0].weight  # type: ignore[assignment]
        tokens = torch.cat([features.to(weight.device) for features in tap_features])  # [sum N_i, C]
        tokens = TAP_NORMS[self.config.tap_norm](tokens)
        encode = TOKEN_POSITIONS[self.config.token_positions]
        if encode is not None and grids is not None:
            codes = {grid: encode(*grid, tokens.shape[-1]) for grid in set(grids)}
            tokens = tokens + torch.cat([codes[grid] for grid in grids]).to(tokens)
        if self.connector.reduction is not None:
            reduced = self.connector.reduce(tokens.split(lengths), grids)
            lengths, tokens = [len(features) for features in reduced], torch.cat(reduced)  # [sum M_i, C']
        return list(self.connector(tokens.to(weight.dtype)).split(lengths))

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        image_features: Sequence[torch.Tensor] | torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Image features in the width of the language model.

        Args:
            pixel_values, image_sizes: As in `get_tap_features`.
            image_features: Cached tap features instead of pixels, [n, N, C] or n tensors [N_i, C].

        Returns:
            `pooler_output`: n tensors [N_i, D], one for each image; `model_downsampling(config)` says how many.
        """
        tap_features = self._tap_features(pixel_values, image_sizes, image_features)
        grids = self._grids(pixel_values, image_sizes, len(tap_features))
        features = self.project(tap_features, grids)
        return BaseModelOutputWithPooling(pooler_output=features)  # type: ignore[arg-type]  # a list, as stock VLMs'

    def _features_and_zero(
        self,
        pixel_values: torch.Tensor | None,
        image_sizes: torch.Tensor | None,
        image_features: Sequence[torch.Tensor] | torch.Tensor | None,
    ) -> tuple[list[torch.Tensor] | None, torch.Tensor | None]:
        """Features [N_i, D] of this rank's images, and a zero that ties dummy work for other ranks to the text."""
        have_images = any(images is not None and len(images) > 0 for images in (pixel_values, image_features))
        extra = extra_work(
            self.vision_tower,
            self.connector,
            tower_calls=0 if pixel_values is None else len(group_by_size(pixel_values, image_sizes)),
            have_images=have_images,
            learning=self.training and torch.is_grad_enabled(),
        )
        tap_features = self._tap_features(pixel_values, image_sizes, image_features) if have_images else []
        images = len(tap_features)
        for _ in range(extra.tower_calls):
            tap_features.append(self._run_tower(dummy_picture(self.config.vision_config))[0])
        if extra.project and extra.tower_calls == 0:
            tap_features.append(torch.zeros(1, self.connector.in_features))
        if not tap_features:
            return None, None
        grids = self._grids(pixel_values, image_sizes, images) if have_images else []
        if grids is not None:  # dummies count zero times, wherever they lie
            grids += [(1, len(features)) for features in tap_features[images:]]
        projected = self.project(tap_features, grids)  # one call of the connector, as on every other rank
        zero = torch.cat([features[:0] for features in projected[images:]]).sum() if len(projected) > images else None
        return (projected[:images] if have_images else None), zero

    def embed_inputs(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        image_sizes: torch.Tensor | None,
        image_features: Sequence[torch.Tensor] | torch.Tensor | None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None,
        past_key_values: Cache | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings [B, L, D] with features where the image tokens stand, and those features [sum N_i, D] or None."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        encoded = (mm_encoder_outputs or {}).get("image")
        if encoded is not None and (pixel_values is not None or image_features is not None):
            raise ValueError("Give images once: pixel_values, image_features or mm_encoder_outputs.")
        features, zero = self._features_and_zero(pixel_values, image_sizes, image_features)
        if encoded is not None:
            features = list(encoded.pooler_output)  # type: ignore[arg-type]  # as above

        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        image_token = self.config.image_token_id
        text_ids: torch.Tensor | None = input_ids
        mask = None
        if input_ids is not None and image_token is not None and (features is not None or past_length == 0):
            mask = input_ids == image_token  # [B, L]
            # the image token may lie outside the vocabulary; what stands there now is written over below
            text_ids = input_ids.masked_fill(mask, 0)
        if features is not None and mask is None:
            raise ValueError("Images need input_ids with image tokens, and config.image_token_id to know them by.")
        if mask is not None:
            tokens_per_image = [len(tokens) for tokens in features or []]
            tokens_per_row = mask.sum(-1).tolist()
            # chunked prefill hands over the features of several rows as one tensor, so only the total can be held to it
            check_image_tokens([sum(tokens_per_row)] if encoded is not None else tokens_per_row, tokens_per_image)

        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(text_ids)  # [B, L, D]
        self._warn_if_too_long(past_length + inputs_embeds.shape[1])
        if zero is not None:
            inputs_embeds = inputs_embeds + zero.to(inputs_embeds.device, inputs_embeds.dtype)
        if features is None or mask is None:
            return inputs_embeds, None
        flat = torch.cat(features).to(inputs_embeds.device, inputs_embeds.dtype)  # [sum N_i, D]
        return inputs_embeds.masked_scatter(mask.unsqueeze(-1).to(inputs_embeds.device), flat), flat

    def _warn_if_too_long(self, length: int) -> None:
        text_config = self.config.text_config.get_text_config()  # type: ignore[union-attr]  # as in `__init__`
        limit = getattr(text_config, "max_position_embeddings", None)
        if limit is not None and length > limit and not self._said_too_long:
            self._said_too_long = True
            logger.warning(
                f"A sequence has {length} tokens, images included, but the language model was made for {limit} "
                "(max_position_embeddings): answers may be poor. Use a smaller canvas, fewer images or less text."
            )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        image_features: Sequence[torch.Tensor] | torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ) -> LlavaModelOutputWithPast:
        """See `LlavaStyleForConditionalGeneration.forward`; returns `last_hidden_state` [B, L, D] instead of logits."""
        inputs_embeds, image_hidden_states = self.embed_inputs(
            input_ids, inputs_embeds, pixel_values, image_sizes, image_features, mm_encoder_outputs, past_key_values
        )
        if self._language_model_takes["position_ids"]:
            kwargs["position_ids"] = position_ids
        outputs = self.language_model.base_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )
        return LlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            image_hidden_states=image_hidden_states,
        )


class LlavaStyleWithoutLogits(LlavaStyleModel):
    """A view of a `LlavaStyleForConditionalGeneration`, sharing all its state, whose call stops before the logits."""

    def __init__(self, model: "LlavaStyleForConditionalGeneration"):
        self.__dict__ = model.__dict__

    def __call__(self, *args, **kwargs) -> LlavaModelOutputWithPast:
        return LlavaStyleModel.forward(self, *args, **kwargs)  # even where a trainer has replaced `model.forward`


class LlavaStyleForConditionalGeneration(LlavaStyleModel, GenerationMixin):
    """Answers text about images with text. Arguments as in `LlavaStyleModel`."""

    @property
    def base_model(self) -> LlavaStyleWithoutLogits:
        """What gives hidden states: trainers that project and score them themselves (trl) call it."""
        return LlavaStyleWithoutLogits(self)

    def __init__(
        self,
        config: LlavaStyleConfig,
        vision_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        super().__init__(config, vision_tower, language_model)
        self._never_generate_image_tokens()

    @classmethod
    def from_parts(cls, vision_backbone: PreTrainedModel, language_model: PreTrainedModel, **config_fields):
        """Put a loaded Backbone and a loaded causal language model together with a fresh connector.

        The parts are taken as they are, not copied and not initialised again. The connector takes dtype and device of
        the language model. The result is in `eval()` mode, as after `from_pretrained`.

        Args:
            vision_backbone: Any Backbone; its last output feature is the tap.
            language_model: Any decoder-only causal language model.
            config_fields: Other fields of `LlavaStyleConfig`, such as `image_token_id` and `connector`.
        """
        config = LlavaStyleConfig(
            vision_config=vision_backbone.config, text_config=language_model.config, **config_fields
        )
        for part in (vision_backbone, language_model):
            for module in part.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]
        model = cls(config, vision_backbone, language_model)
        model.connector.to(language_model.device, language_model.dtype)
        if language_model.can_generate():
            model.generation_config = copy.deepcopy(language_model.generation_config)
            model._never_generate_image_tokens()
        return model.eval()

    def _never_generate_image_tokens(self) -> None:
        """An answer holds no image, so the image token is kept out of it; saved with the generation config."""
        token = self.config.image_token_id
        suppressed = self.generation_config.suppress_tokens or []
        if token is not None and token not in suppressed:
            self.generation_config.suppress_tokens = [*suppressed, token]

    @torch.no_grad()
    def generate(self, *args, image_features: Sequence[torch.Tensor] | torch.Tensor | None = None, **kwargs):
        """`GenerationMixin.generate`, which also takes `image_features` (cached tap features) in place of pixels."""
        if image_features is not None:
            if kwargs.get("pixel_values") is not None:
                raise ValueError("Give either pixel_values or image_features (cached tap features), not both.")
            encoded = self.get_image_features(
                image_features=image_features, image_sizes=kwargs.pop("image_sizes", None)
            )
            kwargs["mm_encoder_outputs"] = {"image": encoded}
        return super().generate(*args, **kwargs)  # type: ignore[misc]  # its `self` is annotated with another class

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_sizes: torch.Tensor | None = None,
        image_features: Sequence[torch.Tensor] | torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ) -> LlavaCausalLMOutputWithPast:
        """Logits of the next token, and the loss where labels are given.

        Args:
            input_ids: [B, L]; each image stands as a run of `config.image_token_id`, one for each of its features.
            pixel_values: [n, 3, H, W], the images of all rows in order; None for text only.
            attention_mask: [B, L], 0 on padding, on either side.
            labels: [B, L], -100 where nothing is learned; shifted inside.
            logits_to_keep: Compute only the last so many logits; 0 means all.
            image_sizes: [n, 2], see `LlavaStyleModel.get_tap_features`.
            image_features: Cached tap features instead of pixel_values, [n, N, C] or n tensors [N_i, C].
            mm_encoder_outputs: {"image": what `get_image_features` returned}, as `generate` passes it on.
            kwargs: For the language model and, `num_items_in_batch`, for the loss.

        Raises:
            ValueError: Image tokens and features do not match, labels hold nothing to learn, or images are given twice.
        """
        loss_kwargs = {"num_items_in_batch": kwargs.pop("num_items_in_batch", None)}
        if labels is not None and loss_kwargs["num_items_in_batch"] is None and not (labels[:, 1:] != -100).any():
            raise ValueError(
                "labels are -100 everywhere after the first position: this batch has nothing to learn from."
            )
        inputs_embeds, image_hidden_states = self.embed_inputs(
            input_ids, inputs_embeds, pixel_values, image_sizes, image_features, mm_encoder_outputs, past_key_values
        )
        takes = self._language_model_takes
        if takes["position_ids"]:
            kwargs["position_ids"] = position_ids
        if takes["logits_to_keep"]:
            kwargs["logits_to_keep"] = logits_to_keep
        outputs = self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=outputs.logits, labels=labels, vocab_size=outputs.logits.shape[-1], **loss_kwargs
            )
        return LlavaCausalLMOutputWithPast(
            loss=loss,
            logits=outputs.logits,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            image_hidden_states=image_hidden_states,
        )


__all__ = ["LlavaStyleForConditionalGeneration", "LlavaStyleModel", "LlavaStylePreTrainedModel"]
