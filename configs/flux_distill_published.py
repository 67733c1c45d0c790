"""FLUX.1 dev distilled to few steps by the recipe published for SCFM: adapters on every linear layer.

Command:  as in flux_distill.py, with --config=configs/flux_distill_published.py
Hardware: one 80 GB GPU for 8 rows of 512 px, or any mesh.
Time:     not measured. Published, in PyTorch: 3 steps in under 24 A100 hours, 8 steps in about 1,000 iterations.
Expected: not measured. Published, for FLUX.1 dev at 8 / 4 / 3 steps: FID to the teacher's images (`fid_to_teacher`)
          2.58 / 4.50 / 6.34; difference of the student's and the teacher's FID to real images (`abs_fid_gap`) 0.16 /
          0.45 / 1.01, where the teacher has 27.43 in 32 steps; CLIP score 33.76 / 33.20 / 33.10 (teacher: 33.60).
Data:     images that FLUX.1 dev made itself (32 steps, guidance 3.5) in the published sizes around 512 px, stored as
          latents and text states; a step is of one size, and is compiled once for each.

These are the values of the published command. The paper names a batch of 16 and guidance in [0, 8].
"""

from ml_collections import ConfigDict

from shortcut_jax.config import default_config


def get_config() -> ConfigDict:
    """The run's config."""
    c = default_config()
    c.objective = "scfm"
    c.train = "lora"
    c.init_from = "converted/flux1-dev"
    c.lora.rank, c.lora.alpha = 64, 64.0
    c.teacher_share, c.teacher_grid = 0.4, 32
    c.rows.self_rows, c.rows.flow_rows = 1, 0
    c.student_steps = (1, 2, 4, 8)
    c.jumps = 2
    c.shift.low, c.shift.high, c.shift.dynamic = 2.5, 4.5, 0.1
    c.guidance = (0.0, 7.5)
    c.steps = 10_000
    c.batch_size = 8
    c.max_skipped = 10
    c.model.preset = "flux-dev"
    c.model.compute_dtype = "bfloat16"
    c.model.remat = "auto"
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, -1, 1
    c.data.name = "flux_dev_512"
    c.data.store = "latents"
    c.data.text_encoder = "stored"
    c.data.height = c.data.width = 512
    c.data.text_tokens = 256
    c.data.caption_dropout = 0.0
    c.optimizer.learning_rate = 2e-5
    c.optimizer.b1, c.optimizer.b2, c.optimizer.eps = 0.9, 0.999, 1e-8
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = 10.0
    c.ema.fast, c.ema.slow = 0.99, 0.999
    c.checkpoint_every = 500
    c.sample_every = 500
    c.eval.steps = (1, 2, 3, 4, 8)
    c.eval.guidance = 3.5
    c.eval.shift = 3.5
    c.eval.views, c.eval.images = (), ()
    return c
