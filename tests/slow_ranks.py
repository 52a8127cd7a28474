"""Two processes that train in step, one slower than the other: ``slow_ranks.py FOLDER SLOWER_RANK``, run by a test."""

import os
import sys
import time
from pathlib import Path

import lightning
import torch

from src.models.sharding import DataParallelStrategy
from src.models.stopping import StopAtSigterm
from src.processes import end_with_first, tell_of_first


class InStep(lightning.LightningModule):
    """One weight; every process says when it trains."""

    def __init__(self, folder: Path, slower: int) -> None:
        super().__init__()
        self.layer, self.folder, self.slower = torch.nn.Linear(4, 1), folder, slower

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        if index == 2:
            (self.folder / f"rank{self.global_rank}").write_text(str(os.getpid()))
        time.sleep(0.5 if self.global_rank == self.slower else 0.01)
        return self.layer(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-4)


if __name__ == "__main__":
    end_with_first()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DataParallelStrategy(),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
        callbacks=[StopAtSigterm()],
        default_root_dir=sys.argv[1],
    )
    tell_of_first(2)
    rows = torch.utils.data.DataLoader(torch.randn(2000, 4), batch_size=1)
    trainer.fit(InStep(Path(sys.argv[1]), int(sys.argv[2])), rows)
