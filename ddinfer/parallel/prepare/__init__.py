"""`prepare_pipeline`: any module split across ranks."""

from ddinfer.parallel.prepare.api import PipelinedModel, prepare_pipeline

__all__ = ["PipelinedModel", "prepare_pipeline"]
