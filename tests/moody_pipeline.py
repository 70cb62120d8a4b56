"""A pipeline without weights that does what its prompt says: for tests of everything around it.

It is a real custom pipeline in a folder of its own, loaded with ``trust_remote_code``. Its picture
is one flat colour drawn from the generator, so it depends on the seed alone.
"""

from __future__ import annotations

import json
from pathlib import Path

CODE = """
import ctypes, errno, os, signal, threading, time
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image


def hold(gate):  # until somebody makes this file; ours says that we wait
    while gate and not os.path.exists(gate):
        open(gate + ".waiting", "w").close()
        time.sleep(0.02)


def hold_interpreter():  # as a C call that does not return: no other thread of Python can run
    ctypes.PyDLL(None).sleep(3600)


class HeldImage(Image.Image):
    @property
    def __array_interface__(self):
        if threading.current_thread().name == "ddinfer-writer":
            hold(self.gate)
        return super().__array_interface__


hold(os.environ.get("MOODY_HOLDS_IMPORT"))


class MoodyPipeline(DiffusionPipeline):
    def __init__(self, scheduler):
        hold(os.environ.get("MOODY_HOLDS_LOADING"))
        super().__init__()
        self.register_modules(scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        height: int = 8,
        width: int = 8,
        num_inference_steps: int = 1,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ):
        prompts = [prompt] if isinstance(prompt, str) else prompt
        generators = generator if isinstance(generator, list) else [generator]
        for text in prompts:
            word, _, rest = text.partition(" ")
            if word == "fail":
                raise ValueError(f"cannot draw {rest}")
            if word == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if word == "need" and not os.path.exists(rest):
                raise FileNotFoundError(rest)
            if word == "once" and not os.path.exists(rest):  # kills the first process that tries
                open(rest, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            if word == "wait":
                hold(rest)
            if word == "stall" and not os.path.exists(rest):  # the first process that tries
                open(rest, "w").close()
                hold_interpreter()
            if word == "leave" and not os.path.exists(rest):  # as if all were done, once
                open(rest, "w").close()
                os._exit(0)
            if word == "open":
                open(os.devnull).close()
            if word == "unreadable":
                raise OSError(errno.EIO, os.strerror(errno.EIO), rest)
            if word == "exit":
                os._exit(0)
            if word == "break":
                raise torch.AcceleratorError("the device is gone")
            if word == "sleep":
                time.sleep(float(rest))
            if word == "many" and len(prompts) > int(rest):
                raise torch.OutOfMemoryError(f"no room for {len(prompts)}")
        colours = [torch.randint(1, 256, (3,), generator=g).tolist() for g in generators]
        pictures = [Image.new("RGB", (width, height), tuple(c)) for c in colours]
        for text, picture in zip(prompts, pictures):
            if text.startswith("save "):  # the writer waits for this file
                picture.__class__, picture.gate = HeldImage, text[5:]
        return ImagePipelineOutput(pictures)
"""


def moody_pipeline(folder: str | Path) -> Path:
    """Write the pipeline to ``folder``/moody and return that."""
    from diffusers import DDIMScheduler

    target = Path(folder) / "moody"
    DDIMScheduler().save_pretrained(target / "scheduler")
    (target / "moody.py").write_text(CODE)
    index = {
        "_class_name": ["moody", "MoodyPipeline"],
        "_diffusers_version": "0.36.0",
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (target / "model_index.json").write_text(json.dumps(index))
    return target


def colour(seed: int) -> tuple[int, int, int]:
    """What it draws with this seed."""
    import torch

    generator = torch.Generator("cpu").manual_seed(seed)
    return tuple(torch.randint(1, 256, (3,), generator=generator).tolist())
