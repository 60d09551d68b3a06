"""Which kernel classes the controller reports, and when it says that they are mixed."""

from __future__ import annotations

import logging

import pytest

from cluster.controller.records import members
from cluster.controller.records.kernels import MixNotice, kernel_status, with_ids
from cluster.reports import KernelCount, KernelStatus
from cluster.spec import ModelKernel, model_key
from tests.unit.cluster.controller.fakes import Cluster, FakePool

LOGGER = "expertmesh.controller"


def of(kernel_class: str, model: str = "m") -> tuple[ModelKernel, ...]:
    return (ModelKernel(model, kernel_class),)


def status_of(*actors: str, routers: tuple[str, ...] = ()) -> KernelStatus:
    [status] = kernel_status(["m"], map(of, actors), map(of, routers))
    return status


@pytest.mark.parametrize(
    ("actors", "routers", "mixed"),
    [
        (["fused", "fused"], ["torch-avx2"], ""),
        ([], ["torch-avx2", "torch-avx2"], ""),
        (["paired", "fused", "fused"], [], "fused on 2 actors, paired on 1"),
        (["a", "b", "c", "c", "b", "c"], [], "c on 3 actors, b on 2, a on 1"),
        (["fused"], ["y", "x"], "x on 1 router, y on 1"),
        (["b", "a"], ["y", "x", "y"], "a on 1 actor, b on 1; y on 2 routers, x on 1"),
    ],
)
def test_a_model_is_mixed_where_its_actors_or_routers_have_several_classes(
    actors: list[str], routers: list[str], mixed: str
) -> None:
    status = status_of(*actors, routers=tuple(routers))
    assert status.mixed == mixed
    assert sum(count.processes for count in status.actors) == len(actors)
    assert sum(count.processes for count in status.routers) == len(routers)


def test_each_model_has_the_classes_of_its_own_processes() -> None:
    shared = (ModelKernel("m", "fused"), ModelKernel("n", "paired"))
    statuses = kernel_status(["n", "m", "mixture"], [shared, of("unfused")], [of("x", "n")])
    counts = (KernelCount("fused", 1), KernelCount("unfused", 1))
    assert statuses == (
        KernelStatus("n", (KernelCount("paired", 1),), (KernelCount("x", 1),), ""),
        KernelStatus("m", counts, (), "fused on 1 actor, unfused on 1"),
    )
    # An actor with two classes for one model counts for both.
    [status] = kernel_status(["m"], [(*of("grouped"), *of("looped"), *of("looped"))], [])
    assert status.mixed == "grouped on 1 actor, looped on 1"


def test_kernels_of_earlier_models_are_left_out_and_others_get_their_ids() -> None:
    now, earlier = (model_key("m", content, "bfloat16") for content in ("new", "old"))
    assert with_ids([*of("fused", earlier), *of("paired", now)], {now}) == of("paired")


def notices(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "are mixed" in record.message]


def test_a_mix_is_logged_once_for_each_set_of_classes(caplog: pytest.LogCaptureFixture) -> None:
    notice = MixNotice()
    mixed, more = status_of("fused", "fused", "paired"), status_of("fused", "paired", "paired")
    with caplog.at_level(logging.WARNING, LOGGER):
        notice.look([status_of("fused", "fused")], lambda: True)
        notice.look([mixed], lambda: False)
        assert notices(caplog) == []
        for status in (mixed, mixed, more, status_of("fused"), mixed):
            notice.look([status], lambda: True)
        [line] = notices(caplog)
        assert "the kernels of m are mixed: fused on 2 actors, paired on 1;" in line
        notice.look([status_of("fused", "unfused")], lambda: True)
        notice.look([status_of("fused", "unfused", routers=("x", "y"))], lambda: True)
        assert len(notices(caplog)) == 3


@pytest.mark.usefixtures("short_periods")
async def test_the_status_and_one_log_line_say_that_actors_and_routers_are_mixed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(members, "MEMBER_TTL_S", 1000)
    pool = FakePool()
    pool.kernel_classes["expert-1"] = "paired"
    caplog.set_level(logging.WARNING, LOGGER)
    cluster = Cluster(3, pool)
    await cluster.start()
    order = (await cluster.complete()).order
    for pid in (11, 12, 13):
        kernel_class = "torch-avx2" if pid == 12 else "torch-avx512"
        watch = cluster.controller.watch
        await watch("router", pid, "n", order, 0, None, "m", kernel_class)
    # The router of an earlier model, and one of an older build.
    await cluster.controller.watch("router", 14, "n", order, 0, None, "m@old", "old")
    await cluster.controller.watch("router", 15, "n", order, 0, None, "m")
    status = await cluster.controller.status()
    assert {a.actor_id: a.kernels for a in status.actors} == {
        "expert-0": of("fused"),
        "expert-1": of("paired"),
        "expert-2": of("fused"),
    }
    # A router is told the classes of its own model's experts.
    for model, classes in (("m", {"fused", "paired"}), ("m@old", set())):
        answer = await cluster.controller.watch("router", 13, "n", order, 0, model=model)
        assert answer["expert_classes"] == classes
    own = {p.pid: p.kernels for p in status.routers}
    assert own[12] == of("torch-avx2")
    assert own[13] == of("torch-avx512")
    assert own[14] == own[15] == ()
    [kernels] = status.kernels
    actors, routers = "fused on 2 actors, paired on 1", "torch-avx512 on 2 routers, torch-avx2"
    assert kernels.mixed == f"{actors}; {routers} on 1"
    await cluster.controller.watch("router", 11, "n", order, 0, None, "m", "torch-avx512")
    await cluster.stop()
    lines = notices(caplog)
    assert "fused on 2 actors, paired on 1;" in lines[0]
    assert [line for line in lines if "2 routers" in line or "1 router" in line] == lines[1:]
    assert len(lines) == 2
