"""FLUX.1 dev distilled to few steps: adapters on every linear layer, by the recipe published for SCFM.

Command:  python -m shortcut_jax.convert --from=FLUX.1-dev --to=converted/flux1-dev
          python -m shortcut_jax.prepare --from_teacher=converted/flux1-dev --prompts=prompts.txt \
              --out=~/tensorflow_datasets/flux_dev_512 --resolution=512 --buckets=published --per_bucket=200 \
              --steps=32 --guidance=3.5 --text_tokens=256
          python -m shortcut_jax.train --config=configs/flux_distill.py
Hardware: one 80 GB GPU for 8 rows of 512 px, or any mesh.
Time:     not measured. Published, in PyTorch: under one A100 day to a 3-step model.
Expected: not measured. Published for 3 steps: FID 6.34, CLIP score 33.10, 1.01 in FID from the teacher.
Data:     images that FLUX.1 dev made itself (32 steps, guidance 3.5) in the published sizes around 512 px, stored as
          latents and text states; a step is of one size, and is compiled once for each.

What a device needs can be seen without one:

    python -m shortcut_jax.train --config=configs/flux_distill.py --dry_run --target=gpu:h100:1x1 --device_memory_gb=80
"""

from ml_collections import ConfigDict

from shortcut_jax.settings import default_config


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
    c.model.remat = "full"
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
