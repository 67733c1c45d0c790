"""Text to image on 64 x 64 emoji: 29 M parameters, words as text encoder, pixels as latents.

Command:  python -m shortcut_jax.prepare --source=emoji64 --out=~/tensorflow_datasets/emoji64 --store=pixels \\
              --resolution=64 --where=variant=base --validation=0.02
          python -m shortcut_jax.train --config=configs/emoji64.py
Hardware: one GPU; the source is a folder of 64 x 64 images with a metadata.jsonl of captions.
Time:     not measured on a GPU. By arithmetic 38 GFLOP an image, so 10,000 steps of 256 take 4 minutes at 40% of an
          H100's peak. A CPU (which has no bfloat16 products) tries it with --config.model.compute_dtype=float32
          --config.steps=4 --config.batch_size=8 --config.eval.columns=4.
Expected: not measured.

The latent space is the pixels themselves, in blocks of 2 x 2 (data.stride=2): 32 x 32 latents of 12 channels, and so
256 tokens of 4 x 4 pixels, which loses nothing and needs no autoencoder. Captions have at most 20 words. No image is
mirrored: captions tell left from right.
"""

from ml_collections import ConfigDict

from shortcut_jax.config import default_config


def get_config() -> ConfigDict:
    """The run's config."""
    c = default_config()
    c.objective = "scfm"
    c.steps = 10_000
    c.batch_size = 256
    c.rows.self_rows, c.rows.flow_rows = 1, 3
    c.model.preset = "emoji"
    c.model.compute_dtype = "bfloat16"
    c.mesh.data, c.mesh.fsdp = -1, 1
    c.data.name = "emoji64"
    c.data.store = "pixels"
    c.data.height = c.data.width = 64
    c.data.stride = 2
    c.data.text_encoder = "words"
    c.data.text_tokens = 20
    c.data.caption_dropout = 0.1
    c.optimizer.learning_rate = 1e-3
    c.optimizer.b2 = 0.99
    c.optimizer.weight_decay = 0.01
    c.optimizer.warmup_steps = 200
    c.optimizer.schedule = "cosine"
    c.ema.warmup = True
    c.sample_every = 1000
    c.checkpoint_every = 1000
    c.validation.every = 1000
    c.eval.steps = (1, 2, 3, 4, 8, 32)
    c.eval.columns = 8
    c.eval.guidance = 2.0
    c.eval.views, c.eval.images = (), ()
    return c
