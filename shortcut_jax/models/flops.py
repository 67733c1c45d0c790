"""Model FLOPs by formula: matrix products only, two a multiply-add, recomputation not credited."""

from shortcut_jax.models.flux import TIME_FEATURES, FluxConfig


def forward_flops(cfg: FluxConfig, num_img: int, num_txt: int) -> int:
    """FLOPs of one forward pass of one sample with `num_img` image and `num_txt` text tokens."""
    d, tokens = cfg.width, num_img + num_txt
    attention = 2 * tokens * tokens * d
    stream = tokens * (4 * d * d + 2 * d * cfg.hidden)
    double = stream + attention + 12 * d * d
    single = stream + attention + 3 * d * d
    embedders = (1 + cfg.guidance + cfg.step_size) * (TIME_FEATURES * d + d * d) + cfg.pooled_width * d + d * d
    ends = num_img * 2 * cfg.channels * d + num_txt * cfg.text_width * d + 2 * d * d
    return 2 * (cfg.double_blocks * double + cfg.single_blocks * single + embedders + ends)


def step_flops(cfg: FluxConfig, num_img: int, num_txt: int, rows: int, forward_only_rows: int) -> int:
    """FLOPs of one training step: 3 forwards a row, and one for each row evaluated without gradient."""
    return (3 * rows + forward_only_rows) * forward_flops(cfg, num_img, num_txt)
