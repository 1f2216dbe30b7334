"""How Lightning writes checkpoints here: whole, or not at all."""

from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from files import written_whole


class WholeCheckpoints(TorchCheckpointIO):
    """Writes each checkpoint beside its final place and renames it.

    Lightning writes to the system's temporary folder and moves the file. From one file system to
    another that is a copy, of which a kill or a full disk leaves half, in place of the checkpoint
    that was there before.
    """

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | Path,
        storage_options: Any | None = None,  # noqa: ANN401  (Lightning's signature)
    ) -> None:
        content = BytesIO()  # torch hides the error of the system behind one of its own
        torch.save(checkpoint, content)
        with written_whole(Path(path)) as partial:
            partial.write_bytes(content.getbuffer())
