# ---
# jupyter:
#   jupytext: {text_representation: {format_name: percent}}
# ---

# %% [markdown]
# # Distil a teacher with LoRA, and export it
# `configs/digits_distill.py` trains its teacher first (plain flow matching), then adapters that make it need few steps.

# %%
import matplotlib.pyplot as plt
import numpy as np
from safetensors.numpy import load_file

from shortcut_jax import Pipeline, convert, train

TEACHER, STUDENT = "runs/example-teacher", "runs/example-student"
FLAGS: list[str] = []  # about 20 minutes on two CPU cores, most of it for the teacher

train.main(["train", "--config=digits_distill", f"--config.init_from={TEACHER}", f"--workdir={STUDENT}", *FLAGS])

# %% [markdown]
# Teacher and student in three steps from the same noise.

# %%
rows = [Pipeline(w)("a handwritten digit three", steps=3, num=8, seed=1) for w in (TEACHER, STUDENT)]
plt.figure(figsize=(6, 2))
plt.imshow(np.concatenate([np.concatenate(list(images[..., 0]), axis=1) for images in rows]), cmap="gray")
plt.axis("off")

# %% [markdown]
# The adapters alone, in the names of PEFT and diffusers. Those of a run on FLUX.1 load with
# `pipeline.load_lora_weights("lora.safetensors")`.

# %%
convert.main(["convert", f"--from={STUDENT}", "--to=lora.safetensors", "--format=diffusers"])
lora = load_file("lora.safetensors")
print(f"{len(lora)} tensors, {sum(x.size for x in lora.values()):,} values, such as {min(lora)}")
