"""Mixtures on a real deployment, beside language models: crowds, kills, moves, failures of rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from ray import serve

from cluster.errors import ExpertFailedError, ExpertMeshError, InternalError
from cluster.reports import ActorStatus
from router.client import Client
from tests.cluster_fixture import APP, RANDOM, ServedCluster, greedy, prompt_of, wait_until
from tests.fault.faults import kill
from tests.fault.signals import is_running
from tests.mixture_cluster import (
    FITTED,
    GIVEN,
    NUM_EXPERTS,
    PIECES,
    REPLACED_S,
    RTOL,
    SEQUENCES,
    TREE,
    UNLIKE,
    Mixtures,
    loaded,
    rows_of,
    served_mixtures,
)
from tests.mixture_guide import commands, run
from tests.mixtures import NUM_FEATURES, fitted_estimator
from tests.readme import Place
from workshop.estimators.estimators import HierarchicalMixtureRegressor


@pytest.fixture(scope="module")
def mixtures(
    served_session: ServedCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mixtures]:
    with served_mixtures(served_session, tmp_path_factory.mktemp("mixtures")) as served:
        yield served


@pytest.mark.parametrize("model", NUM_EXPERTS)
def test_served_predictions_are_those_of_one_process(mixtures: Mixtures, model: str) -> None:
    for num_rows in (1, 2, 33, 700):
        mixtures.check(model, rows_of(model, num_rows, num_rows))


def test_a_fitted_estimator_is_served_with_its_own_predictions(mixtures: Mixtures) -> None:
    rows = rows_of(FITTED, 300, 4)["x"]
    reply = mixtures.served.client.predict(FITTED, {"x": rows}, timeout_s=60)
    own = fitted_estimator()
    np.testing.assert_allclose(reply.outputs["value"], own.predict(rows), rtol=RTOL, atol=RTOL)
    weights = np.zeros((300, 3))
    np.put_along_axis(weights, reply.outputs["experts"], reply.outputs["weights"], axis=1)
    np.testing.assert_allclose(weights, own.responsibilities(rows), rtol=RTOL, atol=RTOL)


def test_the_guides_commands_scale_and_kill_and_predict_the_same(mixtures: Mixtures) -> None:
    """All of docs/mixtures.md but `fit`, which the fixture runs, and `serve`, which it stands for.

    ``tests/unit/router/cli/test_serve_command.py`` has the deployment of `serve FOLDER`.
    """
    served, folder = mixtures.served, mixtures.folders[PIECES].parent
    http_port, grpc_port = (
        int(url.rpartition(":")[2]) for url in (served.http_url, served.grpc_address)
    )
    place = Place(http_port, grpc_port, folder)
    _, steps = commands()
    [killing] = [number for number, step in enumerate(steps) if step.command.startswith("kill ")]
    assert served.client.scale(2).outcome == "committed"  # so many has `expertmesh serve FOLDER`
    wait_until(lambda: len(served.actors()) == 2, "an actor has gone", REPLACED_S)
    scaled = run(steps[:killing], place)
    assert "2 -> 3 actors: committed" in scaled[-1].output
    victim = served.status().actors[0]
    assert any(expert[0] == PIECES for expert in victim.experts)
    done = run(steps[killing:], place)
    assert not is_running(victim.pid)
    assert served.actors()[victim.actor_id].generation == victim.generation + 1
    [compared] = [step.output for step in done if step.command.startswith("cmp ")]
    assert compared == "the same\n"
    assert PIECES in done[-1].output
    served.wait_whole()

    rows = np.loadtxt(folder / "pieces.csv", delimiter=",", skiprows=1)
    predicted = np.loadtxt(folder / "after.csv", delimiter=",", skiprows=1, usecols=0)
    fitted = HierarchicalMixtureRegressor.load(folder / PIECES)
    np.testing.assert_allclose(predicted, fitted.mixture_.combine(rows[:, :2])[:, 0], rtol=RTOL)
    assert np.corrcoef(predicted, rows[:, 2])[0, 1] > 0.98


def test_each_expert_computes_exactly_the_rows_that_the_gate_gives_it(mixtures: Mixtures) -> None:
    served = mixtures.served
    chosen = {UNLIKE: 2, GIVEN: 1, TREE: 3, SEQUENCES: 2}
    """How many experts a row of each mixture goes to."""

    def counted(metric: str) -> dict[str, float]:
        samples = served.metric(metric).items()
        return {m: sum(n for told, n in samples if f'model_name="{m}"' in told) for m in chosen}

    def more(metric: str) -> dict[str, float]:
        return {model: n - before[metric][model] for model, n in counted(metric).items()}

    computed, answered = "expertmesh_expert_tokens_total", "expertmesh_prediction_rows_total"
    served.settled_tokens()
    before = {metric: counted(metric) for metric in (computed, answered)}
    for model in chosen:
        mixtures.check(model, rows_of(model, 50, 1))
    for metric in before:
        wait_until(lambda metric=metric: min(more(metric).values()) >= 50, "the rows are told")  # type: ignore[misc]
    served.settled_tokens()
    assert more(computed) == {model: 50 * k for model, k in chosen.items()}
    assert more(answered) == dict.fromkeys(chosen, 50)


def test_predictions_go_over_links_and_by_serve_until_there_is_one(mixtures: Mixtures) -> None:
    served = mixtures.served

    def calls(transport: str) -> float:
        samples = served.metric("expertmesh_router_calls_total")
        wanted = f'model_name="{TREE}"', f'transport="{transport}"'
        return sum(n for labels, n in samples.items() if all(w in labels for w in wanted))

    mixtures.check(TREE, rows_of(TREE, 2, 1))  # has the links made
    wait_until(lambda: _are_linked(mixtures, calls), "a prediction goes over a link", 20)
    by_link, by_serve = calls("link"), calls("serve")
    for seed in range(20):
        mixtures.check(TREE, rows_of(TREE, 2, seed))
    wait_until(lambda: calls("link") >= by_link + 20, "the gateway tells its calls", 10)
    assert (calls("link"), calls("serve")) == (by_link + 20, by_serve)


def _are_linked(mixtures: Mixtures, calls: Callable[[str], float]) -> bool:
    before = calls("link")
    mixtures.check(TREE, rows_of(TREE, 2, 1))
    return calls("link") > before


def test_tritons_client_works_unchanged(mixtures: Mixtures) -> None:
    url = mixtures.served.http_url.removeprefix("http://")
    client = triton.InferenceServerClient(url)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(UNLIKE)
    assert client.get_model_metadata(SEQUENCES)["inputs"][0]["shape"] == [-1, -1, 3]
    for model, binary in ((UNLIKE, True), (UNLIKE, False), (SEQUENCES, True)):
        inputs = rows_of(model, 5, 3)
        asked = []
        for given in mixtures.local[model].spec.inputs:
            tensor = triton.InferInput(given.name, inputs[given.name].shape, given.datatype)
            tensor.set_data_from_numpy(inputs[given.name], binary_data=binary)
            asked.append(tensor)
        reply = client.infer(model, asked)
        for name, array in mixtures.local[model].predict(inputs).items():
            got = reply.as_numpy(name)
            if got.dtype == object:
                got = np.array([[text.decode() for text in row] for row in got])
            if name == "value":
                np.testing.assert_allclose(got, array, rtol=RTOL, atol=RTOL)
            else:
                np.testing.assert_array_equal(got, array)
    client.close()


def test_mixtures_and_language_models_refuse_each_others_requests_by_name(
    mixtures: Mixtures,
) -> None:
    served = mixtures.served
    with pytest.raises(ExpertMeshError, match="mixture"):
        served.client.generate("x", greedy(1), model=UNLIKE)
    with pytest.raises(ExpertMeshError, match=RANDOM):
        served.client.predict(RANDOM, {"x": np.zeros((1, 2))})
    listed = httpx.get(f"{served.http_url}/v1/models").json()["data"]
    assert {model["id"] for model in listed} == {m["id"] for m in served.args["models"][:2]}


def test_a_kill_under_load_fails_nothing_and_changes_no_prediction(mixtures: Mixtures) -> None:
    told = mixtures.served.status()
    victim = told.actors[1]
    with loaded(mixtures) as load:
        load.more(40)
        kill(told, victim.pid)
        wait_until(lambda: _pid(mixtures.served, victim) not in (None, victim.pid), "a successor")
        mixtures.served.wait_whole()
        load.more(40)
    assert mixtures.served.actors()[victim.actor_id].generation > victim.generation


def _pid(served: ServedCluster, actor: ActorStatus) -> int | None:
    now = served.actors().get(actor.actor_id)
    return None if now is None else now.pid


def test_a_killed_router_and_a_killed_gateway_fail_nothing_with_the_clients_retry(
    mixtures: Mixtures,
) -> None:
    served = mixtures.served
    told = served.status()
    router = next(one.pid for one in told.routers if one.pid in _routers_of(mixtures, UNLIKE))
    with Client(served.grpc_address) as client, loaded(mixtures, UNLIKE, client) as load:
        load.more(4)
        kill(told, router, told.gateways[0].pid)
        after = served.wait_whole()
        load.more(20)
    assert not {router, told.gateways[0].pid} & {p.pid for p in (*after.routers, *after.gateways)}


def _routers_of(mixtures: Mixtures, model: str) -> set[int]:
    handle = serve.get_deployment_handle(f"Router-{model}", APP)
    return {handle.stats.remote().result(timeout_s=30)["pid"]}


def test_one_expert_alone_is_copied_moved_and_drained_under_load(mixtures: Mixtures) -> None:
    served = mixtures.served
    with loaded(mixtures) as load:
        load.more(20)
        copied = served.client.set_copies(UNLIKE, 0, 3, 2)
        assert copied.outcome == "committed"
        holders = [a.actor_id for a in served.status().actors if _holds(a, UNLIKE, 3)]
        assert len(holders) == 2
        load.more(20)
        assert served.client.set_copies(UNLIKE, 0, 3, 1).outcome == "committed"
        load.more(20)
        drained = served.client.drain(served.status().actors[0].actor_id)
        assert drained.outcome == "committed"
        load.more(20)
        served.client.scale(served.args["experts"]["actors"])
        served.wait_whole()
        load.more(20)
    held = [expert for actor in served.status().actors for expert in actor.experts]
    assert len({e for e in held if e[0] in NUM_EXPERTS}) == sum(NUM_EXPERTS.values())


def _holds(actor: Any, model: str, expert_id: int) -> bool:
    return (model, 0, expert_id) in [tuple(expert) for expert in actor.experts]


def test_an_expert_that_raises_fails_its_rows_and_not_its_actor(mixtures: Mixtures) -> None:
    served = mixtures.served
    pids = served.pids()
    fragile = np.full((3, 1), 3)
    good = {"x": np.zeros((3, NUM_FEATURES)), "expert": fragile}
    bad = {"x": np.full((3, NUM_FEATURES), 0.5), "expert": fragile}
    with loaded(mixtures, GIVEN) as load:
        for _ in range(5):
            with pytest.raises((ExpertFailedError, InternalError), match="fragile"):
                served.client.predict(GIVEN, bad)
            mixtures.check(GIVEN, good)
        load.more(20)
    assert served.pids() == pids


def test_a_language_model_and_mixtures_serve_beside_each_other(mixtures: Mixtures) -> None:
    served = mixtures.served
    prompt = prompt_of(5, seed=3)
    started_s = time.monotonic()
    with loaded(mixtures) as load:
        [reply] = served.client.generate(prompt, greedy(60), model=RANDOM, timeout_s=60)
        load.more(10)
    assert reply.token_ids == served.expected(prompt, 60)
    assert time.monotonic() - started_s < 60
