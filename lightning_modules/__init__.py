"""Networks, and their losses, inference, metrics and training; start with `segmentation.py`."""
