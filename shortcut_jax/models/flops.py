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


def step_flops(cfg: FluxConfig, num_img: int, num_txt: int, student_rows: int, forward_rows: int, frozen: bool) -> int:
    """FLOPs of one training step.

    Args:
      cfg: the network.
      num_img: image tokens of a sample.
      num_txt: text tokens of a sample.
      student_rows: rows evaluated with a gradient.
      forward_rows: rows evaluated without.
      frozen: whether the base is frozen: the backward pass then costs one forward instead of two. The adapters' own
        products, a few percent, are not counted.
    """
    return ((2 if frozen else 3) * student_rows + forward_rows) * forward_flops(cfg, num_img, num_txt)
