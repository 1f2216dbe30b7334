"""Networks: plain torch. Start with `aeunet.py`; its parts are in `blocks.py`."""
