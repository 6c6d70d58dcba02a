"""A run over nodes is the simulator's run: the same cohorts, updates, checks and metrics, whatever happens to them."""

import copy
import functools
import json
import pickle
import re
import struct
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load, save

from federa.checkpoint import RunDirectory
from federa.config import parse_config
from federa.data.datasets import Table, read_table
from federa.engines import Serial
from federa.experiment import build_experiment
from federa.flower.federation import Federation
from federa.flower.messages import SLACK_BYTES
from federa.flower.node import Node
from federa.progress import Bar, console
from federa.run import Observer, run
from federa.server import finish_round
from federa.types import Absence, FederaError, RoundFailedError, ServerState
from running import jobs_of, same, short_reports, steady
from small import TASKS, write_task

LATE = "no answer by the end of the round"
CLIENTS = [1000, 1007, 1014]  # the nodes of `three`


class After(Observer):
    """Does something when a round is over."""

    def __init__(self, number, action):
        self.number, self.action = number, action

    def finished_round(self, record):
        if record["round"] == self.number:
            self.action()


@functools.cache
def simulator(config):
    """Return what the simulator's run of a recipe gives."""
    return run(config)


@functools.cache
def simulated(config, absent=frozenset(), rounds=None):
    """Return the last state and losses of the simulator, without the updates of some `(round, client)`."""
    experiment, losses = build_experiment(config), []
    state = ServerState(0, experiment.params, config.server_optimizer.init(experiment.params))
    with Serial(threads=1).open(experiment) as session:
        for number in range(1, (rounds or config.rounds) + 1):
            updates = (
                Absence(update.job, LATE) if (number, update.job.client_id) in absent else update
                for update in session.train(state.params, jobs_of(experiment, number))
            )
            state, summary = finish_round(config, state, jobs_of(experiment, number), updates)
            losses.append(summary.loss)
    return state, losses


def check_simulated(result, experiment, absent):
    """Require the simulator's state and losses, to the bit, without some of the updates."""
    state, losses = simulated(experiment.config, frozenset(absent))
    assert same(result.state.params, state.params)
    assert [record["loss"] for record in result.records] == losses


def check_equal(found, expected):
    assert same(found.state.params, expected.state.params)
    assert steady(found.records) == steady(expected.records)
    assert found.summary["bytes_down"] == expected.summary["bytes_down"]


def line_of(config, place, **options):
    """Return the one line of a mistake."""
    with pytest.raises(FederaError) as caught:
        run(config, place=place, **options)
    (line,) = str(caught.value).splitlines()
    return line


def verdicts(result):
    return [record["verdicts"] for record in result.records]


@pytest.mark.parametrize("method", ["federa", "lora", "adapter", "bitfit", "ft"])
def test_a_federation_gives_the_simulators_metrics(recipe, federation, tmp_path, method):
    changes = {"method": {"name": method}}
    expected = run(parse_config({**recipe, **changes}))
    _, config, place = federation(**changes)
    check_equal(run(config, tmp_path / "run", place=place), expected)


@pytest.mark.parametrize("method", ["federa", "lora"])
@pytest.mark.parametrize("task", ["ner", "qa"])
def test_tasks_whose_texts_are_several_rows(recipe, three, tmp_path, task, method):
    """As many clients train in a round as there are, so that all of them are looked at."""
    changes = {
        "data": {"train": str(write_task(tmp_path / "data", task))},
        "task": TASKS[task],
        "method": {"name": method, "rank": 4},
        "client": {**recipe["client"], "batch_size": 4},
    }
    experiment, config, place = three(**changes)
    assert len(experiment.train) > experiment.train.num_examples
    check_equal(run(config, place=place), simulator(experiment.config))


@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"name": "federa", "rank": 4, "head": "freeze"}},
        {"method": {"name": "federa", "rank": 4}, "wire": {"name": "int8"}},
        {"method": {"name": "federa", "rank": 4}, "wire": {"name": "fp16"}},
        {"client": {"batch_size": 8, "max_steps": 3, "epochs": 2, "proximal": 0.1, "precision": "fp32"}},
        {"client": {"batch_size": 8, "max_steps": 3, "precision": "bf16"}},
        {"aggregator": {"name": "median"}, "server_optimizer": {"name": "adam"}},
    ],
    ids=["head=freeze", "int8", "fp16", "client", "bf16", "server"],
)
def test_other_recipes(three, changes):
    experiment, config, place = three(**changes)
    check_equal(run(config, place=place), simulator(experiment.config))


@pytest.mark.parametrize("wire", ["fp32", "int8"])
def test_what_is_private_is_clipped_before_it_travels(three, wire):
    """Rounding sees what is sent: clipped after it, the last bits would be others."""
    private = {"clip": 0.05, "noise_multiplier": 1e-6, "noise": "seeded"}
    changes = {"aggregator": {"name": "mean", "weighted": False}, "privacy": private}
    method = {"name": "federa", "rank": 4}
    experiment, config, place = three(rounds=3, method=method, wire={"name": wire}, **changes)
    check_equal(run(config, place=place), simulator(experiment.config))


def test_only_the_cohort_is_asked(three):
    experiment, config, place = three(cohort=1, rounds=4)
    check_equal(run(config, place=place), simulator(experiment.config))
    asked = [node for node, kind in place.post.sent if kind == "train"]
    assert asked == [CLIENTS[jobs_of(experiment, number)[0].client_id] for number in range(1, 5)]
    assert len(set(asked)) > 1


@pytest.mark.parametrize("lost", ["lose", "lose_answers"])
def test_what_is_lost_on_the_way_is_asked_for_again(three, lost):
    experiment, config, place = three()
    place.built = lambda: getattr(place.post, lost).update({CLIENTS[1]: 1})
    check_equal(run(config, place=place), simulator(experiment.config))
    assert place.post.kinds(CLIENTS[1]) == ["hello", "train", "train", "train"]
    assert place.post.kinds(CLIENTS[0]) == ["hello", "train", "train"]


def test_a_slow_node_is_not_asked_again_too_soon(three):
    experiment, config, place = three({"ask_again": 1000})
    place.post.slow[CLIENTS[0]] = 20
    check_equal(run(config, place=place), simulator(experiment.config))
    assert all(place.post.kinds(node) == ["hello", "train", "train"] for node in CLIENTS)


class Order(Observer):
    def __init__(self):
        self.clients = []

    def updated(self, update, of):
        self.clients.append(update.job.client_id)


def test_what_a_slow_node_answers_twice_counts_once_and_in_its_turn(three):
    """Its late answers come in rounds in which nobody asks for them any more."""
    told = []
    experiment, config, place = three(
        {"ask_again": 0.05},
        rounds=3,
        partition={"name": "dirichlet", "clients": 3, "alpha": 0.5},
        told=told.append,
    )
    first, *others = [job.client_id for job in jobs_of(experiment)]
    assert [first, *others] != sorted([first, *others])
    place.built = lambda: place.post.slow.update({CLIENTS[first]: 20})
    order = Order()
    check_equal(run(config, place=place, observer=order), simulator(experiment.config))
    assert order.clients == 3 * [first, *others]
    late = f"round 1: client {first}: an answer came after the end of the round; it is put away"
    assert told.count(late) == 1
    assert place.post.kinds(CLIENTS[first]).count("train") > 3
    assert place.post.kinds(CLIENTS[others[0]]) == ["hello", *3 * ["train"]]


def test_what_comes_after_a_round_is_put_away(three):
    """A SuperLink keeps in memory what nobody takes."""
    experiment, config, place = three({"ask_again": 0.05}, rounds=3)
    place.built = lambda: place.post.slow.update({CLIENTS[1]: 20})
    check_equal(run(config, place=place), simulator(experiment.config))
    assert place.post.kinds(CLIENTS[1]).count("train") > 3
    assert {json.loads(reply.header)["round"] for _, reply in place.post.replies} <= {3}


def test_what_is_never_answered_is_given_up(three):
    _, config, place = three({"round": 0.2}, rounds=4, min_success=0.6)
    place.built = lambda: place.post.lose.update({CLIENTS[1]: 1000})
    run(config, place=place)
    asked = [
        str(i) for i, (node, kind) in enumerate(place.post.sent) if (node, kind) == (CLIENTS[1], "train")
    ]
    assert place.post.forgotten and place.post.forgotten == asked[: len(place.post.forgotten)]


def test_who_answers_twice_in_a_round_is_told_of(three):
    """Another client keeps the round open until the second answer has come."""
    told = []
    experiment, config, place = three({"ask_again": 0.05}, rounds=1, told=told.append)

    def built():
        place.post.slow[CLIENTS[0]] = 10
        place.post.lose[CLIENTS[1]] = 12

    place.built = built
    check_equal(run(config, place=place), simulator(experiment.config))
    assert told.count("round 1: client 0: it answered more than once; one answer counts") == 1


def once(kind, header):
    """Return what puts other bytes in the place of a node's first answer of a kind."""
    left = [kind]
    return lambda *own: (header, b"") if json.loads(own[0])["kind"] in left and left.pop() else own


def test_garbage_is_asked_for_again_where_a_round_waits_for_all(three):
    told = []
    experiment, config, place = three({"round": 0.1}, min_success=1.0, told=told.append)
    place.post.spoil[CLIENTS[1]] = once("trained", b"garbage")
    check_equal(run(config, place=place), simulator(experiment.config))
    assert [line for line in told if line.startswith("round 1: client 1: message: damaged")]


def test_a_garbled_hello_is_asked_for_again(three):
    told = []
    experiment, config, place = three(told=told.append)
    place.post.spoil[CLIENTS[1]] = once("here", b"garbage")
    check_equal(run(config, place=place), simulator(experiment.config))
    (line,) = [line for line in told if "damaged" in line]
    assert line.startswith(f"node {CLIENTS[1]}: ") and line.endswith("; it is asked again")
    assert place.post.kinds(CLIENTS[1])[:2] == ["hello", "hello"]


def test_a_node_that_says_nothing_but_garbage_is_asked_now_and_then(three):
    """At every look it would keep server and node busy, and fill the log."""
    told = []
    _, config, place = three({"start": 1, "ask_again": 0.4}, told=told.append)
    place.post.spoil[CLIENTS[1]] = lambda header, tensors: (b"garbage", b"")
    assert line_of(config, place).startswith("waiting for 1 of 3 nodes: 1, for longer than 1 s")
    assert 2 <= len(place.post.kinds(CLIENTS[1])) <= 4
    assert len([line for line in told if "damaged" in line]) == 1


def test_an_answer_may_be_as_long_as_a_state_and_no_longer(three):
    """What the post makes room for is what this recipe's updates can have."""
    experiment, config, place = three()
    run(config, place=place)
    state = sum(4 * tensor.numel() for tensor in experiment.params.values())
    assert state < place.post.longest < state + 2 * SLACK_BYTES


def test_a_client_whose_key_is_gone_keeps_no_round_waiting(three):
    """As after `--resume` without its key: what it trains on is known, but nobody may speak for it."""
    experiment, config, place = three({"round": 60})
    place._rows = [len(part) for part in experiment.parts]
    del place.seats[1]
    found = run(config, place=place)
    check_simulated(found, experiment, absent={(1, 1), (2, 1)})
    assert [v["1"] for v in verdicts(found)] == 2 * ["it has no key here"]


def test_updates_are_handed_on_while_others_are_awaited(three):
    """A server keeps those alone whose turn has not come."""
    experiment, config, place = three({"ask_again": 1000}, rounds=1)
    *_, last = [job.client_id for job in jobs_of(experiment)]
    begun = []

    class Looks(Order):
        def updated(self, update, of):
            super().updated(update, of)
            self.looks = [*getattr(self, "looks", []), place.post.looks - begun[0]]

    def built():
        begun.append(place.post.looks)
        place.post.slow[CLIENTS[last]] = 20

    place.built, order = built, Looks()
    check_equal(run(config, place=place, observer=order), simulator(experiment.config))
    assert order.clients[-1] == last
    assert all(looks < 10 for looks in order.looks[:-1]) and order.looks[-1] >= 20


@pytest.mark.parametrize("lost", ["lose", "lose_answers"])
def test_a_hello_that_is_lost_is_said_again(three, lost):
    experiment, config, place = three()
    getattr(place.post, lost)[CLIENTS[1]] = 1
    check_equal(run(config, place=place), simulator(experiment.config))
    assert place.post.kinds(CLIENTS[1]) == ["hello", "hello", "train", "train"]


def test_a_node_that_is_off_for_a_while_is_waited_for(three):
    experiment, config, place = three()
    place.built = lambda: (place.post.off.add(CLIENTS[2]), place.post.back.update({CLIENTS[2]: 30}))
    check_equal(run(config, place=place), simulator(experiment.config))


def test_a_node_that_stays_off_is_left_out_until_it_is_back(three):
    experiment, config, place = three({"round": 0.3}, rounds=3)
    place.built = lambda: place.post.off.add(CLIENTS[1])
    found = run(config, place=place, observer=After(2, place.post.off.clear))
    check_simulated(found, experiment, absent={(1, 1), (2, 1)})
    assert verdicts(found) == [*2 * [{"0": "ok", "1": LATE, "2": "ok"}], dict.fromkeys("012", "ok")]
    size = config.wire.size(found.state.params)
    assert [record["bytes_up"] for record in found.records] == [2 * size, 2 * size, 3 * size]
    assert [record["rejected"] for record in found.records] == [1, 1, 0]
    assert [record["clients"] for record in found.records] == [2, 2, 3]
    assert all(0 <= record["accuracy"] <= 1 for record in found.records)


def test_too_few_updates_fail_the_round_and_keep_the_last_state(three, tmp_path):
    experiment, config, place = three({"round": 0.3, "short": "fail"}, min_success=0.9)
    after = After(1, lambda: place.post.off.update(CLIENTS[1:]))
    with pytest.raises(RoundFailedError, match=f"round 2: 1 of 3 updates counted.*client 2: {LATE}"):
        run(config, tmp_path / "run", place=place, observer=after)
    kept = RunDirectory(tmp_path / "run").load_checkpoint()
    assert kept.round == 1 and same(kept.params, simulated(experiment.config, rounds=1)[0].params)


def off_past_the_end_of_the_round(place, *nodes):
    """Take nodes off; they come back a third of a second later at the earliest, the rounds being shorter."""
    assert place.patience.round < 0.2 and place.patience.poll == 0.01
    place.post.off.update(nodes)
    place.post.back.update(dict.fromkeys(nodes, 33))


def test_a_round_waits_until_enough_updates_have_come(three):
    experiment, config, place = three({"round": 0.1}, min_success=1.0)
    place.built = lambda: off_past_the_end_of_the_round(place, *CLIENTS[:2])
    found = run(config, place=place)
    check_equal(found, simulator(experiment.config))
    assert found.records[0]["seconds_round"] > 0.3


def test_a_round_does_not_wait_for_more_than_enough(three):
    experiment, config, place = three({"round": 0.1}, min_success=0.6, rounds=1)
    place.built = lambda: place.post.off.add(CLIENTS[0])
    check_simulated(run(config, place=place), experiment, absent={(1, 0)})


def test_an_update_that_will_not_count_is_not_enough(three):
    experiment, config, place = three({"round": 0.1}, min_success=0.6, rounds=1)
    place.post.spoil[CLIENTS[0]] = spoiling(lambda said, _: said.update(weight=1e6))
    place.built = lambda: off_past_the_end_of_the_round(place, CLIENTS[1])
    check_simulated(run(config, place=place), experiment, absent={(1, 0)})


def spoiling(change):
    """Return what changes a node's updates: the fields of the header, and the tensors."""

    def spoil(header, tensors):
        said = json.loads(header)
        if said["kind"] != "trained":
            return header, tensors
        state = load(tensors)
        change(said, state)
        return json.dumps(said).encode(), save(state)

    return spoil


def replacing(header, tensors=b""):
    """Return what puts other bytes in the place of a node's updates."""
    return lambda *own: (header, tensors) if json.loads(own[0])["kind"] == "trained" else own


def with_tensors(tensors):
    return lambda header, own: (header, tensors if json.loads(header)["kind"] == "trained" else own)


def each(change):
    def do(_, state):
        for name in state:
            state[name] = change(state[name]).contiguous()

    return spoiling(do)


def one(change):
    def do(_, state):
        name = sorted(state)[0]
        state[name] = change(state[name]).contiguous()

    return spoiling(do)


def f4():
    """A safetensors file of a type that torch does not have."""
    about = json.dumps({"w": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}).encode()
    return struct.pack("<Q", len(about)) + about + bytes(4)


SPOILS = {
    "garbage": (replacing(b"\x00\xff garbage"), "message: damaged"),
    "empty": (replacing(b""), "message: damaged"),
    "pickle": (with_tensors(pickle.dumps({"w": 1})), r"message: damaged \(SafetensorError\)"),
    "no tensors": (with_tensors(b""), "wrong keys"),
    "another kind": (
        replacing(b'{"kind": "here", "client": 0, "rows": 80}'),
        "message: 'here' was not expected",
    ),
    "unknown field": (spoiling(lambda said, _: said.update(code="x")), "message: code: Extra inputs"),
    "too large": (
        spoiling(lambda _, state: state.update(more=torch.zeros(1 << 18))),
        "an update of [0-9]+ bytes, more than [0-9]+$",
    ),
    "large header": (replacing(b" " * (1 << 21)), "message: a header of 2097152 bytes"),
    "one NaN": (one(lambda t: t.index_fill(0, torch.tensor([0]), torch.nan)), "not finite"),
    "Inf": (one(lambda t: t + torch.inf), "not finite"),
    "too long": (each(lambda t: t + 1e5), "norm .* exceeds max_update_norm"),
    "shape": (one(lambda t: t[:-1]), "wrong shape"),
    "type": (one(lambda t: t.double()), "wrong dtype"),
    "fewer keys": (spoiling(lambda _, state: state.pop(sorted(state)[0])), "wrong keys .* is missing"),
    "more keys": (
        spoiling(lambda _, state: state.update(odd=torch.zeros(1))),
        "wrong keys .'odd' is unknown",
    ),
    "another round": (spoiling(lambda said, _: said.update(round=7)), "an update of round 7 of run run-1"),
    "another run": (spoiling(lambda said, _: said.update(run="run-2")), "an update of round . of run run-2"),
    "another client": (spoiling(lambda said, _: said.update(client=2)), "an update .* not of this job"),
    "another seed": (spoiling(lambda said, _: said.update(seed=5)), "an update .* not of this job"),
    "weight": (
        spoiling(lambda said, _: said.update(weight=81)),
        "weight 81 exceeds the client's 80 examples",
    ),
    "no weight": (spoiling(lambda said, _: said.update(weight=float("nan"))), "weight nan is not a positive"),
    "loss": (
        spoiling(lambda said, _: said["metrics"].update(loss=float("nan"))),
        "metric 'loss' is nan, not a finite number",
    ),
    "refusal": (replacing(b'{"kind": "refused", "reason": "no", "wants": null}'), "refused: no"),
    "no loss": (
        spoiling(lambda said, _: said["metrics"].pop("loss")),
        ".*loss",
    ),
    "no such type": (
        with_tensors(f4()),
        "message: damaged",
    ),
    "long reason": (
        replacing(json.dumps({"kind": "refused", "reason": "x\n" * 9999}).encode()),
        "refused: x",
    ),
    "long name": (
        spoiling(lambda _, state: state.update({"x" * 9999: torch.zeros(1)})),
        "wrong keys",
    ),
}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [pytest.param(*case, id=name) for name, case in SPOILS.items()],
)
def test_a_bad_answer_is_named_and_the_round_is_one_without_it(three, spoil, words):
    told = []
    experiment, config, place = three(told=told.append)
    place.post.spoil[CLIENTS[1]] = spoil
    found = run(config, place=place)
    check_simulated(found, experiment, absent={(1, 1), (2, 1)})
    for record in found.records:
        bad = record["verdicts"].pop("1")
        assert re.match(words, bad) and bad.isprintable() and len(bad) < 500
        assert record["verdicts"] == {"0": "ok", "2": "ok"} and record["rejected"] == 1
    assert all(line.isprintable() for line in told)


def test_words_that_look_like_markup_are_shown_as_they_are(three, capsys):
    """Markup that is wrong would end the run: any node could."""
    shown = console()
    _, config, place = three(told=shown.print)
    reason = {"kind": "refused", "reason": "no [/x] [red]:boom:", "wants": None}
    place.post.spoil[CLIENTS[1]] = replacing(json.dumps(reason).encode())
    run(config, place=place, observer=Bar(shown))
    out = capsys.readouterr().out
    assert out.count("round 1: client 1: refused: no [/x] [red]:boom:\n") == 1
    assert out.count("rejected: client 1: refused: no [/x] [red]:boom:\n") == 2


@pytest.mark.parametrize("method", ["federa", "lora"])
def test_a_node_that_is_started_again_changes_nothing(three, method):
    experiment, config, place = three(rounds=3, method={"name": method, "rank": 4})
    again = After(1, lambda: place.post.restart(CLIENTS[1]))
    check_equal(run(config, place=place, observer=again), simulator(experiment.config))
    wants_init = ["train"] if method == "federa" else []
    assert place.post.kinds(CLIENTS[1]) == ["hello", "train", "train", "hello", "train", *wants_init, "train"]
    assert place.post.kinds(CLIENTS[0]) == ["hello", *3 * ["train"]]


def test_a_node_that_is_started_again_while_it_trains_changes_nothing(three):
    experiment, config, place = three()
    first, restarted = place.post.nodes[CLIENTS[1]], []

    def lost_with_the_node(header, tensors):
        answer = first.answer(header, tensors)
        if json.loads(header)["kind"] == "train" and not restarted:
            restarted.append(place.post.restart(CLIENTS[1]))
            place.post.lose_answers[CLIENTS[1]] = 1
        return answer

    place.post.nodes[CLIENTS[1]] = SimpleNamespace(answer=lost_with_the_node)
    check_equal(run(config, place=place), simulator(experiment.config))
    assert restarted


ROUNDED = {"method": {"name": "federa", "rank": 4}, "wire": {"name": "int8"}}


def test_a_node_with_a_folder_keeps_what_rounding_took_away(three):
    experiment, config, place = three(keep=True, rounds=3, **ROUNDED)
    again = After(2, lambda: [place.post.restart(node) for node in CLIENTS])
    check_equal(run(config, place=place, observer=again), simulator(experiment.config))


def test_a_second_run_does_not_begin_with_what_the_first_kept(three):
    """The first had all clients in its first round; here some come later."""
    experiment, config, place = three(keep=True, rounds=3, cohort=1, **ROUNDED)
    run(config.replace(rounds=1, cohort=3), place=place)
    check_equal(run(config, place=successor(place, run="run-2")), simulator(experiment.config))


def fewer_rows(node, folder, count=50):
    """Return the same owner's node with fewer rows."""
    rows = list(read_table(node._config.data.train, "train"))[:count]
    Table.from_list(rows).to_parquet(folder / "fewer.parquet")
    return Node(node._config.replace(**{"data.train": str(folder / "fewer.parquet")}), node._client)


def test_a_node_whose_rows_have_changed_is_left_out_with_a_line(three, tmp_path):
    told = []
    experiment, config, place = three(told=told.append)
    nodes = place.post.nodes
    change = After(1, lambda: nodes.update({CLIENTS[1]: fewer_rows(nodes[CLIENTS[1]], tmp_path)}))
    found = run(config, place=place, observer=change)
    check_simulated(found, experiment, absent={(2, 1)})
    assert verdicts(found)[1]["1"] == "client 1 had 80 rows before, and now 50" == told[-1]


def test_a_node_that_cannot_take_part_any_more_is_left_out_with_a_line(three):
    """Its owner has changed the recipe."""
    experiment, config, place = three()
    post, other = place.post, three(seed=4)[2].post
    change = After(1, lambda: post.nodes.update({CLIENTS[1]: other.nodes[CLIENTS[1]]}))
    found = run(config, place=place, observer=change)
    check_simulated(found, experiment, absent={(2, 1)})
    reason = "client 1 cannot take part: recipe: seed is 4 here and 3 at the server"
    assert verdicts(found)[1]["1"] == reason


def test_a_node_that_does_not_fit_keeps_the_start_waiting_and_ends_it_for_nobody(three, tmp_path):
    told = []
    _, config, place = three({"start": 0.5}, told=told.append)
    place.post.nodes[CLIENTS[1]] = three(seed=4)[2].post.nodes[CLIENTS[1]]
    line = line_of(config, place, out=tmp_path / "run")
    assert line == "waiting for 1 of 3 nodes: 1, for longer than 0.5 s; start them and try again"
    reason = "client 1 cannot take part: recipe: seed is 4 here and 3 at the server"
    assert told.count(f"node {CLIENTS[1]}: {reason}; it is asked again") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_begins_when_the_owner_has_put_the_recipe_right(three):
    experiment, config, place = three()
    post = place.post
    right, post.nodes[CLIENTS[1]] = post.nodes[CLIENTS[1]], three(seed=4)[2].post.nodes[CLIENTS[1]]
    place.told = lambda line: post.nodes.update({CLIENTS[1]: right}) if "cannot take part" in line else None
    check_equal(run(config, place=place), simulator(experiment.config))


@pytest.mark.parametrize("keys", [True, False])
def test_a_run_begins_with_enough_nodes_and_others_join_later(three, tmp_path, monkeypatch, keys):
    """Nor does a resumed one know what a client trains on that had not come."""
    short_reports(monkeypatch)
    told = []
    waits = {"nodes": 2, "round": 0.4}
    experiment, config, place = three(waits, rounds=3, keys=keys, told=told.append)
    place.post.off.add(CLIENTS[1])
    after = After(1, place.post.off.clear)
    found = run(config, tmp_path / "run", place=place, observer=after)
    check_simulated(found, experiment, absent={(1, 1)})
    assert told[-1] == "begun without 1 of 3 nodes" + (": 1" if keys else "")
    held = json.loads((tmp_path / "run" / "partition.json").read_text())
    assert held["client_sizes"] == [80, 0, 80] and held["evaluation_examples_trained_on"] is None

    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "cut", place=successor(place, run="run-2"), observer=Cut(2))
    resumed = run(config, tmp_path / "cut", place=successor(place, tmp_path / "cut", "run-2"), resume=True)
    assert resumed.state.round == 3 and verdicts(resumed)[2] == dict.fromkeys("012", "ok")


def test_a_client_that_joins_late_weighs_no_more_than_its_rows(three):
    _, config, place = three({"nodes": 2, "round": 0.4})
    place.post.off.add(CLIENTS[1])
    place.post.spoil[CLIENTS[1]] = spoiling(lambda said, _: said.update(weight=81))
    found = run(config, place=place, observer=After(1, place.post.off.clear))
    assert verdicts(found)[1]["1"] == "weight 81 exceeds the client's 80 examples"


@pytest.mark.parametrize("nodes", [0, 4])
def test_a_start_with_none_or_more_nodes_than_there_are_is_a_line(three, nodes):
    _, config, place = three({"nodes": nodes})
    assert line_of(config, place) == f"min-nodes: {nodes}, but there are 3 nodes"


def test_nodes_that_do_not_come_are_named(three):
    told = []
    _, config, place = three({"start": 0.3}, told=told.append)
    place.post.off.update(CLIENTS[1:])
    line = line_of(config, place)
    assert line == "waiting for 2 of 3 nodes: 1, 2, for longer than 0.3 s; start them and try again"
    assert told == ["waiting for 2 of 3 nodes: 1, 2"]


def test_a_run_starts_when_the_last_node_has_come(three):
    told = []
    experiment, config, place = three(told=told.append)
    place.post.off.add(CLIENTS[1])
    place.post.back[CLIENTS[1]] = 30
    check_equal(run(config, place=place), simulator(experiment.config))
    assert told == ["waiting for 1 of 3 nodes: 1"]


def test_a_stranger_is_not_spoken_to_where_nodes_have_keys(three):
    experiment, config, place = three()
    place.post.nodes[9999] = place.post.nodes[CLIENTS[0]]
    check_equal(run(config, place=place), simulator(experiment.config))
    assert not place.post.kinds(9999)


def successor(place, folder=None, run="run-1"):
    """Return the federation of a server that is started again."""
    rows = json.loads((folder / "partition.json").read_text())["client_sizes"] if folder else None
    seats = {client: seat.node for client, seat in place.seats.items()} if place.assigned else None
    options = {"seats": seats, "patience": place.patience, "rows": rows, "told": place.told}
    return Federation(place.post, run, place.clients, **options)


class Cut(Observer):
    """Interrupts a run in a round: when so many updates have come, or when it is over."""

    def __init__(self, number, updates=None):
        self.number, self.left = number, updates

    def updated(self, update, of):
        if update.job.round == self.number and self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    def finished_round(self, record):
        if record["round"] == self.number and self.left is None:
            raise KeyboardInterrupt


@pytest.mark.parametrize("nodes", ["same", "fresh"])
@pytest.mark.parametrize("cut", [Cut(1), Cut(2), Cut(2, 2)], ids=["round 1", "round 2", "within round 2"])
def test_a_run_that_was_cut_off_goes_on_as_if_nothing_had_been(three, tmp_path, monkeypatch, cut, nodes):
    short_reports(monkeypatch)
    out = tmp_path / "run"
    experiment, config, place = three(rounds=3, method={"name": "federa", "rank": 4})
    with pytest.raises(KeyboardInterrupt):
        run(config, out, place=place, observer=copy.copy(cut))
    assert json.loads((out / "partition.json").read_text())["client_sizes"] == [80, 80, 80]
    if nodes == "fresh":
        for node in CLIENTS:
            place.post.restart(node)
    found = run(config, out, place=successor(place, out), resume=True)
    check_equal(found, simulator(experiment.config))
    assert steady(RunDirectory(out).records()) == steady(found.records)
    assert same(RunDirectory(out).load_checkpoint().params, found.state.params)


def test_a_resumed_run_leaves_out_a_node_whose_rows_have_changed(three, tmp_path, monkeypatch):
    short_reports(monkeypatch)
    out = tmp_path / "run"
    experiment, config, place = three()
    with pytest.raises(KeyboardInterrupt):
        run(config, out, place=place, observer=Cut(1))
    place.post.nodes[CLIENTS[1]] = fewer_rows(place.post.nodes[CLIENTS[1]], tmp_path)
    found = run(config, out, place=successor(place, out), resume=True)
    check_simulated(found, experiment, absent={(2, 1)})
    assert verdicts(found)[1]["1"] == "client 1 had 80 rows before, and now 50"


def test_a_second_run_on_the_same_nodes_is_the_first(three):
    _, config, place = three(method={"name": "federa", "rank": 4})
    first = run(config, place=place)
    check_equal(run(config, place=successor(place, run="run-2")), first)


@pytest.mark.parametrize(
    ("clients", "changes", "words"),
    [
        (2, {}, "cohort: 3 clients a round, but there are 2 nodes"),
        (
            6,
            {"method": {"name": "lora", "head": "local"}},
            "method.head=local: only the clients could measure",
        ),
        (6, {"data": {"train": "x.csv"}}, "data.test: a server has no training data to hold examples out of"),
        (6, {"data": {"train": "x.csv", "evaluate_on": "validation"}}, "data.validation: a server has no"),
        (6, {"data": {"train": "x.csv", "test": "/none.csv"}}, "data.test: /none.csv does not exist"),
    ],
    ids=["cohort", "local", "test", "validation", "no file"],
)
def test_what_a_server_cannot_do_is_a_line(recipe, tmp_path, clients, changes, words):
    place = Federation(SimpleNamespace(), "run-1", clients)
    assert line_of(parse_config({**recipe, **changes}), place, out=tmp_path / "run").startswith(words)
    assert not (tmp_path / "run").exists()


def test_without_keys_nodes_say_which_client_they_are(three):
    experiment, config, place = three(keys=False, method={"name": "federa", "rank": 4})
    nodes = place.post.nodes
    nodes[CLIENTS[0]], nodes[CLIENTS[2]] = nodes[CLIENTS[2]], nodes[CLIENTS[0]]
    check_equal(run(config, place=place), simulator(experiment.config))
    assert [place.seats[client].node for client in range(3)] == CLIENTS[::-1]


@pytest.mark.parametrize("number", [None, -1, 3])
def test_a_number_that_no_client_has_is_refused(three, number):
    told = []
    _, config, place = three({"start": 0.3}, keys=False, told=told.append)
    place.post.nodes[CLIENTS[1]] = Node(place.post.nodes[CLIENTS[1]]._config, number)
    assert line_of(config, place).startswith("waiting for 1 of 3 nodes, for longer")
    reason = f"says that it is client {number}, of 0 to 2; it is asked again"
    assert [line for line in told if reason in line] == [f"node 1007: node 1007 {reason}"]


@pytest.mark.parametrize("again", ["same", "fresh"])
def test_a_node_that_comes_back_under_another_id_keeps_its_seat(three, again):
    experiment, config, place = three(keys=False, rounds=3, method={"name": "federa", "rank": 4})
    post = place.post

    def move():
        post.nodes[9999] = post.nodes.pop(CLIENTS[1])
        if again == "fresh":
            post.nodes[9999] = post.start[CLIENTS[1]]()

    check_equal(run(config, place=place, observer=After(1, move)), simulator(experiment.config))
    assert place.seats[1].node == 9999 and place.clients == len(place.seats) == 3


def test_a_resumed_run_without_keys_finds_its_clients_again(three, tmp_path, monkeypatch):
    short_reports(monkeypatch)
    experiment, config, place = three(keys=False, rounds=3, method={"name": "federa", "rank": 4})
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "run", place=place, observer=Cut(1))
    post = place.post
    post.nodes = {9000 + client: post.start[node]() for client, node in enumerate(CLIENTS)}
    found = run(config, tmp_path / "run", place=successor(place, tmp_path / "run"), resume=True)
    check_equal(found, simulator(experiment.config))


def test_a_node_that_is_refused_is_not_greeted_at_every_look(three, tmp_path, monkeypatch):
    """Its old table is back after 30 looks."""
    told, hellos = [], []
    experiment, config, place = three({"ask_again": 0.5}, keys=False, told=told.append, min_success=1.0)
    post, online = place.post, place.post.online

    def look():
        hellos.append(len(post.kinds(9999)))
        if len(hellos) == 30:
            post.nodes[9999] = post.start[CLIENTS[1]]()
        return online()

    def change():
        post.nodes[9999] = fewer_rows(post.nodes.pop(CLIENTS[1]), tmp_path)
        monkeypatch.setattr(post, "online", look)

    check_equal(run(config, place=place, observer=After(1, change)), simulator(experiment.config))
    assert 1 <= hellos[29] <= 10
    assert told.count("client 1 had 80 rows before, and now 50") == hellos[29]


def test_two_nodes_that_say_they_are_the_same_client_are_named(three):
    told = []
    _, config, place = three({"start": 0.5}, keys=False, told=told.append)
    place.post.nodes[CLIENTS[1]] = Node(place.post.nodes[CLIENTS[1]]._config, 0)
    told.append(line_of(config, place))
    assert any("client 0" in line and "1000" in line and "1007" in line for line in told)


def test_a_node_that_says_it_has_more_rows_than_there_can_be_is_a_line(three):
    lines = []
    _, config, place = three({"start": 0.5}, told=lines.append)
    told = json.dumps({"kind": "here", "client": 1, "rows": 10**15}).encode()
    place.post.spoil[CLIENTS[1]] = lambda *_: (told, b"")
    assert "waiting for 1 of 3 nodes: 1" in line_of(config, place)
    (line,) = [line for line in lines if "rows" in line]
    assert line.startswith(f"node {CLIENTS[1]}: ")
