"""Shapes made by procedure, loaders of the usual data sets, and the losses of the point-cloud model's recipe."""

from .dataset import ShapePool, draw_cloud
from .loaders import load_modelnet, load_shapenet
from .losses import LOSSES, build_loss
from .shapes import CLASSES, TRAIN_CLASSES, TRANSFER_CLASSES, make_shape

__all__ = [
    "CLASSES",
    "LOSSES",
    "ShapePool",
    "TRAIN_CLASSES",
    "TRANSFER_CLASSES",
    "build_loss",
    "draw_cloud",
    "load_modelnet",
    "load_shapenet",
    "make_shape",
]
