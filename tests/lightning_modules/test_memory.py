"""Settings of the C library's allocator."""

import ctypes
import sys

import pytest
import pytorch_lightning as pl

from lightning_modules import memory
from lightning_modules.callbacks import KeepFreedMemory


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are those of glibc")
def test_freed_memory_is_kept_on_a_cpu(monkeypatch: pytest.MonkeyPatch):
    """The C library accepts every setting: it returns 1 for those that it knows."""
    mallopt, answers = ctypes.CDLL(None).mallopt, []

    class Library:
        @staticmethod
        def mallopt(parameter: int, value: int) -> None:
            answers.append(mallopt(parameter, value))

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: Library)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    KeepFreedMemory().setup(trainer, pl.LightningModule(), "fit")
    assert answers == [1] * len(memory.SETTINGS)
