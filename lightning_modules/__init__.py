"""What is trained: networks, losses, metrics, inference. Start with `segmentation.py`."""
