"""What targets have relearned so far, reported as metrics while an evaluation runs."""

from __future__ import annotations

from collections.abc import Iterable

from actors.cluster.metrics import recorder
from pipeline.metrics import IMAGES, RELEARNED, STAGE_SECONDS
from pipeline.relearning.evaluation import WHOLE, EvaluationSettings, Trial
from pipeline.relearning.report.results import read_row, relearned_by_regime
from pipeline.storage.store import Store

_NEEDED = ("protection", "fit", "labelling", "share", "target", "regime", "accuracy_last", "diverged")


class RelearnedSoFar:
    """Figures of the finished trials; keeps a few fields of each."""

    def __init__(self, settings: EvaluationSettings, output: Store, finished: Iterable[Trial]) -> None:
        self._output, self._labelling = output, settings.labellings[0]
        self._metrics = recorder()
        self._rows = [{name: row[name] for name in _NEEDED} for row in (read_row(output, trial) for trial in finished)]
        for protection in {str(row["protection"]) for row in self._rows}:
            self._tell(protection)

    def add(self, trial: Trial) -> None:
        """Another trial is finished."""
        row = read_row(self._output, trial)
        self._rows.append({name: row[name] for name in _NEEDED})
        self._metrics.record(IMAGES, row["num_train"] * row["epochs"], stage="relearn")
        self._metrics.record(STAGE_SECONDS, row["seconds"], stage="relearn", step="model")
        self._tell(trial.protection)

    def _tell(self, protection: str) -> None:
        accuracies = relearned_by_regime(self._rows, protection, labelling=self._labelling, share=WHOLE)
        for regime, accuracy in accuracies.items():
            self._metrics.record(RELEARNED, accuracy, protection=protection, regime=regime)
