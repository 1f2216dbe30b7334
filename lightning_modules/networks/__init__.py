"""The networks, in plain torch; start with `aeunet.py`, whose parts are in `blocks.py`."""
