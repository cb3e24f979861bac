"""open_clip and timm, importable on every torch build.

A CPU-only torch beside the torchvision of PyPI cannot load torchvision's compiled operators, and torchvision
then fails at import with `operator torchvision::nms does not exist`. Nothing of ours calls those operators;
declaring the two schemas that its import looks at is enough. Drivers and Ray workers alike import open_clip
and timm from here, so the repair is made once per process, before it is needed.
"""

import importlib

import torch

__all__ = ["open_clip", "timm"]

try:
    importlib.import_module("torchvision")
except RuntimeError as error:
    if "operator torchvision::" not in str(error):
        raise
    # The library object must outlive the import: dropping it drops the schemas.
    _torchvision_schemas = torch.library.Library("torchvision", "DEF")
    _torchvision_schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _torchvision_schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import open_clip
import timm
