"""The arguments that this package's own plans get, with ranges that admit every use of them."""

from __future__ import annotations

from ...adaptation.network_names import SITE_NETWORKS

TEXT, ANYTHING = "<text>", "<anything>"  # limits: any text; any number, text, true, false or null
YES_OR_NO: list[object] = [True, False]
SEED: list[object] = [0, 2**63 - 1]
BATCH: list[object] = [1, 512]
WEIGHT: list[object] = [0, 10000]
SHARE: list[object] = [0, 1]

FACTORY: dict[str, list[object]] = {
    "domains[]": [TEXT],
    "head": ["palette", "image"],
    "conditioning": ["auto", "head", "mapping"],
    "discriminator": ["local", "shared"],
    "compatibility": ["none", "published"],
    "image_size": [8, 1024],
    "image_channels": [1, 8],
    "classes": [0, 255],
    "pseudo_labels": YES_OR_NO,
    "turn": SHARE,
    "z_bins": [1, 1000],
    "start_size": [4, 1024],
    "channels[]": [1, 1024],
    "latent_dim": [1, 2048],
    "encoding_dim": [0, 4096],
    "mapping_layers": [1, 32],
    "mapping_lr_multiplier": [0, 10],
    "batch_size": BATCH,
    "learning_rate": SHARE,
    "texture": SHARE,
    "r1_gamma": WEIGHT,
    "r1_every": [1, 100000],
    "path_weight": WEIGHT,
    "path_every": [1, 100000],
    "path_batch_shrink": [1, 512],
    "style_mixing": SHARE,
    "augment": YES_OR_NO,
    "augment_p": SHARE,
    "augment_target": SHARE,
    "augment_length": [1, 10**9],
    "clip_weight": WEIGHT,
    "ema_decay": SHARE,
    "mirror": YES_OR_NO,
    "shift": [0, 64],
}

METHOD: dict[str, list[object]] = {
    "method": ["local", "fedavg", "fedprox", "fedbn", "fedicra", "fedmix", "gaze", "hssf", "lssl", "cmc"],
    "classes": [2, 255],
    "size": [16, 1024],
    "channels": [1, 8],
    "colour": YES_OR_NO,
    "sites": [1, 10000],
    "rounds": [1, 100000],
    "updates": [1, 10000],
    "batch_size": BATCH,
    "width": [4, 256],
    "depth": [None, [3, 8]],
    "single_objects[]": [0, 254],
    "fold": [1, 4],
    "norm": ["instance", "group", "batch"],
    "learning_rate": [None, SHARE],
    "mirror": YES_OR_NO,
    "rotation": [0, 7],
    "first_guess": YES_OR_NO,
    "seed": SEED,
    "dp_epsilon": [None, [0, 1000]],
    "dp_delta": [None, SHARE],
    "dp_clip": [0, 1000],
}

OPTIONS: dict[str, list[object]] = {  # of all methods
    "proximal": WEIGHT,
    "tree_weight": WEIGHT,
    "tree_sigma": WEIGHT,
    "learnt_trees": YES_OR_NO,
    "crf_weight": WEIGHT,
    "dice_weight": WEIGHT,
    "contrast_weight": WEIGHT,
    "selections": [0, 6],
    "embedding": [1, 4096],
    "body_share": [None, SHARE],
    "adaptive": YES_OR_NO,
    "adaptive_from": [2, 100000],
    "loss_weight": WEIGHT,
    "loss_power": [0, 100],
    "agreement": [SHARE, "prototype", "voxel", "off"],
    "per_class": YES_OR_NO,
    "box_cover": SHARE,
    "refine": YES_OR_NO,
    "image_rule": ["presence", "reference"],
    "empty": ["reject", "accept"],
    "largest_share": SHARE,
    "consistency": WEIGHT,
    "window": [1, 101],
    "dilation": [1, 64],
    "temperature": [0, 100],
    "network": list(SITE_NETWORKS),
    "public_slices": [0, 10**7],
    "public_epochs": [1, 1000],
    "warmup": SHARE,
    "min_pixel_confidence": SHARE,
    "min_slice_confidence": SHARE,
    "unlabelled": WEIGHT,
    "perturbation": YES_OR_NO,
    "exchange": YES_OR_NO,
    "stride": [1, 2, 4],
    "distillation": WEIGHT,
    "grade": ["dice", "pixel_accuracy"],
    "min_teacher_grade": SHARE,
    "modalities[]": [TEXT],
    "modality_channels[]": [1, 8],
    "start": SHARE,
    "channel_weight": WEIGHT,
    "descriptor": ["gram", "pooled", "block"],
    "agreement_weight": WEIGHT,
    "agreement_ramp": ["up", "down"],
    "view_weight": WEIGHT,
    "views": ["one", "all"],
    "unfused_share": SHARE,
    "tightness_weight": WEIGHT,
    "size_weight": WEIGHT,
    "least_share": SHARE,
    "levels": [1, 100],
    "held_out": SHARE,
    "strong_share": SHARE,
    "min_assessor_accuracy": SHARE,
    "operations": [0, 20],
    "pseudo_labels": ["weak", "both"],
    "cutout": SHARE,
    "encoder_sharing": ["shared", "norm_specific", "separate"],
    "decoder_sharing": ["shared", "norm_specific", "separate"],
    "fusion_mode": ["concat", "add"],
}

CARD: dict[str, list[object]] = {  # of a labelled factory, apart from the configuration of its generator
    "kind": ["labelled factory"],
    "spacing": [0, 1000],
    "height": [0, 100000],
    "facts.**": [ANYTHING],
    "branches": [0, 20],
    "localiser": [None],
    "classes": [2, 255],
    "labelled_domain": [TEXT],
    "agreement": [ANYTHING],  # NaN where the validation labels are empty
    "validated_on": [TEXT],
    "labels_from.*": ["view", "own"],
    "distilled": [None],  # sites draw with all branches
    "robust.**": [ANYTHING],
    "robust.translator": [None],
    "robust.federated": [None],
    "robust.federated.context.**": [ANYTHING],
    "robust.federated.weights": ["global", "own", "server"],
}

SEGMENTER: dict[str, list[object]] = {
    "network": ["unet", "dynunet", "segresnet", "unet3d", "dynunet3d", "segresnet3d"],
    "network_size": ["small", "standard", "large"],
    "updates": [None, [1, 200000]],
    "minutes": [None],
    "width": [None, [4, 320]],
    "depth": [None, [3, 8]],
    "batch_size": [None, BATCH],
    "learning_rate": [None, SHARE],
    "whole_slices": YES_OR_NO,
    "memory": [0, 1000],
    "appearance": ["mild", "strong"],
    "contrast": [None],
    "contrast.unchanged": SHARE,
    "contrast.curves": SHARE,
    "contrast.inverted": SHARE,
    "mirror": [None, True, False],
    "rotation": [None, [0, 7]],
    "precision": ["auto", "float32", "bfloat16"],
    "seed": SEED,
}

TRANSLATOR: dict[str, list[object]] = {
    "pretraining": [0, 200000],
    "updates": [2, 200000],
    "batch_size": BATCH,
    "learning_rate": SHARE,
    "head_learning_rate": SHARE,
    "ramp": SHARE,
    "l2_weight": WEIGHT,
    "ssim_weight": WEIGHT,
    "mask_weight": WEIGHT,
    "target_synthesis": YES_OR_NO,
    "encoder.width": [1, 256],
    "encoder.blocks[]": [1, 64],
    "encoder.shrink": [[1, 2]],
    "mirror": YES_OR_NO,
    "rotation": [0, 7],
    "seed": SEED,
}

ADAPTATION: dict[str, list[object]] = {
    "engine": ["segmenter", "translator"],
    **{f"segmenter.{name}": limit for name, limit in SEGMENTER.items()},
    **{f"translator.{name}": limit for name, limit in TRANSLATOR.items()},
    "volumes": [1, 1000],
    "one_target_slice": YES_OR_NO,
    "keep": [1, 5],
    "patience": [0, 1000],
}

GROUPS = {
    "model_args.factory": (FACTORY, "Networks and training of the data factory, see FactoryConfig."),
    "model_args.config": (METHOD, "Networks and training of a federated segmentation, see MethodConfig."),
    "model_args.config.options": (OPTIONS, "Settings of single methods, see their pages."),
    "model_args.card": (CARD, "A labelled factory that a site adapts; its `config` has the limits of the factory."),
    "model_args.adaptation": (ADAPTATION, "How a site trains a segmenter of its own, see Adaptation."),
}


def default_arguments() -> dict[str, list[object]]:
    """Dotted name of every argument of this package's plans to its limit, see `arguments.check_limit`."""
    table: dict[str, list[object]] = {
        "model_args.seed": SEED,
        "model_args.transport": ["float32", "float16", "int8"],
        "model_args.train": YES_OR_NO,
    }
    table |= {f"{group}.{name}": limit for group, (limits, _) in GROUPS.items() for name, limit in limits.items()}
    table |= {
        "training_args.num_updates": [1, 10000],
        "training_args.loader_args.batch_size": BATCH,
        "training_args.random_seed": [None, SEED],
        "training_args.share_persistent_buffers": YES_OR_NO,
        "training_args.use_gpu": YES_OR_NO,
        "aggregator_args.aggregator_name": [TEXT],
        "aggregator_args.row_factor": [1, 100000],
        "aggregator_args.site": [0, 10000],
        "aggregator_args.label_kinds": [None],
        "aggregator_args.label_kinds.*": [0, 2**31],
        "aggregator_args.public_digest": [None, TEXT],
    }
    return {name: list(limit) for name, limit in table.items()}
