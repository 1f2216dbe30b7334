"""Networks: plain torch. Start with `aeunet.py`; its parts are in `blocks.py`."""

from lightning_modules.networks.aeunet import AEUNet, AEUNetOutput
from lightning_modules.networks.dnet import DNet
from lightning_modules.networks.unet import Segmentation, UNet3D

__all__ = ["AEUNet", "AEUNetOutput", "DNet", "Segmentation", "UNet3D"]
