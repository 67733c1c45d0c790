"""Flux.1 from scratch at 256 px, by the MLPerf Training Flux.1 recipe, as a model that needs few sampling steps.

Command:  python -m shortcut_jax.train --config=configs/flux_pretrain.py
          with the sets prepared before (below)
Hardware: a pod of GPUs (or TPUs); 11.9 B parameters need 20 bytes each for weights, moments and EMAs, so at least
          8 x 80 GB.
Time:     not measured. 23.8 TFLOP a row; by its compiled program a step of 16 rows a device takes 1.03 s on 64 H100
          (docs/performance.md), so 30,000 steps 9 hours.
Expected: the recipe of plain flow matching reaches a validation loss of 0.586; a share of 0.25 self-distilled rows adds
          a sixth to the cost of a step. This config has been compiled for meshes, not yet trained on one.
Data:     CC12M as WebDataset shards, prepared once as autoencoder latents and text states (2.07 MiB a record); the
          validation set is 29,696 captioned images of COCO 2014's validation images, as in the benchmark:

    python -m shortcut_jax.convert --from=FLUX.1-schnell --to=converted/flux1-schnell
    python -m shortcut_jax.prepare --source='cc12m/{00000..01242}.tar' --out=~/tensorflow_datasets/cc12m_latents_256 \
        --store=latents --checkpoint=converted/flux1-schnell --resolution=256 --text_tokens=256 --validation=0 \
        --max_skipped=0.05
    python -m shortcut_jax.prepare --source='coco2014_val/{00000..00002}.tar' \
        --out=~/tensorflow_datasets/coco_latents_256 --store=latents --checkpoint=converted/flux1-schnell \
        --resolution=256 --text_tokens=256 --validation=1

What a mesh needs can be seen without one:

    python -m shortcut_jax.train --config=configs/flux_pretrain.py --dry_run --target=cpu:8 --device_memory_gb=80
"""

from ml_collections import ConfigDict

from shortcut_jax.config import default_config


def get_config() -> ConfigDict:
    """The run's config."""
    c = default_config()
    c.objective = "scfm"
    c.steps = 30_000
    c.batch_per_device = 16
    c.rows.self_rows, c.rows.flow_rows = 1, 3
    c.timestep = "uniform"
    c.max_skipped = 10
    c.model.preset = "flux-schnell"  # no guidance input from scratch
    c.model.compute_dtype = "bfloat16"
    c.model.remat = "auto"
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = -1, 8, 1  # FSDP inside a node of eight, data parallel across nodes
    c.data.name = "cc12m_latents_256"
    c.data.store = "latents"
    c.data.text_encoder = "stored"
    c.data.height = c.data.width = 256
    c.data.text_tokens = 256
    c.data.caption_dropout = 0.1
    c.optimizer.learning_rate = 2e-4
    c.optimizer.b1, c.optimizer.b2, c.optimizer.eps = 0.9, 0.95, 1e-8
    c.optimizer.weight_decay = 0.1
    c.optimizer.clip_norm = 1.0
    c.optimizer.warmup_steps = 1600
    c.validation.every_samples = 262_144
    c.validation.name, c.validation.rule, c.validation.images = "coco_latents_256", "mlperf", 29_696
    c.checkpoint_every = 1000
    c.sample_every = 1000
    c.eval.views, c.eval.images = (), ()
    return c
