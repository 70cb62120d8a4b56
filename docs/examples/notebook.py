"""In a notebook: the same calls in one process, without a launcher. Each part is a cell.

python docs/examples/notebook.py MODEL
"""

# %% Load once
import sys

import ddinfer

model = sys.argv[1] if len(sys.argv) > 1 else "stable-diffusion-v1-5/stable-diffusion-v1-5"
pipe = ddinfer.load_pipeline(model, device=ddinfer.World.detect().device)

# %% Draw: with one process, generate makes everything itself
prompts = ["a red cat", {"prompt": "a blue bird", "seed": 7, "num_images": 2}]
results = ddinfer.generate(pipe, prompts, num_inference_steps=2)
for result in results:
    print(result.index, result.seed, result.prompt, result.image)

# %% Look at them as they come
for result in ddinfer.stream(pipe, prompts, num_inference_steps=2):
    print(result.index, f"{result.seconds:.1f} s")

# %% Make one of them again: a Result's request says everything about it
(again,) = ddinfer.generate(pipe, [results[2].request], num_inference_steps=2)
assert again.image.tobytes() == results[2].image.tobytes()

# %% split and gather are there too, so that the same code runs later under torchrun
with ddinfer.split_between_processes(prompts) as mine:
    assert ddinfer.gather(mine, num_items=len(prompts)) == prompts
