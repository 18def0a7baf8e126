"""The models of ``benchmarks.spaces`` by source: how each is made, and one sample of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

Made = tuple[Callable[[], nn.Module], Any]
"""A function that constructs the model, and one sample of its inputs."""

MOST_PARAMS = 50_000_000
SIDES = {"vit": 224, "maxvit": 224, "inception_v3": 299}
"""The inputs of torchvision models that do not take every size; the others get 96."""


# -- torchvision -------------------------------------------------------------------------------


def detection_backbone(name: str) -> nn.Module:
    from torchvision.models.detection import backbone_utils
    from torchvision.ops import FrozenBatchNorm2d

    options = {"weights": None, "norm_layer": FrozenBatchNorm2d}
    if name == "mobilenet_v3_large":
        return backbone_utils.mobilenet_backbone(backbone_name=name, fpn=True, **options)
    return backbone_utils.resnet_fpn_backbone(backbone_name=name, trainable_layers=3, **options)


def torchvision_model(name: str) -> Made:
    from torchvision import models

    if name.startswith("fpn:"):
        return lambda: detection_backbone(name.removeprefix("fpn:")), (3, 96, 96)
    options: dict[str, Any] = {"weights": None}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True
    if name in models.list_models(module=models.segmentation):
        options["weights_backbone"] = None
        options["num_classes"] = 21
        if not name.startswith("lraspp"):
            options["aux_loss"] = True
    side = next((side for prefix, side in SIDES.items() if name.startswith(prefix)), 96)
    return lambda: models.get_model(name, **options), (3, side, side)


def torchvision_names(limit: int | None) -> Iterator[list[str]]:
    from torchvision import models

    names = models.list_models(module=models)
    names += models.list_models(module=models.segmentation)
    names += ["fpn:resnet50", "fpn:mobilenet_v3_large"]
    yield from ([name] for name in names[:limit])


# -- timm --------------------------------------------------------------------------------------


def timm_model(name: str) -> Made:
    import timm

    try:
        with torch.device("meta"):
            model = timm.create_model(name)
    except (RuntimeError, NotImplementedError):  # its constructor needs values
        model = timm.create_model(name)
    if sum(p.numel() for p in model.parameters()) > MOST_PARAMS:
        raise ValueError("too large")
    return lambda: timm.create_model(name), tuple(model.default_cfg["input_size"])


def timm_names(limit: int | None) -> Iterator[list[str]]:
    import timm

    names = timm.list_models()
    count = min(limit or 104, len(names))
    groups = [names[i * len(names) // count : (i + 1) * len(names) // count] for i in range(count)]
    yield from groups
    if limit is None:  # some have only large models
        yield from (group[::-1] for group in groups[7::10])


# -- transformers: the model's class, its configuration, its inputs --------------------------------

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {"vocab_size": 50, "intermediate_size": 48, "max_position_embeddings": 64, **_SIZES}
_DECODER = {**_TEXT, "num_key_value_heads": 2, "pad_token_id": 0}
_VISION = {"intermediate_size": 48, "image_size": 32, "patch_size": 8, **_SIZES}
_STAGES = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
_SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "image_size": 32, "patch_size": 2}
_WAVES = {
    "conv_dim": [16, 16],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
_T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_BART = {
    **{f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers",)},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
    "vocab_size": 50,
    "d_model": 32,
    "max_position_embeddings": 64,
}
_IDS = torch.arange(10) % 7 + 1
_TOKENS = {"input_ids": _IDS}
_MASKED = {**_TOKENS, "attention_mask": torch.ones(10, dtype=torch.long)}
_PAIRS = {**_TOKENS, "decoder_input_ids": _IDS[:6].clone()}
_PIXELS = {"pixel_values": (3, 32, 32)}
_SOUND = {"input_values": (800,)}
_MOE = {"num_local_experts": 2, "num_experts_per_tok": 1}

TRANSFORMERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "albert": ("AlbertModel", {**_TEXT, "embedding_size": 16}, _TOKENS),
    "bert": ("BertForSequenceClassification", _TEXT, _TOKENS),
    "bert, masked": ("BertModel", _TEXT, _MASKED),
    "deberta-v2": ("DebertaV2Model", _TEXT, _TOKENS),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"vocab_size": 50, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
        _TOKENS,
    ),
    "electra": ("ElectraModel", {**_TEXT, "embedding_size": 16}, _TOKENS),
    "mpnet": ("MPNetModel", _TEXT, _TOKENS),
    "roberta": ("RobertaModel", {**_TEXT, "pad_token_id": 0}, _TOKENS),
    "gemma2": ("Gemma2ForCausalLM", {**_DECODER, "head_dim": 8}, _TOKENS),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        _TOKENS,
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", _TEXT, _TOKENS),
    "llama": ("LlamaForCausalLM", _DECODER, _TOKENS),
    "mistral": ("MistralForCausalLM", _DECODER, _MASKED),
    "mixtral": ("MixtralForCausalLM", {**_DECODER, **_MOE}, _TOKENS),
    "opt": (
        "OPTForCausalLM",
        {**_TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 0},
        _TOKENS,
    ),
    "phi": ("PhiForCausalLM", _DECODER, _TOKENS),
    "qwen2": ("Qwen2ForCausalLM", _DECODER, _TOKENS),
    "qwen3": ("Qwen3ForCausalLM", {**_DECODER, "head_dim": 8}, _TOKENS),
    "bart": ("BartModel", _BART, _PAIRS),
    "t5": ("T5Model", _T5, _PAIRS),
    "beit": ("BeitForImageClassification", _VISION, _PIXELS),
    "convnext": ("ConvNextForImageClassification", _STAGES, {"pixel_values": (3, 64, 64)}),
    "deit": ("DeiTForImageClassification", _VISION, _PIXELS),
    "dinov2": ("Dinov2ForImageClassification", _VISION, _PIXELS),
    "segformer": ("SegformerForSemanticSegmentation", _STAGES, {"pixel_values": (3, 64, 64)}),
    "swin": ("SwinForImageClassification", {**_SWIN, "window_size": 4}, _PIXELS),
    "swinv2": ("Swinv2ForImageClassification", {**_SWIN, "window_size": 4}, _PIXELS),
    "vit": ("ViTForImageClassification", _VISION, _PIXELS),
    "hubert": ("HubertModel", {**_TEXT, **_WAVES}, _SOUND),
    "wav2vec2": ("Wav2Vec2Model", {**_TEXT, **_WAVES}, _SOUND),
}


def transformers_model(name: str) -> Made:
    import transformers

    transformers.logging.set_verbosity_error()
    kind, options, inputs = TRANSFORMERS[name]
    cls = getattr(transformers, kind)
    return lambda: cls(cls.config_class(**options)), inputs


# -- MONAI and segmentation_models_pytorch -----------------------------------------------------

_VOLUME = (1, 32, 32, 32)
_DIMS = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
MONAI: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "attention unet": (
        "AttentionUnet",
        {**_DIMS, "channels": (8, 16, 32), "strides": (2, 2)},
        _VOLUME,
    ),
    "basic unet": ("BasicUNet", {**_DIMS, "features": (8, 8, 16, 32, 64, 8)}, _VOLUME),
    "densenet": ("DenseNet121", _DIMS, _VOLUME),
    "dynunet": (
        "DynUNet",
        {
            **_DIMS,
            "kernel_size": [3, 3, 3],
            "strides": [1, 2, 2],
            "upsample_kernel_size": [2, 2],
            "filters": [8, 16, 32],
        },
        _VOLUME,
    ),
    "flexible unet": (
        "FlexibleUNet",
        {"in_channels": 3, "out_channels": 2, "backbone": "efficientnet-b0"},
        (3, 64, 64),
    ),
    "highresnet": ("HighResNet", _DIMS, _VOLUME),
    "segresnet": ("SegResNet", {**_DIMS, "init_filters": 8}, _VOLUME),
    "swin unetr": (
        "SwinUNETR",
        {"in_channels": 1, "out_channels": 2, "feature_size": 12},
        (1, 64, 64, 64),
    ),
    "unet": (
        "UNet",
        {**_DIMS, "channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 2},
        _VOLUME,
    ),
    "unetr": (
        "UNETR",
        {"in_channels": 1, "out_channels": 2, "img_size": 32, "hidden_size": 48, "num_heads": 4},
        _VOLUME,
    ),
    "vnet": ("VNet", {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}, _VOLUME),
}
SMP = (
    *("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN"),
    *("DeepLabV3", "DeepLabV3Plus", "UPerNet"),
)


def monai_model(name: str) -> Made:
    from monai.networks import nets

    kind, options, shape = MONAI[name]
    return lambda: getattr(nets, kind)(**options), shape


def smp_model(name: str) -> Made:
    import segmentation_models_pytorch as smp

    side = 128 if name == "PAN" else 64
    return lambda: getattr(smp, name)("resnet18", encoder_weights=None), (3, side, side)


def _listed(names: Any) -> Callable[[int | None], Iterator[list[str]]]:
    return lambda limit: ([name] for name in list(names)[:limit])


SOURCES: dict[str, tuple[Callable[[str], Made], Callable[[int | None], Iterator[list[str]]]]] = {
    "torchvision": (torchvision_model, torchvision_names),
    "timm": (timm_model, timm_names),
    "transformers": (transformers_model, _listed(TRANSFORMERS)),
    "monai": (monai_model, _listed(MONAI)),
    "smp": (smp_model, _listed(SMP)),
}
"""Per source a function that makes a model by its name, and one that lists names.

The latter yields lists of names; of each list the first model that is not too large is measured.
"""
