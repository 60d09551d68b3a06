"""The record of a run, and its two files: training.json and the model card.

E: experts.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError

from workshop.tables import hashes, table
from workshop.train.settings import DenseSize, ModelSettings, TrainingConfig, TrainingError

RECORD_FILE = "training.json"
_DENSE_SIZES: tuple[DenseSize, ...] = ("active", "total")


class SourceFigures(BaseModel):
    """The figures of one text's held-out tokens; perplexities are per token."""

    heldout_tokens: int
    perplexity: float
    unigram_perplexity: float


class Figures(BaseModel):
    """The figures of a run; perplexities are per token, shares [layers][E] of assignments."""

    heldout_tokens: int
    heldout_perplexity: float
    unigram_perplexity: float
    sources: dict[str, SourceFigures]
    expert_shares: list[list[float]]
    training_tokens: int
    distinct_training_tokens: int
    tokens_per_s: float
    training_s: float
    num_parameters: int
    num_active_parameters: int


class OriginFigures(BaseModel):
    """The model that a run went on from: its folder's name, its identity, its own perplexity."""

    name: str
    identity: str
    heldout_perplexity: float


class Record(BaseModel):
    """The content of training.json: configuration, texts and figures of a run.

    `beside` has the figures of the dense runs that the run is compared with.
    """

    config: TrainingConfig
    dense: DenseSize | None = None
    origin: OriginFigures | None = None
    text_sha256: dict[str, str]
    figures: Figures
    beside: dict[DenseSize, Figures] = {}

    def to_json(self) -> str:
        """Return the text of training.json."""
        excluded = {"origin"} if self.origin is None else None
        return json.dumps(self.model_dump(exclude=excluded), indent=2) + "\n"


def read_beside(
    folders: Sequence[Path], config: TrainingConfig, files: Mapping[str, str]
) -> dict[DenseSize, Figures]:
    """Return the figures of finished dense runs of the same recipe and text, by their size.

    Raises TrainingError for a folder without a finished run, and for a run of another recipe, text
    or size.
    """
    beside: dict[DenseSize, Figures] = {}
    for folder in folders:
        path = folder / RECORD_FILE
        try:
            record = Record.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            raise TrainingError(f"{path}: is not the record of a finished run: {error}") from error
        recipe = record.config.recipe()
        sizes = [size for size in _DENSE_SIZES if config.as_dense(size).recipe() == recipe]
        if not sizes or record.text_sha256 != dict(files):
            raise TrainingError(
                f"{path}: is no dense run of this configuration and text; "
                "train it with both and --dense active or --dense total"
            )
        beside[sizes[0]] = record.figures
    return beside


def num_active_parameters(num_parameters: int, model: ModelSettings) -> int:
    """Return how many parameters a token uses: all except the experts that it does not take."""
    idle = model.num_local_experts - model.num_experts_per_tok
    expert = 3 * model.hidden_size * model.intermediate_size
    return num_parameters - model.num_hidden_layers * idle * expert


def model_card(record: Record) -> str:
    """Return the model card: the model's sizes, its figures, and the commands that reproduce it."""
    config, figures = record.config, record.figures
    model, run = config.model, config.optimization
    sizes = {
        "Parameters, in fp32": figures.num_parameters,
        "Parameters that compute a token": figures.num_active_parameters,
        "Layers": model.num_hidden_layers,
        "Experts per layer": model.num_local_experts,
        "Experts per token": model.num_experts_per_tok,
        "Hidden size": model.hidden_size,
        "Expert size": model.intermediate_size,
        "Vocabulary (byte-level BPE)": model.vocab_size,
        "Tokens per sequence in training": run.sequence_length,
    }
    return f"""# {config.card.name}

A small Mixtral-format language model, for trying and testing ExpertMesh. It was trained on one \
CPU thread. It writes in the styles of its texts and knows nothing. It is not tuned for \
instructions or chat. Its input and output embeddings are tied. Its text gets worse beyond the \
sequence length of the training.

{table(("Size", ""), sizes.items())}

## Text

{config.card.text.strip()}

{hashes(record.text_sha256)}

## Figures

{_perplexities(record)}

{_experts(figures)}

{_recipe(record)}"""


def _perplexities(record: Record) -> str:
    figures = record.figures
    models = {"this model": figures}
    for size, dense in record.beside.items():
        models[f"dense, same {size} size"] = dense
    head = f"On {figures.heldout_tokens:,} held-out tokens", "Parameters", "of them active"
    rows: list[tuple[str, object, object, float]] = [
        (name, model.num_parameters, model.num_active_parameters, model.heldout_perplexity)
        for name, model in models.items()
    ]
    if (origin := record.origin) is not None:
        rows.append((f"`{origin.name}`, from which it went on", "", "", origin.heldout_perplexity))
    rows.append(("unigram counts of the training text", "", "", figures.unigram_perplexity))
    by_source = [
        (
            f"`{name}`",
            source.heldout_tokens,
            *(model.sources[name].perplexity for model in models.values()),
            source.unigram_perplexity,
        )
        for name, source in figures.sources.items()
    ]
    whole = table((*head, "Perplexity per token"), rows)
    return f"{whole}\n\n{table(('Perplexity by text', 'Tokens', *models, 'unigram'), by_source)}"


def _experts(figures: Figures) -> str:
    head = [f"Expert {expert_id}" for expert_id in range(len(figures.expert_shares[0]))]
    rows = [
        (layer_id, *(f"{100 * share:.1f}" for share in row))
        for layer_id, row in enumerate(figures.expert_shares)
    ]
    shares = table(("Layer", *head), rows)
    return f"Share of the held-out tokens' expert assignments, in %:\n\n{shares}"


def _recipe(record: Record) -> str:
    config, figures = record.config, record.figures
    run = config.optimization
    origin = record.origin
    rows = {
        **({"Begun with": f"`{origin.name}`, identity `{origin.identity}`"} if origin else {}),
        "Steps": run.steps,
        "Sequences per step": run.batch_size,
        "Tokens of all steps": figures.training_tokens,
        "Tokens of the text": figures.distinct_training_tokens,
        "AdamW's learning rate": f"{run.learning_rate:g} after {run.warmup_steps} steps of "
        f"warm-up, then along a cosine to {run.final_learning_rate:g}",
        "Gate": _gating(config),
        "Seed": str(config.seed),
        "Time": f"{figures.training_s / 60:.0f} minutes at {figures.tokens_per_s:,.0f} tokens/s",
    }
    return f"""## Recipe

{table(("Training", ""), rows.items())}

In serving, the gate is plain top-k.

```sh
{config.card.text_commands.strip()}
{_commands(record)}
```
"""


def _gating(config: TrainingConfig) -> str:
    gating = config.gating
    kind = "noisy top-k gating" if gating.noisy else "top-k gating without noise"
    losses = (
        f"{kind}, importance loss {gating.importance_weight:g}, load loss "
        f"{gating.load_weight:g} (Shazeer et al. 2017)"
    )
    if gating.groups is None:
        return losses
    second = ", the second expert by chance" if gating.groups.random_second else ""
    return (
        f"{losses}; in groups of {gating.groups.tokens} tokens a capacity of "
        f"{gating.groups.capacity_factor:g} equal shares{second} (GShard, Lepikhin et al. 2020)"
    )


def _commands(record: Record) -> str:
    texts = " ".join(f"--text {name}" for name in record.text_sha256)
    start = f"expertmesh train train.yaml {texts}"
    if record.origin is not None:
        start += f" --from {record.origin.name}"
    before = [f"{start} --dense {size} --out dense-{size}" for size in record.beside]
    options = f" --dense {record.dense}" if record.dense else ""
    options += "".join(f" --beside dense-{size}" for size in record.beside)
    return "\n".join([*before, f"{start} --out {record.config.card.name}{options}"])
