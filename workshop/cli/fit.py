"""``expertmesh fit``: fits a mixture to the rows of a CSV file, and saves it to be served."""

from __future__ import annotations

import shlex
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table as ShownTable

from cluster.errors import ConfigError, InvalidRequestError
from router.cli.common import (
    BAD_USAGE,
    AsJson,
    check_picture,
    fail,
    printable,
    write,
    write_json,
)
from router.cli.rows import read_table
from workshop.cli.fit_table import Columns, DataError, read_columns

if TYPE_CHECKING:
    import numpy as np

    from workshop.estimators.saved.fit_config import FitConfig

MIXTURE = "this mixture"


@dataclass(frozen=True, slots=True)
class Fitted:
    """A mixture or one of its experts alone: its fit's time, and its scores on held-out rows."""

    name: str
    fit_s: float
    scores: dict[str, float | None]


def fit(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml", help="The estimator and the columns.")
    ],
    data: Annotated[
        Path, typer.Argument(metavar="DATA.csv", help="Rows; the first line names the columns.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the mixture; new or empty.")],
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="PICTURE.svg",
            help="Draw which expert takes which rows; the suffix is the picture's format.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fit a mixture of experts to the rows of a CSV file, and save it to be served.

    Example: expertmesh fit houses.yaml houses.csv --out houses

    A share of the rows is held out. The mixture's score on them is shown beside those of its
    experts, each fitted by itself to the same rows. The folder has a card, and is served by
    `expertmesh serve FOLDER`.
    """
    import numpy as np

    from workshop.estimators.saved.fit_config import build, load_fit_config

    settings = load_fit_config(config)
    estimator = build(settings, config)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        fail(f"--out: {out}: holds other files; name a new or empty folder", BAD_USAGE)
    check_picture("--plot", plot)
    columns = _read(data, settings)
    train, held_out = _split(columns, settings, data)
    with _warnings_as_lines():
        fits = _fit_all(estimator, columns, train, held_out, config, data)
    if settings.values_per_step is None:
        estimator.feature_names_in_ = np.array(columns.features, object)
    estimator.save(out)
    if plot is not None:
        _draw(estimator, columns, train, plot)
    shares = dict(zip(estimator.mixture_.experts, estimator.expert_usage_.tolist(), strict=True))
    commands = _next_commands(out, data, columns, settings)
    if as_json:
        document = {
            "folder": str(out),
            "class": type(estimator).__name__,
            "rows": estimator.n_samples_fit_,
            "held_out_rows": len(held_out),
            "iterations": estimator.n_iter_,
            "log_likelihood": estimator.log_likelihood_,
            "fits": [{"name": one.name, "fit_s": one.fit_s, **one.scores} for one in fits],
            "usage": shares,
            "next": list(commands),
        }
        write_json(document)
        return
    _print(estimator, fits, len(held_out), shares)
    write(f"saved in {out}; next: {commands[0]}, and in another shell: {commands[1]}\n")


def _read(data: Path, settings: FitConfig) -> Columns:
    try:
        with data.open(encoding="utf-8-sig", newline="") as file:
            table = read_table(file, has_header=True)
        has_classes = settings.task == "classification"
        return read_columns(
            table, settings.targets, settings.features, has_classes, settings.values_per_step
        )
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", str(data)) from None
    except InvalidRequestError as error:
        place = f"{data}: {error.field}" if error.field else str(data)
        raise DataError(error.message, place) from None


def _split(columns: Columns, settings: FitConfig, data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of the rows to fit, and of those to hold out, by the seed."""
    import numpy as np
    from sklearn.model_selection import train_test_split

    places = np.arange(len(columns.rows))
    if settings.held_out == 0:
        return places, places[:0]
    is_classification = settings.task == "classification"
    try:
        train, held_out = train_test_split(
            places,
            test_size=settings.held_out,
            random_state=settings.seed,
            stratify=columns.targets if is_classification else None,
        )
    except ValueError as error:  # too few rows, or too few of a class
        raise DataError(
            f"held_out {settings.held_out} of {len(places)} rows cannot be drawn: {error}",
            str(data),
        ) from None
    if len(held_out) < 2:
        raise DataError(
            f"held_out {settings.held_out} of {len(places)} rows leaves {len(held_out)} to test "
            "with, must leave 2 (held_out: 0 fits all rows)",
            str(data),
        )
    return np.sort(train), np.sort(held_out)


def _fit_all(
    estimator: Any,
    columns: Columns,
    train: np.ndarray,
    held_out: np.ndarray,
    config: Path,
    data: Path,
) -> list[Fitted]:
    """Fit the mixture, and each of its experts alone where rows are held out to compare them."""
    from workshop.estimators.base import progress
    from workshop.estimators.saved.fit_config import experts_alone, score

    targets = columns.targets
    alone = experts_alone(estimator) if len(held_out) else {}
    estimator.set_params(verbose=1)
    fits = []

    def fitted(name: str, model: Any) -> None:
        began_at_s = time.monotonic()
        model.fit(columns.rows_at(train), targets[train])
        fit_s = time.monotonic() - began_at_s
        rows = columns.rows_at(held_out)
        fits.append(Fitted(name, fit_s, score(model, rows, targets[held_out]) if len(rows) else {}))

    with _errors_of_a_fit(config, data):
        fitted(MIXTURE, estimator)
    estimator.set_params(verbose=0)
    with progress(1, len(alone), "experts alone") as advance:
        for name, model in alone.items():
            with _errors_of_a_fit(config, data):
                fitted(name, model)
            advance(name)
    return fits


@contextmanager
def _errors_of_a_fit(config: Path, data: Path) -> Iterator[None]:
    """Turn errors of parameters and rows, which scikit-learn finds, into those of the files."""
    from sklearn.utils._param_validation import InvalidParameterError

    try:
        yield
    except InvalidParameterError as error:
        raise ConfigError(str(error), f"{config}: parameters") from None
    except (ValueError, TypeError) as error:
        raise DataError(f"cannot be fitted as {config} says: {error}", str(data)) from None


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Write each different warning of a fit as one line to stderr, without its place in code."""
    console = Console(stderr=True, soft_wrap=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for text in dict.fromkeys(" ".join(str(warning.message).split()) for warning in caught):
        console.print(f"warning: {printable(text)}", markup=False, highlight=False)


def _draw(estimator: Any, columns: Columns, train: np.ndarray, plot: Path) -> None:
    from matplotlib.figure import Figure

    from workshop.estimators.plots import plot_experts
    from workshop.estimators.sequences import sequences_of

    figure = Figure(layout="constrained")
    rows = sequences_of(columns.rows_at(train))
    names = columns.features if rows.ndim == 2 else None
    plot_experts(estimator.mixture_, rows, names, figure.add_subplot())
    try:
        figure.savefig(plot)
    except OSError as error:
        fail(f"--plot: {plot}: {error.strerror}", BAD_USAGE)


def _next_commands(out: Path, data: Path, columns: Columns, settings: FitConfig) -> tuple[str, str]:
    """Return the commands that serve the folder, and predict the same rows."""
    ignored = [word for name in (*settings.targets, *columns.others) for word in ("--ignore", name)]
    model = out.resolve().name
    return (
        shlex.join(["expertmesh", "serve", str(out)]),
        shlex.join(["expertmesh", "predict", model, str(data), *ignored]),
    )


def _print(estimator: Any, fits: list[Fitted], num_held_out: int, shares: dict[str, float]) -> None:
    console = Console()
    write(
        f"{type(estimator).__name__}: {len(shares)} experts, {estimator.n_samples_fit_:,} rows, "
        f"{estimator.n_iter_} iterations in {fits[0].fit_s:.1f} s\n"
    )
    if num_held_out:
        names = {"r2": "R²", "rmse": "RMSE", "log_loss": "log loss"}
        table = ShownTable(f"{num_held_out:,} held-out rows")
        for name in (*fits[0].scores, "fit, s"):
            table.add_column(names.get(name, name), justify="right")
        for fitted in fits:
            cells = ["" if value is None else f"{value:.4g}" for value in fitted.scores.values()]
            table.add_row(printable(fitted.name), *cells, f"{fitted.fit_s:.2f}")
        console.print(table)
    usage = ShownTable("expert", "usage")
    for name, share in shares.items():
        usage.add_row(printable(name), f"{share:.1%}")
    console.print(usage)
