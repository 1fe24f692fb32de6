"""Image classifier on the tap of any encoder, so that a study can pretrain and score all of them alike."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_backbone_classifier import BackboneClassifierConfig
from .own_backbones import build_backbone, freeze_neutral_norms

POOLINGS = {"mean": lambda tokens: tokens.mean(1), "max": lambda tokens: tokens.amax(1)}  # [B, N, C] -> [B, C]


class BackboneForImageClassification(PreTrainedModel):
    """LayerNorm, pooling and a linear layer on the encoder's tap."""

    config: BackboneClassifierConfig
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over pictures, so the Trainer has to scale it
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: BackboneClassifierConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config)
        if backbone is None:
            backbone = build_backbone(config.backbone_config)  # type: ignore[arg-type]  # a config once it is made
        self.backbone = backbone
        width: int = backbone.channels[-1]  # type: ignore[index, assignment]  # BackboneMixin
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, config.num_labels)  # type: ignore[arg-type]  # None before init only
        self.post_init()

    def train(self, mode: bool = True) -> "BackboneForImageClassification":
        """Switch the mode; a tap norm without parameters of its own stays so."""
        super().train(mode)
        freeze_neutral_norms(self.backbone)
        return self

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs) -> ImageClassifierOutput:
        """Logits of the classes [B, num_labels], and cross entropy where labels are given, summed over label groups.

        Args:
            pixel_values: [B, 3, H, W].
            labels: [B] class indices; with `label_groups` [B, groups], indices within each group.
        """
        feature_map = self.backbone(pixel_values).feature_maps[-1]  # [B, C, h, w]
        tokens = self.norm(feature_map.flatten(2).transpose(1, 2))  # [B, h*w, C]
        logits = self.classifier(POOLINGS[self.config.pooling](tokens))
        loss = None
        if labels is not None:
            groups = logits.float().split(self.config.label_groups or [logits.shape[1]], dim=1)
            targets = labels.view(len(labels), len(groups)).unbind(1)
            loss = torch.stack([*map(nn.functional.cross_entropy, groups, targets)]).sum()
        return ImageClassifierOutput(loss=loss, logits=logits)
