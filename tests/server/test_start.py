import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from encoders.clip import ClipEncoder
from privacy.banks import PrototypeBank
from server.banks import PublicAnchors, label_prompts, noise_images
from server.errors import RunError
from server.evaluation import EvaluationSet
from server.federation import Federation
from server.start import (
    Prepared,
    build_encoder,
    bundle_of,
    evaluator_of,
    load_prepared,
    prepare_from_settings,
    prepared_start,
    save_prepared,
    start_folder,
    start_of,
)
from strategies.bundles import BundleMissing
from tasks.views import view_sentences
from tests.encoders.micro import EMBEDDING, TEXTS, micro_encoder, random_images
from tests.small_hospitals import bundle, federation


@pytest.fixture
def root(tmp_path: Path) -> Path:
    micro_encoder().export(tmp_path / "micro")
    return tmp_path


def prepared(**changes: Any) -> Prepared:
    facts: dict[str, Any] = {"bundle": bundle(), "public_start": True, "source": "ab", "evaluation": None}
    return Prepared(**{**facts, **changes})


def evaluation() -> EvaluationSet:
    return EvaluationSet(images=random_images(6), texts=TEXTS, labels={})


def test_runs_share_a_start_unless_model_anchors_or_public_data_differ(root: Path) -> None:
    def folder(**changes: Any) -> Path:
        return start_folder(federation(root, **changes), root / "cache")

    assert folder() == folder(name="other", training={"rounds": 9}, privacy={"epsilon": 1.0})
    public = {"table": "t.csv"}
    others = [
        folder(),
        folder(model={"seed": 1}),
        folder(model={"centre-texts": True}),
        folder(objective={"anchors": 7}),
        folder(objective={"anchors-from": ["noise", "prompts"]}),
        folder(objective={"inverse-temperature": 9.0}),
        folder(public_start=public),
        folder(public_start={**public, "epochs": 3}),
        folder(evaluation={"data": public}),
    ]
    assert len(set(others)) == len(others)


def test_a_model_folder_with_new_files_is_another_start(root: Path) -> None:
    before = start_folder(federation(root), root / "cache")
    assert start_folder(federation(root), root / "cache") == before
    os.utime(root / "micro" / "model.safetensors", ns=(1, 1))
    assert start_folder(federation(root), root / "cache") != before


@pytest.mark.parametrize("measured", [None, evaluation()])
def test_what_is_saved_is_loaded(measured: EvaluationSet | None, tmp_path: Path) -> None:
    save_prepared(tmp_path / "new" / "start", prepared(evaluation=measured))
    loaded = load_prepared(tmp_path / "new" / "start")
    assert loaded is not None
    assert (loaded.bundle.digest, loaded.public_start, loaded.source) == (bundle().digest, True, "ab")
    assert (loaded.evaluation is None) == (measured is None)
    assert loaded.evaluation is None or loaded.evaluation.texts == TEXTS


def test_where_nothing_was_prepared_nothing_is_found(tmp_path: Path) -> None:
    assert load_prepared(tmp_path / "absent") is None


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_crash_while_saving_leaves_the_old_start_whole(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bundle, evaluation set and facts are each put in place by one rename; stop before each."""
    save_prepared(tmp_path, prepared())
    replace, calls = os.replace, 0

    def crash(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == step:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash)
    changed = prepared(bundle=prepare_from_settings(tiny()).bundle, source="cd", evaluation=evaluation())
    with pytest.raises(KeyboardInterrupt):
        save_prepared(tmp_path, changed)
    kept = load_prepared(tmp_path)
    assert kept is not None
    assert (kept.bundle.digest, kept.source) == (bundle().digest, "ab")


def prepare_from_settings_bundle(tmp_path: Path) -> Any:
    return prepare_from_settings(tiny()).bundle


def tiny(**changes: Any) -> Federation:
    document = {
        "version": 1,
        "name": "tiny",
        "model": {"image-size": 32, "max-tokens": 16},
        "privacy": {"epsilon": 8.0},
        **changes,
    }
    return Federation.parse(document, source="test")


def test_a_start_of_another_version_is_refused_with_the_remedy(tmp_path: Path) -> None:
    save_prepared(tmp_path, prepared())
    facts = json.loads((tmp_path / "start.json").read_text())
    (tmp_path / "start.json").write_text(json.dumps({**facts, "version": 2}))
    with pytest.raises(RunError, match="holds a start of version 2: delete the folder to make it anew"):
        load_prepared(tmp_path)


def test_a_start_whose_bundle_was_changed_is_refused(tmp_path: Path) -> None:
    save_prepared(tmp_path, prepared())
    (file,) = tmp_path.glob("*/bundle.json")
    file.write_text(file.read_text().replace("clear lungs", "clear lunge"))
    with pytest.raises(BundleMissing, match="was changed on disk"):
        load_prepared(tmp_path)


def test_without_public_data_a_start_needs_no_preparation(root: Path) -> None:
    made = prepared_start(federation(root), cache=root / "cache")
    assert (made.public_start, made.evaluation) == (False, None)
    assert prepared_start(federation(root), cache=root / "cache").bundle.digest == made.bundle.digest
    assert evaluator_of(federation(root), made) is None


@pytest.mark.parametrize(
    "public", [{"public_start": {"table": "t"}}, {"evaluation": {"data": {"table": "t"}}}]
)
def test_with_public_data_a_start_must_be_prepared_first(public: dict[str, Any], root: Path) -> None:
    asked = federation(root, **public)
    with pytest.raises(RunError, match=r"no start was prepared from it .* run 'clipward start'"):
        prepared_start(asked, cache=root / "cache")
    save_prepared(start_folder(asked, root / "cache"), prepared(evaluation=evaluation()))
    found = prepared_start(asked, cache=root / "cache")
    assert found.public_start
    measure = evaluator_of(asked, found)
    assert measure is not None
    measured = measure(start_of(asked, found).arrays)
    assert measured is not None
    assert measured["retrieval"]["image_to_text"]["n"] == len(TEXTS)


@pytest.mark.parametrize("part", ["full", "lora", "heads"])
def test_round_zero_is_the_part_of_the_prepared_model(part: str, root: Path) -> None:
    asked = federation(root, share={"part": part})
    begin = start_of(asked, prepared())
    assert begin.public_start
    assert begin.bundle.digest == bundle().digest
    for name, value in begin.arrays.items():
        if "lora_" not in name:
            assert np.array_equal(value, bundle().weights[name.replace(".base_layer", "")])


def test_the_settings_alone_decide_the_tiny_model() -> None:
    digests = [
        prepare_from_settings(tiny(**changes)).bundle.digest
        for changes in ({}, {}, {"model": {"image-size": 32, "max-tokens": 16, "seed": 1}})
    ]
    assert digests[0] == digests[1] != digests[2]


def test_texts_are_centred_on_public_sentences_before_anything_is_made_of_the_model() -> None:
    asked = tiny(
        model={"encoder": "thumbnail", "image-size": 16, "max-tokens": 32, "centre-texts": True},
        objective={"anchors-from": ["views", "noise"], "anchors": 500},
    )
    bundle = prepare_from_settings(asked).bundle
    encoder = ClipEncoder.parse(bundle.model, bundle.weights)
    assert encoder.text_features(view_sentences()).mean(0).numpy() == pytest.approx(0, abs=1e-4)
    assert encoder.width == 512
    assert bundle.anchor_texts == view_sentences()


def test_without_public_data_the_anchors_are_prompts_and_noise() -> None:
    made = prepare_from_settings(tiny(objective={"anchors": 9})).bundle
    assert made.anchor_texts == label_prompts().texts[:9]
    assert np.array_equal(made.anchor_images, noise_images(9, size=32).images)


def test_prepared_sources_and_those_of_the_settings_take_turns() -> None:
    asked = tiny(objective={"anchors": 4, "anchors-from": ["prompts", "synthetic"]})
    given = PublicAnchors(texts=("one", "two"), images=random_images(5))
    made = bundle_of(asked, build_encoder(asked), prepared={"synthetic": given})
    first, second = label_prompts().texts[:2]
    assert made.anchor_texts == (first, "one", second, "two")
    assert np.array_equal(made.anchor_images, given.images[:4])


def test_synthetic_anchors_must_be_prepared_first(tmp_path: Path) -> None:
    asked = tiny(objective={"anchors-from": ["synthetic"]})
    with pytest.raises(RunError, match=r"anchors from 'synthetic' must be prepared: run 'clipward start'"):
        prepared_start(asked, cache=tmp_path)
    save_prepared(start_folder(asked, tmp_path), prepared())
    assert prepared_start(asked, cache=tmp_path).bundle.digest == bundle().digest


def released(folder: Path, *, width: int = EMBEDDING) -> Path:
    unit = np.eye(2, width, dtype=np.float32)
    path = folder / "prototypes.safetensors"
    PrototypeBank(concepts=("a", "b"), wordings=(("a",), ("b",)), image=unit, text=-unit).save(path)
    return path


def test_named_prototypes_join_the_bundle_and_need_no_other_start(root: Path) -> None:
    plain, asked = federation(root), federation(root, objective={"prototypes": str(released(root))})
    assert start_folder(asked, root / "cache") == start_folder(plain, root / "cache")
    ready = prepared_start(plain, cache=root / "cache")
    without, begin = start_of(plain, ready), start_of(asked, ready)
    assert without.bundle.prototypes is None
    assert without.bundle.digest == ready.bundle.digest != begin.bundle.digest
    assert begin.bundle.prototypes is not None
    assert begin.bundle.prototypes.concepts == ("a", "b")
    assert begin.bundle.anchor_texts == ready.bundle.anchor_texts
    assert all(np.array_equal(value, without.arrays[name]) for name, value in begin.arrays.items())


def test_prototypes_that_cannot_be_used_stop_the_run(root: Path) -> None:
    absent = federation(root, objective={"prototypes": str(root / "absent.safetensors")})
    with pytest.raises(RunError, match=r"objective\.prototypes: no prototypes at .*absent\.safetensors"):
        start_of(absent, prepared())
    odd = federation(root, objective={"prototypes": str(released(root, width=EMBEDDING + 1))})
    with pytest.raises(
        RunError, match=r"objective\.prototypes: prototypes of width 9, and the model embeds in 8"
    ):
        start_of(odd, prepared())
