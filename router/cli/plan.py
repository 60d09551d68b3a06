"""``expertmesh plan``: the memory and the devices of a model, without a load of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from cluster.errors import ConfigError
from router.cli.common import REFUSED, AsJson, write_json
from router.ops.plan.sizes import format_count, format_size, parse_size

if TYPE_CHECKING:
    from router.ops.plan.devices import Device, DevicesOfFile
    from router.ops.plan.plan import DevicesPlan, Plan


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="A deployment file; or a checkpoint's folder, mesh-tiny, or a known model: "
            "mixtral-8x7b, mixtral-8x22b, dbrx, grok-1, qwen3-235b-a22b, deepseek-v3, "
            "gpt-oss-120b.",
            metavar="MODEL_OR_FILE",
        ),
    ],
    copies: Annotated[
        int | None, typer.Option(min=1, help="Copies of each expert; by default 1.")
    ] = None,
    device_memory: Annotated[
        str | None, typer.Option(help="Memory of a device, like 24GB or 80GiB.")
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(min=1, help="Devices for the experts, or for a file; by default the fewest."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16; auto is the checkpoint's.")
    ] = "auto",
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a sequence; by default the model's longest."),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Sequences that the cache holds at once.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Plan a model's memory and devices, only from its configuration and headers.

    Of a deployment file it tells what lies on each GPU.

    Example: expertmesh plan mixtral-8x7b --copies 2 --device-memory 80GB

    The exit code is 1 when a part does not fit on the given devices.
    """
    from router.ops.plan.deployment import is_deployment
    from router.ops.plan.plan import Wish, make_plan, problems
    from router.ops.plan.source import find_model

    memory = None if device_memory is None else parse_size(device_memory, "--device-memory")
    if is_deployment(model):
        of_models = {"copies": copies, "context": context, "concurrency": concurrency}
        given = [name for name, value in of_models.items() if value is not None]
        given += ["dtype"] if dtype != "auto" else []
        if given:
            raise ConfigError(
                "applies only to a model; a deployment file sets this itself", f"--{given[0]}"
            )
        _plan_file(Path(model), memory, devices, as_json)
        return
    wish = Wish(copies or 1, memory, devices, context, concurrency)
    made = make_plan(find_model(model, dtype), wish)
    found = problems(made)
    if as_json:
        write_json(made.to_json() | {"problems": found}, indent=2)
    else:
        _print_plan(made, found if memory is not None else [])
    if found and memory is not None:
        raise typer.Exit(REFUSED)


def _plan_file(
    file: Path, memory_bytes: int | None, num_devices: int | None, as_json: bool
) -> None:
    from router.ops.plan.deployment import read_tenants
    from router.ops.plan.devices import place, shortages

    planned = place(read_tenants(file), num_devices)
    found = [line for line in [planned.unplaced_line()] if line]
    if memory_bytes is not None:
        found += shortages(planned, memory_bytes)
    if as_json:
        write_json(planned.to_json() | {"problems": found}, indent=2)
    else:
        _print_devices(planned, memory_bytes, found)
    if found:
        raise typer.Exit(REFUSED)


def _print_devices(planned: DevicesOfFile, memory_bytes: int | None, found: Sequence[str]) -> None:
    console = Console()
    if not planned.devices and not found:
        console.print("Nothing of it is on a GPU: num_gpus is 0 everywhere.")
        return
    table = Table("device", "process", "share", "weights", "cache", "at work", "together", "fits")
    for column in table.columns[2:7]:
        column.justify = "right"
    for number, device in enumerate(planned.devices):
        for tenant in device.tenants:
            table.add_row(
                str(number),
                tenant.name,
                f"{tenant.num_gpus:g}",
                format_size(tenant.weight_bytes + tenant.spare_bytes),
                format_size(tenant.cache_bytes) if tenant.cache_bytes else "",
                format_size(tenant.working_bytes + tenant.process_bytes),
                format_size(tenant.most_bytes),
            )
        shares = sum(tenant.num_gpus for tenant in device.tenants)
        sums = ("", "", "", format_size(device.most_bytes), _fits(device, memory_bytes))
        table.add_row(str(number), "in all", f"{shares:g}", *sums, end_section=True)
    console.print(table)
    for sentence in found:
        console.print(f"Does not fit: {sentence}", style="red", highlight=False)
    if memory_bytes is not None and not found:
        console.print("All of it fits.", style="green")


def _fits(device: Device, memory_bytes: int | None) -> str:
    from router.ops.plan.plan import USUAL_DEVICES_BYTES

    if memory_bytes is not None:
        return "yes" if device.most_bytes <= memory_bytes else "no"
    enough = [size for size in USUAL_DEVICES_BYTES if device.most_bytes <= size]
    return f"{format_size(enough[0])} or more" if enough else "no usual GPU"


def _print_plan(made: Plan, found: list[str]) -> None:
    console = Console()
    console.print(_headline(made), markup=False, highlight=False)
    console.print(_parts(made))
    if made.devices:
        console.print(_devices(made))
    if made.needed_device_bytes is not None:
        console.print(
            f"For {_copies(made.copies)} of each expert on {made.num_devices} devices, each needs "
            f"{format_size(made.needed_device_bytes)}.",
            highlight=False,
        )
    for sentence in found:
        console.print(f"Does not fit: {sentence}", style="red", highlight=False)
    if len(made.devices) == 1 and not found:
        console.print("All of it fits.", style="green")


def _headline(made: Plan) -> str:
    model, shape = made.model, made.model.shape
    lines = [
        f"{model.name}: {format_count(shape.total_parameters)} parameters, "
        f"{format_count(shape.active_parameters)} compute a token; {shape.num_moe_layers} layers "
        f"of {shape.num_experts} experts (top {shape.num_experts_per_tok}); {model.dtype}",
        f"from {model.source}",
    ]
    if model.note:
        lines.append(model.note)
    return "\n".join(lines)


def _parts(made: Plan) -> Table:
    table = Table("part", "each", "how many", "together")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row(
        "expert",
        format_size(made.expert_bytes),
        f"{made.model.shape.num_all_experts * made.copies:,}",
        format_size(made.all_experts_bytes * made.copies),
    )
    table.add_row("actor's process", format_size(made.actor_process_bytes), "one a device", "")
    table.add_row("actor's batch", format_size(made.actor_batch_bytes), "one a device", "")
    table.add_row("router's weights", format_size(made.router_weight_bytes), "1", "")
    table.add_row("router's process", format_size(made.router_process_bytes), "1", "")
    table.add_row(
        "router's cache",
        f"{made.cache_token_bytes:,} B a token",
        f"{made.wanted_cache_tokens:,}",
        format_size(made.wanted_cache_bytes),
    )
    step = f"up to {made.longest_tokens:,} tokens"
    table.add_row("router's step", format_size(made.router_step_bytes), step, "")
    table.add_section()
    table.add_row("router in all", format_size(made.router_bytes), "", "")
    return table


def _devices(made: Plan) -> Table:
    table = Table(
        "device",
        f"for {_copies(made.copies)}",
        "the fullest holds",
        "cache, router alone",
        "cache, beside the fullest",
    )
    for devices in made.devices:
        table.add_row(
            format_size(devices.device_memory_bytes),
            _number(devices),
            f"{devices.experts_on_fullest:,} experts, {format_size(devices.bytes_on_fullest)}"
            if devices.num_devices
            else "",
            _tokens(devices.cache_tokens),
            _tokens(devices.cache_tokens_beside_actor) if devices.num_devices else "",
        )
    return table


def _tokens(count: int) -> str:
    return f"{count:,} tokens" if count else "a router does not fit"


def _number(devices: DevicesPlan) -> str:
    if devices.num_devices is None:
        return "do not fit"
    given = "" if devices.experts_fit else ": too few"
    return f"{devices.num_devices} device{'' if devices.num_devices == 1 else 's'}{given}"


def _copies(count: int) -> str:
    return "one copy" if count == 1 else f"{count} copies"
