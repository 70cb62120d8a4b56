"""How a replica makes images. One contract: `ddinfer.engines.base.Engine`."""
