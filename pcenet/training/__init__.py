"""Training and evaluation: the options, Lightning's module and callbacks, the run folder.

Importing this package is cheap, because the command line's help needs the options alone; its other modules
load torch, and ``task``, ``callbacks`` and ``run`` load Lightning.
"""

from pcenet.training.config import EvalConfig, PredictConfig, TrainConfig

__all__ = ["EvalConfig", "PredictConfig", "TrainConfig"]
