"""The steps of the workshop's experiments: each makes a folder or a figure, and is kept.

A step's name ends with a digest of all that decides it: its settings, those of the steps that it
builds on, and the texts. So a step that is done is not done again, and one with other settings is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.workshop_observed import (
    Rows,
    heldout_rows,
    nats_by_language,
    observe,
    specialisation,
)
from cluster.errors import ConfigError

if TYPE_CHECKING:
    from experts.checkpoint.checkpoint import Checkpoint
    from router.gateway.tokenizer import Tokenizer
    from router.workshop.folders.importance import By
    from router.workshop.settings import TrainingConfig

Settings = Mapping[str, Any]
CONTINUED_SEEDS = 1_000_000
"""The distance of the seeds of continued training from those of training: other batches."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the experiments do.

    ``model``, ``gating``, ``training`` and ``continued`` are parts of a training configuration.
    ``scored_rows`` and ``observed_rows`` are rows of held-out text of each language. A token is of
    all languages where each has it ``least_count`` times in the observed rows.
    """

    model: Settings
    gating: Settings
    training: Settings
    continued: Settings
    calibration_rows: int
    scored_rows: int
    observed_rows: int
    random_seeds: tuple[int, ...]
    shuffles: int
    least_count: int

    @property
    def row_tokens(self) -> int:
        """The tokens of a row, as in training."""
        return int(self.training["sequence_length"])


class Steps:
    """The steps on texts by language, kept in a folder.

    ``begin`` is told the name of each, also of one that is done.
    """

    def __init__(
        self,
        folder: Path,
        texts: Mapping[str, Path],
        recipe: Recipe,
        begin: Callable[[str], None] = lambda what: None,
    ) -> None:
        """Raises ``ConfigError`` for a text that cannot be read."""
        self._folder = folder
        self._texts = texts
        self._recipe = recipe
        self._begin = begin
        self.text_sha256 = {name: _sha256(path) for name, path in texts.items()}
        self._rows: dict[tuple[bytes, int], Rows] = {}

    def trained(self, seed: int) -> Path:
        """Return the folder of a model trained from scratch."""
        recipe = self._recipe
        config = self._config(seed, recipe.model, recipe.gating, recipe.training)
        return self._train(f"seed-{seed}-whole", config, None)

    def continued(self, source: Path, seed: int) -> Path:
        """Return the folder of a model that was trained on from another."""
        from router.workshop.origin import open_origin

        sizes = open_origin(source).sizes.model_dump()
        gating = self._recipe.gating
        if sizes["num_local_experts"] == 1:
            gating = {"noisy": False, "importance_weight": 0.0, "load_weight": 0.0}
        config = self._config(CONTINUED_SEEDS + seed, sizes, gating, self._recipe.continued)
        return self._train(f"{_stem(source)}-continued", config, source)

    def pruned(self, source: Path, count: int, by: By, random_seed: int = 0) -> Path:
        """Return the folder of a model with ``count`` of the experts of each layer."""
        from router.workshop.folders.making import source_checkpoint
        from router.workshop.folders.prune import PruneOptions, prune

        recipe = self._recipe
        options = PruneOptions(count, by, random_seed, recipe.calibration_rows, recipe.row_tokens)
        which = f"{by}-{random_seed}" if by == "random" else by
        name = f"{_stem(source)}-pruned-{count}-{which}"
        dest = self._place(name, {"from": source.name, "prune": asdict(options)})
        self._begin(dest.name)
        if not _is_made(dest):
            texts = [] if by == "random" else list(self._texts.values())
            prune(source_checkpoint(str(source)), dest, options, texts)
        return dest

    def merged(self, source: Path) -> Path:
        """Return the folder of a model with all experts of a layer merged into one."""
        from router.workshop.folders.making import source_checkpoint
        from router.workshop.folders.merge import MergeOptions, merge

        recipe = self._recipe
        options = MergeOptions(
            1, sequences=recipe.calibration_rows, sequence_length=recipe.row_tokens
        )
        name = f"{_stem(source)}-merged-1"
        dest = self._place(name, {"from": source.name, "merge": asdict(options)})
        self._begin(dest.name)
        if not _is_made(dest):
            merge(source_checkpoint(str(source)), dest, options, list(self._texts.values()))
        return dest

    def nats(self, model: Path) -> dict[str, float]:
        """Return a model's loss on held-out rows, in nats a token by language."""
        settings = {"rows": self._recipe.scored_rows, "row_tokens": self._recipe.row_tokens}

        def compute() -> dict[str, float]:
            checkpoint, tokenizer = _opened(model)
            return nats_by_language(checkpoint, self._heldout(checkpoint, tokenizer, "scored_rows"))

        found: dict[str, float] = self._figure("nats", model, settings, compute)
        return found

    def specialisation(self, model: Path) -> dict[str, Any]:
        """Return what a model's experts have to do with kinds of tokens and languages."""
        recipe = self._recipe
        names = "observed_rows", "row_tokens", "shuffles", "least_count"

        def compute() -> dict[str, Any]:
            checkpoint, tokenizer = _opened(model)
            rows = self._heldout(checkpoint, tokenizer, "observed_rows")
            observed = observe(checkpoint, tokenizer, rows)
            languages = list(self._texts)
            return specialisation(
                observed, tokenizer, languages, recipe.shuffles, recipe.least_count
            )

        settings = {name: getattr(recipe, name) for name in names}
        found: dict[str, Any] = self._figure("experts", model, settings, compute)
        return found

    def _config(
        self, seed: int, model: Settings, gating: Settings, optimization: Settings
    ) -> TrainingConfig:
        from router.workshop.folders.text import HOLDOUT_EVERY_BLOCKS
        from router.workshop.settings import TrainingConfig

        return TrainingConfig.model_validate(
            {
                "seed": seed,
                # The same blocks as those that pruning and merging do not calibrate on.
                "holdout_every_blocks": HOLDOUT_EVERY_BLOCKS,
                "model": model,
                "gating": gating,
                "optimization": optimization,
                "card": {"name": "experiment", "text": "", "text_commands": ""},
            }
        )

    def _train(self, name: str, config: TrainingConfig, source: Path | None) -> Path:
        from router.workshop.origin import open_origin
        from router.workshop.report import RECORD_FILE
        from router.workshop.state import STATE_FILE
        from router.workshop.train import train

        began = None if source is None else source.name
        out = self._place(name, {"from": began, "train": config.recipe()})
        state = out / STATE_FILE
        self._begin(out.name)
        if state.exists() or not (out / RECORD_FILE).exists():
            origin = None if source is None else open_origin(source)
            texts = list(self._texts.values())
            train(config, texts, out, resume=state.exists(), origin=origin)
        return out

    def _figure(
        self, what: str, model: Path, settings: Settings, compute: Callable[[], Any]
    ) -> Any:
        asked = {"of": model.name, **settings}
        kept = self._place(f"figures/{_stem(model)}-{what}", asked).with_suffix(".json")
        self._begin(f"{_stem(model)}, {what}")
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            temporary = kept.with_suffix(".tmp")
            temporary.write_text(json.dumps(compute()) + "\n", encoding="utf-8")
            temporary.replace(kept)
        return json.loads(kept.read_text(encoding="utf-8"))

    def _place(self, name: str, settings: Settings) -> Path:
        # Texts in their order, in which training reads them.
        decides = json.dumps([settings, list(self.text_sha256.items())], sort_keys=True)
        return self._folder / f"{name}-{hashlib.sha256(decides.encode()).hexdigest()[:12]}"

    def _heldout(self, checkpoint: Checkpoint, tokenizer: Tokenizer, number: str) -> Rows:
        """Return the held-out rows of all languages, once for all models of one tokenizer."""
        num_rows = getattr(self._recipe, number)
        key = (checkpoint.folder / "tokenizer.json").read_bytes(), num_rows
        if key not in self._rows:
            self._rows[key] = {
                language: heldout_rows(
                    checkpoint, tokenizer, text, num_rows, self._recipe.row_tokens
                )
                for language, text in self._texts.items()
            }
        return self._rows[key]


def _opened(model: Path) -> tuple[Checkpoint, Tokenizer]:
    from experts.checkpoint.checkpoint import open_checkpoint
    from router.gateway.tokenizer import Tokenizer

    return open_checkpoint(model), Tokenizer.load(str(model))


def _stem(model: Path) -> str:
    """Return a kept folder's name without its digest."""
    return model.name.rpartition("-")[0]


def _is_made(dest: Path) -> bool:
    from router.workshop.folders.card import RECORD_FILE

    return (dest / RECORD_FILE).exists()


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", str(path)) from None
