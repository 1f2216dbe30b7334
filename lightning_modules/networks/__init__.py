"""Networks: plain torch. Start with `aeunet.py`; its parts are in `blocks.py`."""

from lightning_modules.networks.aeunet import AEUNet, AEUNetOutput

__all__ = ["AEUNet", "AEUNetOutput"]
