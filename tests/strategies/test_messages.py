import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from privacy.banks import PrototypeBank
from privacy.signing import Anchor
from strategies import messages
from strategies.messages import (
    Arrays,
    Hello,
    Installed,
    MessageError,
    PublicBundle,
    Refusal,
    RefusalCode,
    Release,
    ReleaseFacts,
    SiteFacts,
    TrainingPlan,
    TrainRequest,
    addressed,
    bytes_of,
    check_update,
    decode,
    digest_of,
    encode,
    require,
)

PLAN = TrainingPlan(
    part="heads", objective="anchored", privacy="dp", epsilon=3.0, rounds=2, steps=4, batch=8,
    learning_rate=1e-3, weight_decay=0.0, max_grad_norm=1.0, studies_per_patient=2, inverse_temperature=14.3,
    anchors=16, augment=False, lora_rank=4, seed=0,
)  # fmt: skip
ANCHOR = Anchor(seq=3, head="ab" * 32, signature="cd" * 64, key="ef" * 32)
FACTS = ReleaseFacts(
    site="north", server_round=1, patients_declared=100, steps=4, seconds=10.0, epsilon=0.5, epsilon_max=8.0,
    delta=1e-4, noise_multiplier=1.1, sample_rate=0.08, max_grad_norm=1.0, anchor=ANCHOR,
    insecure_seed=False, replayed=False,
)  # fmt: skip

wire_dtypes = st.sampled_from([np.dtype(name) for name in messages.WIRE_DTYPES])
models = st.dictionaries(
    st.text(min_size=1, max_size=8),
    wire_dtypes.flatmap(lambda dtype: arrays(dtype, array_shapes(min_dims=0, max_side=3, min_side=0))),
    max_size=4,
)


def same(left: Arrays, right: Arrays) -> bool:
    return left.keys() == right.keys() and all(
        (value.shape, value.dtype, value.tobytes())
        == (right[name].shape, right[name].dtype, right[name].tobytes())
        for name, value in left.items()
    )


def crossed(content: RecordDict) -> RecordDict:
    """As it is in another process: a deep copy is made as a pickle is."""
    return copy.deepcopy(content)


def request(values: Arrays, **changes: Any) -> TrainRequest:
    fields: dict[str, Any] = {
        "run": "r", "server_round": 1, "bundle": "b", "plan": PLAN, "arrays": values,
        "deadline_unix_seconds": 5.0, **changes,
    }  # fmt: skip
    return TrainRequest(**fields)


def bundle(**changes: Any) -> PublicBundle:
    fields: dict[str, Any] = {
        "model": {"name": "tiny", "sizes": [1, 2]},
        "weights": {"w": np.ones(3, dtype=np.float32)},
        "anchor_texts": ("clear lungs", "effusion"),
        "anchor_images": np.zeros((2, 4, 4), dtype=np.uint8),
        **changes,
    }
    return PublicBundle(**fields)


@pytest.mark.parametrize(
    "message",
    [
        Hello(run="r", bundle="b"),
        SiteFacts(site="Universitätsklinikum Nord", patients_declared=1, has_bundle=False),
        Installed(site="north", bundle="b"),
        *(Refusal(site="north", code=code, incident="0badcafe") for code in RefusalCode),
    ],
)
def test_plain_messages_survive_the_wire(message: Hello | SiteFacts | Installed | Refusal) -> None:
    assert decode(encode(message)) == message


@given(models)
def test_a_request_survives_the_wire(values: Arrays) -> None:
    sent = request(values)
    got = require(decode(crossed(encode(sent))), TrainRequest)
    assert same(got.arrays, values)
    assert (got.plan, got.deadline_unix_seconds, got.digest) == (PLAN, 5.0, sent.digest)


@given(models)
def test_a_release_survives_the_wire(values: Arrays) -> None:
    got = require(decode(crossed(encode(Release(facts=FACTS, update=values)))), Release)
    assert same(got.update, values)
    assert got.facts == FACTS


@given(models)
def test_a_bundle_survives_the_wire(values: Arrays) -> None:
    sent = bundle(weights=values)
    got = require(decode(crossed(encode(sent))), PublicBundle)
    assert same(got.weights, values)
    assert got.anchor_texts == sent.anchor_texts
    assert got.digest == sent.digest


def prototypes(**changes: Any) -> PrototypeBank:
    unit = np.eye(2, 3, dtype=np.float32)
    fields: dict[str, Any] = {
        "concepts": ("effusion present", "effusion absent"),
        "wordings": (("pleural effusion", "effusion"), ("no effusion",)),
        "image": unit,
        "text": -unit,
        **changes,
    }
    return PrototypeBank(**fields)


@given(models)
def test_a_bundle_with_prototypes_survives_the_wire(values: Arrays) -> None:
    sent = bundle(weights=values, prototypes=prototypes())
    got = require(decode(crossed(encode(sent))), PublicBundle)
    assert same(got.weights, values)
    assert got.prototypes is not None
    assert got.prototypes.facts() == prototypes().facts()
    assert same(dict(got.prototypes.arrays()), dict(prototypes().arrays()))
    assert got.digest == sent.digest != bundle(weights=values).digest


def test_a_bundle_without_prototypes_is_the_one_it_was_before_there_were_any() -> None:
    assert bundle().digest == "736a105a99a8a25f972222c3de6772a47831716e00e69f8fe9281bd51c19a546"
    assert set(bundle().facts()) == {"model", "anchor_texts"}


def test_everything_is_part_of_prototypes_identity() -> None:
    other = -np.eye(2, 3, dtype=np.float32)
    changed: list[dict[str, Any]] = [
        {},
        {"concepts": ("effusion absent", "effusion present")},
        {"wordings": (("pleural effusion",), ("effusion", "no effusion"))},
        {"image": other},
        {"text": -other},
    ]
    digests = {bundle(prototypes=prototypes(**changes)).digest for changes in changed}
    assert len(digests) == len(changed)


@pytest.mark.parametrize(
    ("facts", "rule"),
    [
        (None, "PublicBundle: prototypes need concepts"),
        ({"concepts": ["Doe^John"], "wordings": [[""]]}, "PublicBundle: expected wordings of 1 concepts"),
        ({"concepts": ["a"], "wordings": [["a"]]}, "PublicBundle: expected image prototypes of 1 concepts"),
        ({"concepts": [[]], "wordings": [["a"]]}, "PublicBundle: expected the names of at least one concept"),
    ],
)
def test_prototypes_that_are_none_are_refused(facts: Any, rule: str) -> None:
    content = encode(bundle(prototypes=prototypes()))
    document = {**json.loads(str(content["facts"]["json"])), "prototypes": facts}
    content["facts"] = ConfigRecord({"version": 1, "kind": "PublicBundle", "json": json.dumps(document)})
    with pytest.raises(MessageError, match=rule) as caught:
        decode(content)
    assert "Doe" not in str(caught.value)


def test_arrays_in_any_memory_layout_survive_the_wire() -> None:
    values = {"t": np.arange(6, dtype=np.float32).reshape(2, 3).T, "s": np.arange(9, dtype=np.float32)[::2]}
    for content in (encode(request(values)), crossed(encode(request(values)))):
        assert same(require(decode(content), TrainRequest).arrays, values)


@given(models)
def test_within_a_process_arrays_are_the_sender_s_own_and_read_only(values: Arrays) -> None:
    got = require(decode(encode(request(values))), TrainRequest)
    assert same(got.arrays, values)
    assert got.digest == request(values).digest
    for name, value in got.arrays.items():
        assert not value.flags.writeable
        assert not value.size or np.shares_memory(value, values[name])


def test_a_digest_is_made_where_arrays_leave_the_process_and_only_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Arrays] = []

    def digest(arrays: Arrays) -> str:
        made.append(arrays)
        return digest_of(arrays)

    monkeypatch.setattr(messages, "digest_of", digest)
    content = encode(request({"w": np.ones(2, dtype=np.float32)}))
    decode(content)
    assert made == []
    arrived = crossed(content)
    assert len(made) == 1
    decode(arrived)
    assert len(made) == 2


def replaced(content: RecordDict) -> None:
    content["arrays"]["w"] = Array(np.zeros(2, dtype=np.float32))


def renamed(content: RecordDict) -> None:
    content["arrays"]["v"] = content["arrays"].pop("w")


def added(content: RecordDict) -> None:
    content["arrays"]["v"] = Array(np.zeros(2, dtype=np.float32))


def without_digest(content: RecordDict) -> None:
    del content["arrays-digest"]


def with_an_empty_digest(content: RecordDict) -> None:
    content["arrays-digest"] = ArrayRecord()


def with_a_digest_of_another_kind(content: RecordDict) -> None:
    content["arrays-digest"] = ConfigRecord({"sha256": digest_of({"w": np.ones(2, dtype=np.float32)})})


@pytest.mark.parametrize(
    "damage",
    [replaced, renamed, added, without_digest, with_an_empty_digest, with_a_digest_of_another_kind],
)
def test_arrays_that_came_from_elsewhere_are_those_of_their_digest(
    damage: Callable[[RecordDict], None],
) -> None:
    content = crossed(encode(request({"w": np.ones(2, dtype=np.float32)})))
    damage(content)
    with pytest.raises(MessageError, match="is not the one whose digest came with it"):
        decode(content)


def test_one_array_from_elsewhere_among_those_handed_over_is_found() -> None:
    values = {"v": np.ones(2, dtype=np.float32), "w": np.ones(2, dtype=np.float32)}
    content = encode(request(values))
    replaced(content)
    with pytest.raises(MessageError, match="is not the one whose digest came with it"):
        decode(content)


def test_neither_deadline_nor_anchor_is_part_of_a_request_s_identity() -> None:
    """Asked again after a crash, when the coordinator knows a newer head, it is the same request."""
    values = {"w": np.ones(2, dtype=np.float32)}
    assert request(values).digest == request(values, deadline_unix_seconds=None).digest
    assert request(values).digest == request(values, anchor=ANCHOR).digest


def test_a_request_is_addressed_with_a_site_s_anchor_and_shares_its_arrays() -> None:
    sent = request({"w": np.ones(2, dtype=np.float32)})
    content = encode(sent)
    one, none = addressed(content, anchor=ANCHOR), addressed(content)
    assert one["arrays"] is none["arrays"] is content["arrays"]
    for said, anchor in ((one, ANCHOR), (none, None), (content, None)):
        got = require(decode(said), TrainRequest)
        assert (got.anchor, got.digest, got.deadline_unix_seconds) == (anchor, sent.digest, 5.0)


@pytest.mark.parametrize(
    "change",
    [
        {"seq": -1},
        {"seq": 2**63},
        {"head": "AB" * 32},
        {"signature": "cd"},
        {"key": "ef\n" * 32},
        {"why": "x"},
    ],
)
def test_a_malformed_anchor_is_a_wrong_field(change: dict[str, Any]) -> None:
    facts = FACTS.model_dump(mode="json")
    facts["anchor"] |= change
    content = ConfigRecord({"version": 1, "kind": "Release", "json": json.dumps(facts)})
    with pytest.raises(MessageError, match="wrong fields: anchor"):
        decode(RecordDict({"facts": content}))


@pytest.mark.parametrize(
    "changes",
    [{"run": "s"}, {"server_round": 2}, {"bundle": "c"}, {"plan": PLAN.model_copy(update={"steps": 5})}],
)
def test_everything_else_is_part_of_a_request_s_identity(changes: dict[str, Any]) -> None:
    values = {"w": np.ones(2, dtype=np.float32)}
    assert request(values).digest != request(values, **changes).digest
    assert request(values).digest != request({"w": -values["w"]}).digest


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"name": "large"}},
        {"weights": {"w": np.zeros(3, dtype=np.float32)}},
        {"anchor_texts": ("effusion", "clear lungs")},
        {"anchor_images": np.ones((2, 4, 4), dtype=np.uint8)},
    ],
)
def test_everything_is_part_of_a_bundle_s_identity(changes: dict[str, Any]) -> None:
    assert bundle().digest != bundle(**changes).digest


@given(models, st.randoms())
def test_the_digest_does_not_depend_on_the_order_of_names(values: Arrays, random: Any) -> None:
    names = list(values)
    random.shuffle(names)
    assert digest_of({name: values[name] for name in names}) == digest_of(values)


def test_the_digest_tells_names_shapes_and_types_apart() -> None:
    zeros = np.zeros(4, dtype=np.float32)
    different: list[Arrays] = [
        {"a": zeros},
        {"b": zeros},
        {"a": zeros.reshape(2, 2)},
        {"a": np.array(0, dtype=np.float32)},
        {"a": zeros[:1]},
        {"a": zeros.view(np.int32)},
        {},
    ]
    assert len({digest_of(values) for values in different}) == len(different)


def facts_record(**changes: Any) -> RecordDict:
    record = encode(Refusal(site="north", code=RefusalCode.POLICY, incident="1"))
    return RecordDict({"facts": ConfigRecord({**dict(record["facts"]), **changes})})


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (RecordDict(), "needs a 'facts' record"),
        (RecordDict({"facts": ConfigRecord({"version": 1})}), "needs a 'facts' record"),
        (RecordDict({"facts": MetricRecord({"version": 1})}), "needs a 'facts' record"),
        (facts_record(json="{"), "needs a 'facts' record"),
        (facts_record(json="[" * 100_000), "needs a 'facts' record"),
        (facts_record(version=2), "expected message version 1, got 2: update the older side"),
        (facts_record(kind="Gossip"), "unknown kind of message 'Gossip'"),
        (facts_record(json="[]"), "wrong fields"),
        (facts_record(json='{"site": "north", "code": "policy"}'), "wrong fields: incident"),
        (
            facts_record(json='{"site": "n", "code": "policy", "incident": "1", "why": "x"}'),
            "wrong fields: why",
        ),
        (facts_record(json='{"site": "n", "code": "because", "incident": "1"}'), "wrong fields: code"),
        (facts_record(json='{"site": "a\\nb", "code": "policy", "incident": "1"}'), "wrong fields: site"),
        (
            facts_record(json=json.dumps({"site": "n" * 65, "code": "policy", "incident": "1"})),
            "wrong fields",
        ),
        (facts_record(kind="PublicBundle", json="{}"), "missing part 'anchor_images'"),
    ],
)
def test_what_does_not_follow_the_file_is_named(content: RecordDict, rule: str) -> None:
    with pytest.raises(MessageError, match=rule):
        decode(content)


@pytest.mark.parametrize(
    ("field", "value"),
    [("epsilon", "NaN"), ("seconds", "Infinity"), ("patients_declared", "1" + "0" * 400), ("steps", "-1")],
)
def test_a_number_that_would_spoil_weights_or_metrics_is_refused(field: str, value: str) -> None:
    text = json.dumps(FACTS.model_dump(mode="json") | {field: "here"}).replace('"here"', value)
    content = RecordDict({"facts": ConfigRecord({"version": 1, "kind": "Release", "json": text})})
    with pytest.raises(MessageError, match=f"wrong fields: {field}"):
        decode(content)


def test_an_error_names_fields_and_never_their_content() -> None:
    with pytest.raises(MessageError) as caught:
        decode(facts_record(json='{"site": "n", "code": "Doe^John", "incident": "1"}'))
    assert "Doe" not in str(caught.value)


def with_array(array: Array) -> RecordDict:
    content = encode(Release(facts=FACTS, update={}))
    content["arrays"] = ArrayRecord({"w": array})
    return content


def test_a_dtype_that_does_not_travel_is_refused() -> None:
    with pytest.raises(MessageError, match="dtype float64 does not travel"):
        decode(with_array(Array(np.zeros(2))))


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"junk", Array(np.zeros(99, dtype=np.float32)).data[:200]),
        *(b"PK\x03\x04", b"PK\x05\x06" + bytes(18)),  # archives, the second a whole one of nothing
    ],
)
def test_an_array_that_cannot_be_read_is_refused(data: bytes) -> None:
    broken = Array(dtype="float32", shape=(99,), stype="numpy.ndarray", data=data)
    with pytest.raises(MessageError, match="array 'w' cannot be read"):
        decode(with_array(broken))


def test_a_pickled_array_is_refused() -> None:
    content = with_array(Array(dtype="float32", shape=(1,), stype="numpy.ndarray", data=b"\x80\x04N."))
    with pytest.raises(MessageError, match="cannot be read"):
        decode(content)


def test_an_arrays_record_without_arrays_is_refused() -> None:
    content = encode(Release(facts=FACTS, update={}))
    content["arrays"] = ConfigRecord({"w": 1})
    with pytest.raises(MessageError, match="holds no arrays"):
        decode(content)


@given(
    kind=st.sampled_from(["Hello", "SiteFacts", "Refusal", "PublicBundle", "TrainRequest", "Release"]),
    document=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["site", "run", "model", "anchor_texts", "prototypes", "plan"]), inner
            )
        ),
        max_leaves=6,
    ),
    data=st.none() | st.binary(max_size=8),
)
def test_whatever_arrives_the_only_error_is_a_message_error(
    kind: str, document: Any, data: bytes | None
) -> None:
    facts = ConfigRecord({"version": 1, "kind": kind, "json": json.dumps(document)})
    content = RecordDict({"facts": facts})
    if data is not None:
        array = Array(dtype="uint8", shape=(1,), stype="numpy.ndarray", data=data)
        content["arrays"] = ArrayRecord({"anchor_images": array})
    with pytest.raises(MessageError):
        decode(content)


LIKE = {"a": np.zeros((2, 2), dtype=np.float32), "b": np.zeros(1, dtype=np.float32)}


def test_an_update_like_the_model_is_accepted() -> None:
    check_update({name: value + 1 for name, value in LIKE.items()}, LIKE)
    check_update({}, {})


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (
            {"a": np.zeros((2, 3), dtype=np.float32)},
            r"array 'a': expected float32\(2, 2\), got float32\(2, 3\)",
        ),
        ({"a": np.zeros((2, 2), dtype=np.float64)}, r"expected float32\(2, 2\), got float64\(2, 2\)"),
        ({"b": np.array([np.nan], dtype=np.float32)}, "array 'b' is not finite"),
        ({"b": np.array([-np.inf], dtype=np.float32)}, "array 'b' is not finite"),
        ({"z": np.zeros(1, dtype=np.float32)}, "differ in 1 names, first 'z'"),
    ],
)
def test_an_update_unlike_the_model_is_refused(change: Arrays, rule: str) -> None:
    with pytest.raises(MessageError, match=rule):
        check_update({**LIKE, **change}, LIKE)


def test_payload_is_counted_in_bytes() -> None:
    assert bytes_of(LIKE) == 20
    assert bytes_of({}) == 0


def test_another_kind_than_expected_is_named() -> None:
    with pytest.raises(MessageError, match="expected Release, got Hello"):
        require(Hello(run="r", bundle="b"), Release)


def test_no_field_of_a_message_is_raw() -> None:
    """Nothing computed from patients and not yet clipped and noised has a name here."""
    for item in vars(messages).values():
        fields = getattr(item, "__annotations__", {}) if isinstance(item, type) else {}
        assert not [name for name in fields if name.startswith("raw_")]
