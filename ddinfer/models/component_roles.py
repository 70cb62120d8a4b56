"""What a pipeline's components are for, by the names under which diffusers' pipelines keep them."""

#: Component names under which pipelines keep the network that runs once a step, most usual first.
DENOISER_NAMES = ("transformer", "unet", "prior", "decoder", "dit", "transformer_2", "unet_2")

#: Components of a pipeline that run once a step; they are the last to leave the GPUs.
STEP_COMPONENTS = ("transformer", "unet", "transformer_2", "unet_2", "controlnet", "prior")
