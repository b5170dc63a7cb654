import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from strategies.flower_compat import ErrorCode
from strategies.handover import Unwritten
from strategies.in_process import FAILED, ClientCall, InProcessGrid

MARKER = "Doe^John"


def content() -> RecordDict:
    return RecordDict(
        {
            "arrays": ArrayRecord({"w": Array(np.arange(4, dtype=np.float32))}),
            "facts": ConfigRecord({"names": ["a", "b"], "text": "t", "raw": b"12"}),
            "metrics": MetricRecord({"one": 1.0}),
        }
    )


def echo(message: Message, context: Context) -> Message:
    return Message(message.content, reply_to=message)


def grid(client_app: ClientCall, sites: int = 2, **run_config: Any) -> InProcessGrid:
    return InProcessGrid(client_app, [{"site": f"site-{n}"} for n in range(sites)], run_config)


def ask(where: InProcessGrid, node: int = 1, records: RecordDict | None = None) -> Message:
    [reply] = where.send_and_receive([Message(records or content(), node, "train")])
    return reply


def test_nodes_are_numbered_from_one() -> None:
    assert grid(echo, 3).get_node_ids() == [1, 2, 3]
    assert [node.node_id for node in grid(echo, 3).get_nodes()] == [1, 2, 3]
    assert grid(echo, 0).get_node_ids() == []


def test_a_flower_client_app_is_routed_by_message_type() -> None:
    app = ClientApp()

    @app.query("hello")  # type: ignore[untyped-decorator]
    def hello(message: Message, context: Context) -> Message:
        return Message(RecordDict({"from": ConfigRecord(dict(context.node_config))}), reply_to=message)

    where = grid(app)
    [message_id] = where.push_messages([Message(content(), 2, "query.hello")])
    [reply] = where.pull_messages([message_id])
    assert reply.content["from"]["site"] == "site-1"
    assert (reply.metadata.src_node_id, reply.metadata.reply_to_message_id) == (2, message_id)


def test_nobody_works_before_the_reply_is_pulled() -> None:
    worked: list[int] = []

    def work(message: Message, context: Context) -> Message:
        worked.append(context.node_id)
        return echo(message, context)

    where = grid(work)
    ids = where.push_messages([Message(content(), node, "train") for node in (1, 2)])
    assert worked == []
    list(where.pull_messages([ids[1]]))
    assert worked == [2]
    replies = iter(where.pull_messages(ids))
    assert worked == [2]
    next(replies)
    assert worked == [2, 1]


def test_a_reply_is_given_once() -> None:
    where = grid(echo)
    ids = where.push_messages([Message(content(), 1, "train")])
    assert len(list(where.pull_messages(ids))) == 1
    assert list(where.pull_messages(ids)) == []
    assert list(where.pull_messages(["unheard of"])) == []


def test_one_reply_is_in_memory_at_a_time() -> None:
    alive: list[weakref.ref[Any]] = []
    most = 0

    def work(message: Message, context: Context) -> Message:
        nonlocal most
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
        return echo(message, context)

    where = grid(work, 5)
    ids = where.push_messages([Message(content(), node, "train") for node in where.get_node_ids()])
    for message_id in ids:
        for reply in where.pull_messages([message_id]):
            alive.append(weakref.ref(reply))
        del reply
    assert len(alive) == 5
    assert most == 0


def test_a_message_to_an_unknown_node_is_not_accepted() -> None:
    where = grid(echo)
    messages = [Message(content(), node, "train") for node in (1, 99)]
    assert where.push_messages(messages) == [messages[0].metadata.message_id]


def mutate(message: Message, context: Context) -> Message:
    message.content["arrays"]["w"] = Array(np.zeros(1, dtype=np.float32))
    message.content["arrays"]["new"] = Array(np.zeros(1, dtype=np.float32))
    message.content["facts"]["names"].append("c")
    del message.content["metrics"]
    message.metadata.ttl = 1.0
    return Message(RecordDict(), reply_to=message)


def overwrite(message: Message, context: Context) -> Message:
    message.content["arrays"]["w"].data = b""
    return Message(RecordDict(), reply_to=message)


@pytest.mark.parametrize("client_app", [mutate, overwrite])
def test_what_a_site_does_to_its_message_stays_with_it(client_app: ClientCall) -> None:
    records = content()
    message = Message(records, 1, "train", ttl=60.0)
    where = grid(client_app)
    [reply] = where.send_and_receive([message])
    assert reply.has_content()
    assert records == content()
    assert message.metadata.ttl == 60.0


def test_what_the_coordinator_does_after_sending_does_not_reach_the_site() -> None:
    records = content()
    where = grid(echo)
    ids = where.push_messages([Message(records, 1, "train")])
    records["arrays"]["w"] = Array(np.zeros(9, dtype=np.float32))
    [reply] = where.pull_messages(ids)
    assert reply.content == content()


def test_a_site_that_keeps_its_reply_cannot_change_it_later() -> None:
    kept: list[RecordDict] = []

    def keep(message: Message, context: Context) -> Message:
        kept.append(content())
        return Message(kept[0], reply_to=message)

    reply = ask(grid(keep))
    kept[0]["arrays"]["w"].data = b""
    assert reply.content == content()


def test_the_bytes_of_arrays_are_shared_and_not_copied() -> None:
    records = content()
    reply = ask(grid(echo), records=records)
    assert reply.content["arrays"]["w"].data is records["arrays"]["w"].data


def test_a_site_keeps_its_state_and_its_settings_to_itself() -> None:
    def count(message: Message, context: Context) -> Message:
        times = int(context.state["n"]["n"]) if "n" in context.state else 0
        context.state["n"] = ConfigRecord({"n": times + 1})
        context.run_config["spoilt"] = True
        return Message(RecordDict({"n": ConfigRecord({"n": times + 1})}), reply_to=message)

    run_config: dict[str, Any] = {"rounds": 1}
    where = InProcessGrid(count, [{}, {}], run_config)
    assert [ask(where, node).content["n"]["n"] for node in (1, 1, 2)] == [1, 2, 1]
    assert run_config == {"rounds": 1}


def fail(message: Message, context: Context) -> Message:
    raise ValueError(MARKER)


def fail_while_excusing_itself(message: Message, context: Context) -> Message:
    class Odd(Exception):
        def __str__(self) -> str:
            raise RuntimeError(MARKER)

    raise Odd


def say_what_failed(message: Message, context: Context) -> Message:
    return Message(Error(ErrorCode.UNKNOWN, MARKER), reply_to=message)


def answer_nothing(message: Message, context: Context) -> Any:
    return None


@pytest.mark.parametrize("client_app", [fail, fail_while_excusing_itself, say_what_failed, answer_nothing])
def test_an_error_reply_says_a_constant_and_nothing_of_the_cause(client_app: Callable[..., Any]) -> None:
    reply = ask(grid(client_app))
    assert (reply.has_error(), reply.error.reason) == (True, FAILED)
    assert MARKER not in repr(reply)


def test_the_cause_of_a_failure_is_in_the_local_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, logger="clipward"):
        ask(grid(fail), node=2)
    assert "the client app of node 2 failed" in caplog.text
    assert MARKER in caplog.text


def test_the_next_message_is_answered_after_a_failure() -> None:
    failing = [True]

    def once(message: Message, context: Context) -> Message:
        if failing.pop() if failing else False:
            raise ValueError(MARKER)
        return echo(message, context)

    where = grid(once)
    assert [ask(where).has_error(), ask(where).has_error()] == [True, False]


def test_an_interrupt_by_the_user_is_not_a_failure_of_a_site() -> None:
    def interrupted(message: Message, context: Context) -> Message:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(grid(interrupted))


def test_flower_s_own_strategies_can_use_the_grid() -> None:
    where = grid(echo)
    where.set_run(where.run)
    message = where.create_message(content(), "train", 1, "1", ttl=5.0)
    assert (message.metadata.run_id, message.metadata.ttl) == (where.run.run_id, 5.0)
    assert len(list(where.send_and_receive([message], timeout=0.0))) == 1


def reply_of(array: Array) -> Array:
    def work(message: Message, context: Context) -> Message:
        record = ArrayRecord()
        record["w"] = array
        return Message(RecordDict({"arrays": record}), reply_to=message)

    return ask(grid(work)).content["arrays"]["w"]


def test_arrays_are_handed_over_unwritten() -> None:
    sent = Unwritten(lambda: pytest.fail("it was written"), dtype="float32", shape=(4,))
    for _ in range(2):
        reply = reply_of(sent)
        assert isinstance(reply, Unwritten)
        assert reply is not sent
        reply.shape = (99,)
    values = np.arange(4, dtype=np.float32)
    assert np.shares_memory(reply_of(Unwritten.of(values)).numpy(), values)
