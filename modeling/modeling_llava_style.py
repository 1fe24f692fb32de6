"""The LLaVA-style vision-language model: encoder -> tap norm -> connector -> language model.

Layout of the weights, the same in both classes: `vision_tower` (any Transformers Backbone), `connector`,
`language_model` (any causal language model, whole, so that its own head, logit scaling and weight tying hold).
"""

import copy
import inspect
from collections.abc import Sequence

import torch
from torch import distributed as dist
from torch import nn
from transformers import AutoBackbone, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_llava_style import LlavaStyleConfig
from .connectors import Connector, ConnectorLinear

logger = logging.get_logger(__name__)


def parameter_free_layer_norm(features: torch.Tensor) -> torch.Tensor:
    """LayerNorm over the last axis with scale 1, shift 0 and eps 1e-5, computed in float32: VMamba's untrained outnorm."""
    return nn.functional.layer_norm(features.float(), features.shape[-1:]).to(features.dtype)


TAP_NORMS = {"none": lambda features: features, "layernorm": parameter_free_layer_norm}


def is_sharded(module: nn.Module) -> bool:
    """Whether parameters of `module` are spread over ranks (ZeRO-3, FSDP), so that every rank must call it alike."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    return any(hasattr(p, "ds_id") or isinstance(p, DTensor) for p in module.parameters()) or any(
        isinstance(m, FullyShardedDataParallel) for m in module.modules()
    )


def dummy_picture_size(vision_config) -> tuple[int, int]:
    """Height and width of a picture that the encoder surely takes, in pixels."""
    nested = getattr(vision_config, "vision_config", vision_config)
    size = getattr(vision_config, "image_size", None) or getattr(nested, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def check_image_tokens(tokens_per_row: list[int], tokens_per_image: list[int]) -> None:
    """Every row of the batch must hold exactly the image tokens of its own images, in order.

    Raises:
        ValueError: With both counts, and what would be right.
    """
    found, given = sum(tokens_per_row), sum(tokens_per_image)
    what = f"{len(tokens_per_image)} image(s) give {given} features ({tokens_per_image} per image)"
    if found != given:
        raise ValueError(
            f"input_ids hold {found} image tokens ({tokens_per_row} per row) but the {what}: each image needs as many "
            "image tokens as it has features, num_image_tokens(height, width) of its canvas; was a prompt cut short or "
            "its <image> placeholder not expanded?"
        )
    ends, total = {0}, 0
    for count in tokens_per_image:
        total += count
        ends.add(total)
    total = 0
    for row, count in enumerate(tokens_per_row):
        total += count
        if total not in ends:
            raise ValueError(
                f"Row {row} of input_ids holds {count} image tokens ({tokens_per_row} per row), which is no whole number "
                f"of images: the {what}, and each row needs all the tokens of its own images."
            )


class LlavaStylePreTrainedModel(PreTrainedModel):
    config: LlavaStyleConfig
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Connector):
            generator = module.generator()
            for layer in module.layers:
                for parameter, value in zip((layer.weight, layer.bias), layer.draw(generator), strict=True):
                    init.copy_(parameter, value)
        elif not isinstance(module, ConnectorLinear):  # filled by its Connector, which knows the order of the draws
            super()._init_weights(module)


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
        self.vision_tower = AutoBackbone.from_config(config.vision_config) if vision_tower is None else vision_tower
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        accepted = inspect.signature(language_model.forward).parameters
        for needed in ("inputs_embeds", "past_key_values"):
            if needed not in accepted:
                raise ValueError(
                    f"{type(language_model).__name__} takes no {needed} and cannot be the language model here: choose a "
                    "decoder-only transformer such as Llama, Qwen2 or Mistral."
                )
        text_width = language_model.get_input_embeddings().embedding_dim
        self.connector = Connector(config.connector, self.vision_tower.channels[-1], text_width, config.connector_seed)
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
        if self.config.freeze_vision:
            self.vision_tower.requires_grad_(False)
            self.vision_tower.train(mode and self.config.vision_train_mode)
        return self

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def _crop_groups(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None) -> dict[tuple, list[int]]:
        """Indices of the images of each canvas size (height, width), in pixels."""
        if pixel_values.ndim != 4:
            raise ValueError(
                f"pixel_values has shape {list(pixel_values.shape)}: it must be [number of images, channels, height, "
                "width], all images of the batch in one row."
            )
        count, _, height, width = pixel_values.shape
        if image_sizes is None:
            return {(height, width): list(range(count))}
        sizes = torch.as_tensor(image_sizes).tolist()
        if len(sizes) != count or any(len(size) != 2 for size in sizes):
            raise ValueError(
                f"image_sizes has {len(sizes)} rows for {count} image(s) in pixel_values: it must be [{count}, 2], the "
                "height and width of each canvas before batch padding."
            )
        groups: dict[tuple, list[int]] = {}
        for index, (h, w) in enumerate(sizes):
            if not (0 < h <= height and 0 < w <= width):
                raise ValueError(
                    f"image_sizes[{index}] is {h}x{w} but pixel_values is {height}x{width}: a canvas has at least one "
                    "pixel and fits the batch."
                )
            groups.setdefault((h, w), []).append(index)
        return groups

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
        features: list[torch.Tensor | None] = [None] * len(pixel_values)
        for (height, width), indices in self._crop_groups(pixel_values, image_sizes).items():
            whole = len(indices) == len(pixel_values) and (height, width) == tuple(pixel_values.shape[-2:])
            pixels = pixel_values if whole else pixel_values[indices, :, :height, :width]
            for index, tokens in zip(indices, self._run_tower(pixels), strict=True):
                features[index] = tokens
        return features

    def project(self, tap_features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Tap norm and connector on n tensors [N_i, C], giving n tensors [N_i, D]."""
        lengths = [len(features) for features in tap_features]
        weight = self.connector.layers[0].weight
        tokens = torch.cat(list(tap_features)).to(weight.device)  # [sum N_i, C]
        tokens = TAP_NORMS[self.config.tap_norm](tokens).to(weight.dtype)
        return list(self.connector(tokens).split(lengths))

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
            `pooler_output`: n tensors [N_i, D], one for each image.
        """
        if (pixel_values is None) == (image_features is None):
            raise ValueError("Give either pixel_values or image_features (cached tap features), not both or neither.")
        if image_features is None:
            tap_features = self.get_tap_features(pixel_values, image_sizes)
        else:
            tap_features = self._check_cached(image_features)
        return BaseModelOutputWithPooling(pooler_output=self.project(tap_features))

    def _check_cached(self, image_features: Sequence[torch.Tensor] | torch.Tensor) -> list[torch.Tensor]:
        width = self.connector.in_features
        features = list(image_features)
        for index, tokens in enumerate(features):
            if tokens.ndim != 2 or tokens.shape[-1] != width:
                raise ValueError(
                    f"image_features[{index}] has shape {list(tokens.shape)}: cached tap features are [tokens, {width}] "
                    "for each image, before the connector."
                )
        return features

    def _features_and_zero(
        self, pixel_values, image_sizes, image_features
    ) -> tuple[list[torch.Tensor] | None, torch.Tensor | None]:
        """Image features of this rank, and a zero that keeps a rank without images in step with the others.

        Under DistributedDataParallel every trainable parameter must get a gradient on every rank, and under ZeRO-3 or
        FSDP every rank must call a sharded module equally often. So a rank that has less to do runs a dummy picture
        and adds zero times its features to the text: the gradients come out as zeros, not as nothing.
        """
        have_images = pixel_values is not None or image_features is not None
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            if not have_images:
                return None, None
            return self.get_image_features(pixel_values, image_sizes, image_features).pooler_output, None

        tower_calls = len(self._crop_groups(pixel_values, image_sizes)) if pixel_values is not None else 0
        learning = self.training and torch.is_grad_enabled()
        dummy_calls, dummy_project = 0, False
        if is_sharded(self):
            wanted = torch.tensor(
                [tower_calls, int(have_images or learning)], device=self.connector.layers[0].weight.device
            )
            dist.all_reduce(wanted, dist.ReduceOp.MAX)
            most_calls, someone_projects = wanted.tolist()
            dummy_calls, dummy_project = most_calls - tower_calls, bool(someone_projects) and not have_images
        elif learning:
            dummy_project = not have_images
            dummy_calls = int(tower_calls == 0 and any(p.requires_grad for p in self.vision_tower.parameters()))

        if have_images and pixel_values is not None:
            tap_features = self.get_tap_features(pixel_values, image_sizes)
        else:
            tap_features = self._check_cached(image_features) if have_images else []
        images = len(tap_features)
        for _ in range(dummy_calls):
            height, width = dummy_picture_size(self.config.vision_config)
            channels = getattr(self.vision_tower.config, "num_channels", 3)
            tap_features.append(self._run_tower(torch.zeros(1, channels, height, width))[0])
        if dummy_project and dummy_calls == 0:
            weight = self.connector.layers[0].weight
            tap_features.append(torch.zeros(1, self.connector.in_features, device=weight.device, dtype=weight.dtype))
        if not tap_features:
            return None, None
        projected = self.project(tap_features)
        zero = sum((features[:0].sum() for features in projected[images:]), start=projected[0][:0].sum())
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
        """Embeddings [B, L, D] with image features where the image tokens stand, and the features [sum N_i, D] or None."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        encoded = (mm_encoder_outputs or {}).get("image")
        if encoded is not None and (pixel_values is not None or image_features is not None):
            raise ValueError("Give images once: pixel_values, image_features or mm_encoder_outputs.")
        features, zero = self._features_and_zero(pixel_values, image_sizes, image_features)
        if encoded is not None:
            features = list(encoded.pooler_output)

        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        image_token = self.config.image_token_id
        mask = None
        if input_ids is not None and image_token is not None and (features is not None or past_length == 0):
            mask = input_ids == image_token  # [B, L]
        if features is not None and mask is None:
            raise ValueError("Images need input_ids with image tokens, and config.image_token_id to know them by.")
        if mask is not None:
            tokens_per_image = [len(tokens) for tokens in features or []]
            tokens_per_row = mask.sum(-1).tolist()
            # chunked prefill hands over the features of several rows as one tensor, so only the total can be held to it
            check_image_tokens([sum(tokens_per_row)] if encoded is not None else tokens_per_row, tokens_per_image)

        if inputs_embeds is None:
            # the image token may lie outside the vocabulary, and no gradient shall reach its embedding
            text_ids = input_ids if mask is None else input_ids.masked_fill(mask, 0)
            inputs_embeds = self.get_input_embeddings()(text_ids)  # [B, L, D]
        self._warn_if_too_long(past_length + inputs_embeds.shape[1])
        if zero is not None:
            inputs_embeds = inputs_embeds + zero.to(inputs_embeds.device, inputs_embeds.dtype)
        if features is None:
            return inputs_embeds, None
        flat = torch.cat(features).to(inputs_embeds.device, inputs_embeds.dtype)  # [sum N_i, D]
        return inputs_embeds.masked_scatter(mask.unsqueeze(-1).to(inputs_embeds.device), flat), flat

    def _warn_if_too_long(self, length: int) -> None:
        limit = getattr(self.config.text_config.get_text_config(), "max_position_embeddings", None)
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


class LlavaStyleForConditionalGeneration(LlavaStyleModel, GenerationMixin):
    """Answers text about images with text. Arguments as in `LlavaStyleModel`."""

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
                module._is_hf_initialized = True
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
            kwargs["mm_encoder_outputs"] = {"image": self.get_image_features(image_features=image_features)}
        return super().generate(*args, **kwargs)

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
            ValueError: Image tokens and features do not match, labels with nothing to learn from, or images given twice.
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
