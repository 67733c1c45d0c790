# ---
# jupyter:
#   jupytext: {text_representation: {format_name: percent}}
# ---

# %% [markdown]
# # Digits end to end
# Train on real handwritten digits, sample in 1 to 32 steps, and compare. `jupytext --to notebook examples/digits.py`
# makes a notebook of this file.

# %%
import matplotlib.pyplot as plt
import numpy as np

from shortcut_jax import Pipeline, train

WORKDIR = "runs/example-digits"
FLAGS = ["--config.steps=1000"]  # about 6 minutes on two CPU cores

train.main(["train", "--config=digits", f"--workdir={WORKDIR}", *FLAGS])

# %% [markdown]
# The same noise in 1, 2, 4 and 32 steps. A run holds three sets of weights; the slow EMA is the one to sample with.

# %%
pipeline = Pipeline(WORKDIR, view="slow")
images = {n: pipeline("a handwritten digit seven", steps=n, num=8, seed=0) for n in (1, 2, 4, 32)}

figure, axes = plt.subplots(len(images), figsize=(6, 4))
for axis, (n, several) in zip(axes, images.items(), strict=True):
    axis.imshow(np.concatenate(list(several[..., 0]), axis=1), cmap="gray")
    axis.set_title(f"{n} step{'s' * (n > 1)}")
    axis.axis("off")
figure.tight_layout()

# %% [markdown]
# What each step aimed at: the images along the way of the first sample.

# %%
along = pipeline.trajectory("a handwritten digit seven", steps=4, seed=0)  # [1, 5, 8, 8, 1]
plt.figure(figsize=(6, 2))
plt.imshow(np.concatenate(list(along[0, ..., 0]), axis=1), cmap="gray")
plt.axis("off")
