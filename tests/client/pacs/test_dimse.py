"""A PACS that speaks DICOM's own protocol, and refuses, fails or falls silent."""

import socket
import ssl
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import pytest
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID, ComputedRadiographyImageStorage, ExplicitVRLittleEndian, JPEG2000Lossless
from pynetdicom import AE, evt
from pynetdicom.sop_class import (
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelMove,
    Verification,
)

from client.cohort.outcomes import Code
from client.pacs import (
    DimseTable,
    Fetched,
    PacsConfused,
    PacsRefused,
    PacsUnreachable,
    Spool,
    SpoolError,
    fetch,
)
from client.pacs.dimse import Dimse
from client.pacs.receiver import Receiver
from tests.client.pacs.conftest import free_port

STUDY, SERIES, UIDS = "1.2", "1.2.3", ["1.2.3.1", "1.2.3.2"]
PRIVATE = UID("1.3.46.670589.11.0.0.12.1")
Find = Callable[[Dataset], Iterator[tuple[int, Dataset | None]]]


def an_object(uid: str, *, sop_class: UID = ComputedRadiographyImageStorage) -> Dataset:
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, uid
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return dataset


class Node:
    """A PACS of one study; ``find`` and ``move_status`` and ``holds`` make it ill."""

    def __init__(
        self,
        site_port: int,
        *,
        calling: list[str] | None = None,
        tls: tuple[ssl.SSLContext, ssl.SSLContext] | None = None,
    ) -> None:
        self.port, self.tls = free_port(), tls
        self.heal(site_port)
        self._ae = AE("PACS")
        self._ae.require_called_aet = True
        self._ae.require_calling_aet = calling or []
        for context in (
            Verification,
            StudyRootQueryRetrieveInformationModelFind,
            StudyRootQueryRetrieveInformationModelMove,
        ):
            self._ae.add_supported_context(context)
        for sop_class in (ComputedRadiographyImageStorage, PRIVATE):
            self._ae.add_requested_context(sop_class, ExplicitVRLittleEndian)

    def heal(self, site_port: int) -> None:
        self.site_port = site_port
        self.find: Find = self._find
        self.move_status: int | None = None
        self.holds = [an_object(uid) for uid in UIDS]

    @contextmanager
    def running(self) -> Iterator["Node"]:
        handlers = [
            (evt.EVT_C_FIND, lambda event: self.find(event.identifier)),
            (evt.EVT_C_MOVE, self._move),
        ]
        context = self.tls[0] if self.tls else None
        self._ae.start_server(
            ("127.0.0.1", self.port), block=False, evt_handlers=handlers, ssl_context=context
        )
        try:
            yield self
        finally:
            self._ae.shutdown()

    def _find(self, asked: Dataset) -> Iterator[tuple[int, Dataset | None]]:
        answers: dict[str, list[dict[str, object]]] = {
            "STUDY": [{"StudyInstanceUID": STUDY, "NumberOfStudyRelatedInstances": len(self.holds)}],
            "SERIES": [{"SeriesInstanceUID": SERIES, "Modality": "CR"}],
            "IMAGE": [{"SOPInstanceUID": uid} for uid in UIDS],
        }
        for values in answers[asked.QueryRetrieveLevel]:
            answer = Dataset()
            answer.QueryRetrieveLevel = asked.QueryRetrieveLevel
            for keyword, value in values.items():
                setattr(answer, keyword, value)
            yield 0xFF00, answer

    def _move(self, event: evt.Event) -> Iterator[object]:
        if self.move_status is not None:
            if self.move_status == 0xA801:
                yield None, None
                return
            yield "127.0.0.1", self.site_port
            yield 1
            yield self.move_status, None
            return
        asked = event.identifier
        sending = {"tls_args": (self.tls[1], "localhost")} if self.tls else {}
        chosen = [held for held in self.holds if asked.get("SOPInstanceUID") in (None, held.SOPInstanceUID)]
        yield "127.0.0.1", self.site_port, sending
        yield len(chosen)
        for held in chosen:
            yield 0xFF00, held


@pytest.fixture(scope="module")
def started() -> Iterator[Node]:
    with Node(free_port()).running() as running:  # once: it takes a second to stop
        yield running


@pytest.fixture
def node(started: Node) -> Node:
    started.heal(free_port())
    return started


def table(node: Node, **changes: object) -> DimseTable:
    return DimseTable.model_validate(
        {
            "host": "127.0.0.1",
            "port": node.port,
            "called_ae": "PACS",
            "own_address": "127.0.0.1",
            "own_port": node.site_port,
            "timeout_seconds": 5,
            **changes,
        }
    )


def run(settings: DimseTable, folder: Path) -> Fetched:
    spool = Spool(folder / "incoming")
    return fetch(Dimse(settings, spool), settings, spool, waits=(0.0,))


def test_objects_are_kept_whole(node: Node, tmp_path: Path) -> None:
    result = run(table(node), tmp_path)
    assert (result.instances, result.new, dict(result.codes)) == (2, 2, {})
    spool = Spool(tmp_path / "incoming")
    kept = [dcmread(spool.path(uid)) for uid in UIDS]
    assert [dataset.SOPInstanceUID for dataset in kept] == UIDS
    assert {dataset.file_meta.TransferSyntaxUID for dataset in kept} == {ExplicitVRLittleEndian}
    assert not any(spool.drafts.iterdir())
    assert {path.stat().st_mode & 0o777 for path in spool.folder.rglob("*.dcm")} == {0o600}


def test_private_storage_classes_are_taken_too(node: Node, tmp_path: Path) -> None:
    node.holds[0] = an_object(UIDS[0], sop_class=PRIVATE)
    assert run(table(node), tmp_path).instances == 2


def test_what_is_listed_and_not_sent_costs_itself_only(node: Node, tmp_path: Path) -> None:
    del node.holds[1]
    result = run(table(node), tmp_path)
    assert (result.instances, dict(result.codes)) == (1, {Code.E_FETCH_MISSING: 1})


def test_a_failing_move_costs_the_instances_and_says_so(node: Node, tmp_path: Path) -> None:
    node.move_status = 0xC123
    result = run(table(node), tmp_path)
    assert (result.instances, dict(result.codes)) == (0, {Code.E_FETCH_STATUS: 2})
    assert "0xC123" in result.failures.read_text()


def test_a_pacs_without_this_site_as_a_destination_is_named(node: Node, tmp_path: Path) -> None:
    node.move_status = 0xA801
    message = rf"'PACS' at 127\.0\.0\.1:{node.port} cannot send to 'CLIPWARD': .* port {node.site_port}, open"
    with pytest.raises(PacsRefused, match=message):
        run(table(node), tmp_path)


def test_a_pacs_that_cannot_connect_back_is_told_about(node: Node, tmp_path: Path) -> None:
    settings = table(node)
    node.site_port = free_port()  # where nobody listens
    with pytest.raises(PacsRefused, match=rf"cannot send to 'CLIPWARD': .* port {settings.own_port}, open"):
        run(settings, tmp_path)


def test_another_sender_is_turned_away(node: Node, tmp_path: Path) -> None:
    with pytest.raises(PacsRefused, match=r"cannot send to 'CLIPWARD': .*see senders in cohort\.dimse"):
        run(table(node, senders=["OTHER"]), tmp_path)
    assert run(table(node, senders=["OTHER", "PACS"]), tmp_path).instances == 2


@pytest.mark.parametrize("status", [0xA700, 0xA900, 0xC001])
def test_a_query_that_fails_is_named(node: Node, tmp_path: Path, status: int) -> None:
    def failing(_: Dataset) -> Iterator[tuple[int, Dataset | None]]:
        yield status, None

    node.find = failing
    with pytest.raises(PacsConfused, match=rf"answered a query with 0x{status:04X}; ask for less at a time"):
        run(table(node), tmp_path)


def test_a_study_that_is_not_listed_costs_itself_only(node: Node, tmp_path: Path) -> None:
    def failing(asked: Dataset) -> Iterator[tuple[int, Dataset | None]]:
        if asked.QueryRetrieveLevel == "IMAGE":
            yield 0xC001, None
        else:
            yield from Node._find(node, asked)

    node.find = failing
    assert dict(run(table(node), tmp_path).codes) == {Code.E_FETCH_LIST: 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"called_ae": "WRONG"}, r"127\.0\.0\.1:\d+ is not 'WRONG'; see cohort\.dimse\.called-ae"),
        (
            {"calling_ae": "STRANGER"},
            r"'PACS' at 127\.0\.0\.1:\d+ does not know 'STRANGER': have this AE title",
        ),
    ],
)
def test_a_wrong_ae_title_is_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with Node(free_port(), calling=["CLIPWARD"]).running() as node, pytest.raises(PacsRefused, match=message):
        run(table(node, **changes), tmp_path)


def test_a_refused_connection_is_named(tmp_path: Path) -> None:
    node = Node(free_port())  # not running
    message = rf"nothing answers at 127\.0\.0\.1:{node.port} \(Connection refused\): see host and port"
    with pytest.raises(PacsUnreachable, match=message):
        run(table(node), tmp_path)


def test_a_port_where_something_else_answers_is_named(tmp_path: Path) -> None:
    node = Node(free_port())
    with (
        socket.create_server(("127.0.0.1", node.port)),
        pytest.raises(PacsUnreachable, match=r"127\.0\.0\.1"),
    ):
        run(table(node, timeout_seconds=0.3), tmp_path)


def test_a_taken_port_is_named(node: Node, tmp_path: Path) -> None:
    message = rf"cannot listen at 127\.0\.0\.1:{node.site_port}: .*see own-address and own-port"
    with socket.create_server(("127.0.0.1", node.site_port)), pytest.raises(SpoolError, match=message):
        run(table(node), tmp_path)


def test_unusable_certificates_are_named(node: Node, tmp_path: Path) -> None:
    absent = tmp_path / "absent.pem"
    with pytest.raises(
        PacsRefused, match=r"cannot use ca, certificate and key of cohort\.dimse: No such file"
    ):
        Dimse(table(node, tls=True, certificate=absent, key=absent), Spool(tmp_path / "incoming"))


def test_objects_may_be_pushed_without_being_asked_for(tmp_path: Path) -> None:
    spool, port = Spool(tmp_path / "incoming"), free_port()
    scanner = AE("SCANNER")
    scanner.add_requested_context(ComputedRadiographyImageStorage, JPEG2000Lossless)
    pushed = an_object("1.5")
    pushed.file_meta.TransferSyntaxUID = JPEG2000Lossless
    with (
        spool.locked(),
        Receiver(spool, ae_title="SITE", address="127.0.0.1", port=port, senders=[], timeout_seconds=60),
    ):
        association = scanner.associate("127.0.0.1", port, ae_title="SITE")
        assert association.is_established
        buffer = BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pushed.save_as(buffer, enforce_file_format=True)
            assert association.send_c_store(pushed).Status == 0x0000
            assert association.send_c_store(pushed).Status == 0x0000  # again: it is there
        association.release()
    assert dcmread(spool.path("1.5")).file_meta.TransferSyntaxUID == JPEG2000Lossless
    assert len(list(spool.folder.rglob("*.dcm"))) == 1
