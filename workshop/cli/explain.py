"""``expertmesh explain``: shows which experts the tokens of a text go to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.style import Style
from rich.table import Column, Table
from rich.text import Text

from router.cli.common import (
    BAD_USAGE,
    Address,
    ApiKey,
    AsJson,
    Model,
    Timeout,
    check_picture,
    fail,
    printable,
    write,
    write_json,
)
from router.client import DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S, Client, Sampling

if TYPE_CHECKING:
    from workshop.cli.explained import Explained

COLOURS = (
    "#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#76b7b2", "#edc948", "#9c755f",
    "#ff9da7", "#86bc25", "#1f3b73", "#7f7f00",
)  # fmt: skip
"""Of the experts that a layer uses most; the others have none."""
SHOWN_EXPERTS = 8
"""The experts with a column of their own in the table of shares."""
Picture = Annotated[
    Path | None,
    typer.Option("--picture", metavar="FILE", help="Draw tokens and layers to a .png or .svg."),
]
Layer = Annotated[
    int | None,
    typer.Option(help="The layer to show; by default the one whose experts tell most of kinds."),
]
Answer = Annotated[
    int, typer.Option("--max-tokens", min=0, help="Generate so many tokens, and show them too.")
]


def explain(
    prompt: Annotated[str, typer.Argument(help="The text whose tokens to look at.")],
    layer: Layer = None,
    max_tokens: Answer = 0,
    picture: Picture = None,
    model: Model = "",
    address: Address = DEFAULT_ADDRESS,
    api_key: ApiKey = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Show which experts each token of a text goes to.

    Example: expertmesh explain "And the LORD said unto Moses" --picture experts.png

    Generated tokens are the likeliest ones. The last of them is not computed, and has no experts.
    """
    check_picture("--picture", picture, ("png", "svg"))
    with Client(address, api_key=api_key) as client:
        explained = _ask(client, prompt, model, max_tokens, timeout)
    place = _place_of(explained, layer)
    if picture is not None:
        from workshop.cli.explained import draw

        try:
            draw(explained, picture)
        except OSError as error:
            fail(f"--picture: {picture} cannot be written: {error.strerror}", BAD_USAGE)
    if as_json:
        write_json(explained.to_json(), indent=2)
    else:
        _show(explained, place)


def _ask(client: Client, prompt: str, model: str, max_tokens: int, timeout_s: float) -> Explained:
    from workshop.cli.explained import Explained

    [info, *_] = client.model_info(model)
    ids = client.tokenize(prompt, model=info.id)
    sampling = Sampling(max_tokens=max_tokens, temperature=0.0, return_routed_experts=True)
    [reply] = client.generate(ids, sampling, model=info.id, timeout_s=timeout_s)
    rows = reply.routed_experts
    if rows is None:
        fail("the server sent no experts", BAD_USAGE)
    computed = [*ids, *reply.token_ids][: len(rows)]
    return Explained(info, client.tokens(computed, info.id), rows, len(ids), reply.exact)


def _place_of(explained: Explained, layer: int | None) -> int:
    """Return the place of a layer among those with experts."""
    layers = explained.info.moe_layers
    if layer is None:
        return explained.best_layer
    if layer not in layers:
        named = ", ".join(map(str, layers))
        fail(f"--layer: must be one of {named}, the layers with experts; got {layer}", BAD_USAGE)
    return layers.index(layer)


def _show(explained: Explained, place: int) -> None:
    """Print the tokens of one layer, the shares by kind of token, and a line for each layer."""
    info, console = explained.info, Console(highlight=False)
    write(
        f"{info.id}: {len(explained.tokens)} tokens, {len(info.moe_layers)} layers of "
        f"{info.num_experts} experts, {info.num_experts_per_tok} for each token\n"
    )
    if not explained.exact:
        write("not exact: experts were missing, and others took their tokens, or none\n")
    write(f"\nfirst experts in layer {info.moe_layers[place]}:\n")
    has_colours = console.is_terminal and not console.no_color
    console.print(_coloured(explained, place) if has_colours else _numbered(explained, place))
    if has_colours:
        console.print(_legend(explained, place))
    write("\n")
    console.print(_kinds_table(explained, place))
    console.print(_layers_table(explained))


def _style(expert: int | None, shown: list[int]) -> Style:
    if expert not in shown:
        return Style(dim=True)
    return Style(color="#ffffff", bgcolor=COLOURS[shown.index(expert)])


def _coloured(explained: Explained, place: int) -> Text:
    shown = explained.most_used(place, len(COLOURS))
    text = Text()
    for token, expert in zip(explained.tokens, explained.first_experts(place), strict=True):
        text.append(printable(token.text), _style(expert, shown))
    return text


def _numbered(explained: Explained, place: int) -> Text:
    """Return the tokens with the numbers of their experts, where there are no colours."""
    firsts = explained.first_experts(place)
    parts = [
        f"{printable(token.text)}[{'-' if expert is None else expert}]"
        for token, expert in zip(explained.tokens, firsts, strict=True)
    ]
    return Text("".join(parts))


def _legend(explained: Explained, place: int) -> Text:
    shown = explained.most_used(place, len(COLOURS))
    text = Text("experts: ")
    for expert in sorted(shown):
        text.append(f" {expert} ", _style(expert, shown))
        text.append(" ")
    return text.append("others", Style(dim=True)) if len(shown) == len(COLOURS) else text


def _kinds_table(explained: Explained, place: int) -> Table:
    """Return the shares of a layer's assignments by kind of token, in percent."""
    from workshop.cli.explained import ALL_KINDS

    shown = sorted(explained.most_used(place, SHOWN_EXPERTS))
    others = [expert for expert in range(explained.info.num_experts) if expert not in shown]
    shares = 100 * explained.kind_shares[place]
    table = Table(Column("% of kind", no_wrap=True), "tokens", *map(str, shown))
    if others:
        table.add_column("others")
    for number, kind in enumerate(ALL_KINDS):
        num_tokens = explained.kinds.count(kind)
        if num_tokens:
            cells = [f"{shares[number, expert]:.0f}" for expert in shown]
            cells += [f"{shares[number, others].sum():.0f}"] if others else []
            table.add_row(kind, str(num_tokens), *cells)
    return table


def _layers_table(explained: Explained) -> Table:
    table = Table("layer", "entropy, bits", "of kind, bits", "most used")
    entropies, shares = explained.entropies_bits, explained.shares
    for place, layer in enumerate(explained.info.moe_layers):
        used = [f"{e} ({shares[place, e]:.0%})" for e in explained.most_used(place, 4)]
        information = f"{explained.information_bits[place]:.2f}"
        table.add_row(str(layer), f"{entropies[place]:.2f}", information, ", ".join(used))
    return table
