"""The record of a run, and its two files: training.json and the model card.

E: experts.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError
from rich.table import Table

from router.workshop.settings import DenseSize, ModelSettings, TrainingConfig, TrainingError

RECORD_FILE = "training.json"
STRONGEST = 8
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
    kind_shares: dict[str, list[list[float]]]
    source_shares: dict[str, list[list[float]]]
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


def shares_table(expert_shares: Sequence[Sequence[float]]) -> Table:
    """Return a terminal's table of the share of assignments per layer and expert."""
    table = Table(title="Share of held-out tokens' assignments, %")
    table.add_column("layer", justify="right")
    for expert_id in range(len(expert_shares[0])):
        table.add_column(f"expert {expert_id}", justify="right")
    for layer_id, row in enumerate(expert_shares):
        table.add_row(str(layer_id), *(f"{100 * share:.1f}" for share in row))
    return table


def model_card(record: Record, picture: str | None) -> str:
    """Return the model card: the model's sizes, its figures, and the commands that reproduce it.

    `picture` is the name of the picture file of :mod:`router.workshop.picture`, if there is one.
    """
    config, figures = record.config, record.figures
    model, run = config.model, config.optimization
    hashes = "\n".join(f"- `{name}`: sha256 `{sha}`" for name, sha in record.text_sha256.items())
    sizes = {
        "Parameters, in fp32": f"{figures.num_parameters:,}",
        "Parameters that compute a token": f"{figures.num_active_parameters:,}",
        "Layers": model.num_hidden_layers,
        "Experts per layer": model.num_local_experts,
        "Experts per token": model.num_experts_per_tok,
        "Hidden size": model.hidden_size,
        "Expert size": model.intermediate_size,
        "Vocabulary (byte-level BPE)": f"{model.vocab_size:,}",
        "Tokens per sequence in training": run.sequence_length,
    }
    return f"""# {config.card.name}

A small Mixtral-format language model, for trying and testing ExpertMesh. It was trained on one \
CPU thread. It writes in the styles of its texts and knows nothing. It is not tuned for \
instructions or chat. Its input and output embeddings are tied. Its text gets worse beyond the \
sequence length of the training.

{_two_columns("Size", sizes)}

## Text

{config.card.text.strip()}

{hashes}

## Figures

{_perplexities(record)}

{_experts(record, picture)}

{_recipe(record)}"""


def _two_columns(head: str, rows: Mapping[str, object]) -> str:
    lines = (f"| {name} | {value} |" for name, value in rows.items())
    return "\n".join([f"| {head} | |", "|---|---|", *lines])


def _perplexities(record: Record) -> str:
    figures = record.figures
    models = {"this model": figures}
    for size, dense in record.beside.items():
        models[f"dense, same {size} size"] = dense
    rows = [
        f"| {name} | {model.num_parameters:,} | {model.num_active_parameters:,} "
        f"| {model.heldout_perplexity:.2f} |"
        for name, model in models.items()
    ]
    if record.origin is not None:
        perplexity = record.origin.heldout_perplexity
        rows.append(f"| `{record.origin.name}`, from which it went on | | | {perplexity:.2f} |")
    by_source = [
        f"| `{name}` | {source.heldout_tokens:,} | "
        + " | ".join(f"{model.sources[name].perplexity:.2f}" for model in models.values())
        + f" | {source.unigram_perplexity:.2f} |"
        for name, source in figures.sources.items()
    ]
    return "\n".join(
        [
            f"| On {figures.heldout_tokens:,} held-out tokens | Parameters | of them active "
            "| Perplexity per token |",
            "|---|---|---|---|",
            *rows,
            f"| unigram counts of the training text | | | {figures.unigram_perplexity:.2f} |",
            "",
            f"| Perplexity by text | Tokens | {' | '.join(models)} | unigram |",
            "|---" * (len(models) + 3) + "|",
            *by_source,
        ]
    )


def _experts(record: Record, picture: str | None) -> str:
    figures = record.figures
    num_experts = record.config.model.num_local_experts
    num_experts_per_tok = record.config.model.num_experts_per_tok
    lines = [
        "Share of the held-out tokens' expert assignments, in %:",
        "",
        f"| Layer | {' | '.join(f'Expert {expert_id}' for expert_id in range(num_experts))} |",
        f"|---|{'---|' * num_experts}",
    ]
    for layer_id, row in enumerate(figures.expert_shares):
        lines.append(f"| {layer_id} | " + " | ".join(f"{100 * share:.1f}" for share in row) + " |")
    if num_experts == 1:
        return "\n".join(lines)
    if picture:
        lines += ["", "Which tokens each expert takes:", "", f"![Which tokens]({picture})"]
    lines += [
        "",
        "The largest shares that one expert takes of a kind of token or of a text:",
        "",
        "| Of the assignments of | in layer | go to expert | % |",
        "|---|---|---|---|",
        f"| any (an even split) | | any | {100 / num_experts:.1f} |",
        f"| any (the upper bound) | | any | {100 / num_experts_per_tok:.0f} |",
    ]
    for share, kind, layer_id, expert_id in strongest_leanings(figures):
        lines.append(f"| {kind} | {layer_id} | {expert_id} | {100 * share:.1f} |")
    return "\n".join(lines)


def strongest_leanings(figures: Figures) -> list[tuple[float, str, int, int]]:
    """Return the largest share that an expert takes of each kind of token and each text.

    An item is (share, kind, layer, expert). The largest are first, at most `STRONGEST` in all.
    """
    leanings = [
        max(
            (share, kind, layer_id, expert_id)
            for layer_id, row in enumerate(shares)
            for expert_id, share in enumerate(row)
        )
        for kind, shares in {**figures.kind_shares, **figures.source_shares}.items()
    ]
    return sorted(leanings, reverse=True)[:STRONGEST]


def _recipe(record: Record) -> str:
    config, figures = record.config, record.figures
    run = config.optimization
    origin = record.origin
    rows = {
        **({"Begun with": f"`{origin.name}`, identity `{origin.identity}`"} if origin else {}),
        "Steps": f"{run.steps:,}",
        "Sequences per step": run.batch_size,
        "Tokens of all steps": f"{figures.training_tokens:,}",
        "Tokens of the text": f"{figures.distinct_training_tokens:,}",
        "AdamW's learning rate": f"{run.learning_rate:g} after {run.warmup_steps} steps of "
        f"warm-up, then along a cosine to {run.final_learning_rate:g}",
        "Gate": _gating(config),
        "Seed": config.seed,
        "Time": f"{figures.training_s / 60:.0f} minutes at {figures.tokens_per_s:,.0f} tokens/s",
    }
    return f"""## Recipe

{_two_columns("Training", rows)}

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
