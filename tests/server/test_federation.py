import math
from pathlib import Path
from typing import Any

import pytest

from server.federation import Federation, Prototypes
from strategies.messages import CentrePlan, TrainingPlan
from strategies.settings import SettingsError

MINIMAL = 'version = 1\nname = "demo"\n[privacy]\nepsilon = 3.0\n'


def load(tmp_path: Path, text: str) -> Federation:
    (tmp_path / "federation.toml").write_text(text)
    return Federation.load(tmp_path / "federation.toml")


def test_the_shortest_file_asks_for_privacy(tmp_path: Path) -> None:
    federation = load(tmp_path, MINIMAL)
    assert (federation.privacy.mode, federation.objective.name) == ("dp", "anchored")
    assert federation.plan().epsilon == 3.0


def test_every_field_of_the_plan_comes_from_the_file(tmp_path: Path) -> None:
    federation = load(
        tmp_path,
        """
version = 1
name = "demo"
[share]
part = "lora"
lora-rank = 7
[objective]
inverse-temperature = 20.0
anchors = 32
form = "sigmoid"
logit-bias = -3.0
soft-positives = 0.5
groups = 9
[privacy]
epsilon = 2.5
max-grad-norm = 0.5
[training]
rounds = 11
steps = 13
batch = 17
learning-rate = 0.25
weight-decay = 0.125
optimizer = "dp-adambc"
studies-per-patient = 3
augment = true
seed = 19
""",
    )
    assert federation.plan() == TrainingPlan(
        part="lora",
        lora_rank=7,
        objective="anchored",
        inverse_temperature=20.0,
        anchors=32,
        loss="sigmoid",
        logit_bias=-3.0,
        soft_positives=0.5,
        groups=9,
        privacy="dp",
        epsilon=2.5,
        max_grad_norm=0.5,
        rounds=11,
        steps=13,
        batch=17,
        learning_rate=0.25,
        weight_decay=0.125,
        optimizer="dp-adambc",
        studies_per_patient=3,
        augment=True,
        seed=19,
    )


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "encoder").mkdir()
    federation = load(
        tmp_path,
        MINIMAL
        + '[model]\nencoder = "encoder"\n[public-start]\ndicom = "public"\nreports = "r.csv"\n'
        + '[evaluation.data]\ntable = "t.csv"\n[simulation]\nsites = "sites"\n',
    )
    assert federation.public_start is not None
    assert federation.public_start.dicom == tmp_path / "public"
    assert federation.public_start.reports == (tmp_path / "r.csv",)
    assert federation.public_start.labels is None
    assert federation.evaluation.data is not None
    assert federation.evaluation.data.table == tmp_path / "t.csv"
    assert federation.simulation is not None
    assert federation.simulation.sites == tmp_path / "sites"
    assert federation.model.encoder == str(tmp_path / "encoder")


def test_an_absolute_path_stays(tmp_path: Path) -> None:
    federation = load(tmp_path, MINIMAL + '[simulation]\ntable = "/data/images.csv"\n')
    assert federation.simulation is not None
    assert federation.simulation.table == Path("/data/images.csv")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"training": {"keep-optimizer": True}}, "training.keep-optimizer is only for privacy.mode = 'none'"),
        ({"training": {"epochs": 1}}, "training.epochs would tell a site's size"),
        ({"objective": {"name": "infonce"}}, "couples the patients of a batch, so no epsilon can be claimed"),
        ({"objective": {"form": "hinge"}}, "'softmax' or 'sigmoid'"),
        ({"objective": {"groups": 0}}, "greater than or equal to 1"),
        ({"objective": {"soft-positives": 0.9}}, "less than 0.9"),
        (
            {"privacy": {"mode": "none"}, "objective": {"name": "microbatch"}},
            "trains objective.name = 'infonce'",
        ),
        (
            {
                "privacy": {"mode": "none"},
                "objective": {"name": "infonce"},
                "training": {"optimizer": "dp-adambc"},
            },
            "training.optimizer 'dp-adambc' subtracts noise",
        ),
        ({"privacy": {}}, 'mode "dp" needs epsilon'),
        ({"privacy": {"mode": "none", "epsilon": 1.0}}, 'mode "none" has none'),
        ({"privacy": {"epsilon": 0}}, "greater than 0"),
        ({"version": 2}, "version: Input should be 1"),
        ({"name": "../up"}, "name: .*pattern"),
        ({"simulation": {}}, "name one of: sites, table"),
        ({"simulation": {"sites": "a", "table": "b"}}, "name one of: sites, table"),
        ({"public-start": {}}, "name one source: table, or dicom with reports"),
        ({"public-start": {"table": "a", "reports": "b"}}, "reports belong to dicom"),
        ({"strategy": {"min-sites": 0}}, "greater than or equal to 1"),
        ({"strategy": {"min_site": 1}}, "did you mean 'min-sites'"),
        ({"training": {"rounds": 0}}, "greater than or equal to 1"),
        ({"centre": {}}, "the centre is of the features that share.part 'image-head' is trained on"),
        (
            {"share": {"part": "image-head"}, "secure-aggregation": {}, "simulation": {"sites": "a"}},
            "part 'image-head' needs the centre of all images, which would leave every site unmasked",
        ),
        ({"training": {"batch": 8, "sample-rate": 0.1}}, "name one: batch, or sample-rate"),
        ({"training": {"sample-rate": 1.1}}, "less than or equal to 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(change: dict[str, Any], text: str) -> None:
    document = {"version": 1, "name": "demo", "privacy": {"epsilon": 3.0}, **change}
    with pytest.raises(SettingsError, match=text):
        Federation.parse(document, source="federation.toml")


def test_a_step_is_of_a_batch_unless_the_file_says_a_rate(tmp_path: Path) -> None:
    usual, rated = load(tmp_path, MINIMAL), load(tmp_path, MINIMAL + "[training]\nsample-rate = 0.25\n")
    assert (usual.plan().batch, usual.plan().sample_rate) == (64, None)
    assert (rated.plan().batch, rated.plan().sample_rate) == (None, 0.25)
    again = Federation.parse(rated.model_dump(mode="json", by_alias=True), source="again")
    assert again == rated


def test_an_image_head_has_a_centre_whatever_the_file_says_of_it(tmp_path: Path) -> None:
    head = MINIMAL + '[share]\npart = "image-head"\n'
    usual, own = load(tmp_path, head), load(tmp_path, head + "[centre]\nnoise-multiplier = 2.0\n")
    assert usual.plan().centre == CentrePlan(
        noise_multiplier=5.0, max_norm=math.hypot(0.5, 0.25), count_weight=0.25
    )
    assert own.plan().centre.noise_multiplier == 2.0  # type: ignore[union-attr]
    assert load(tmp_path, MINIMAL).plan().centre is None


def test_infonce_is_allowed_without_a_claim() -> None:
    document = {"version": 1, "name": "d", "privacy": {"mode": "none"}, "objective": {"name": "infonce"}}
    assert Federation.parse(document, source="f").plan().epsilon is None


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("", ("prompts", "noise")),
        ('[objective]\nanchors-from = ["synthetic"]\n', ("synthetic",)),
        (
            '[objective]\nanchors-from = ["noise", "public", "prompts"]\n[public-start]\ntable = "t.csv"\n',
            ("noise", "public", "prompts"),
        ),
        ('[public-start]\ntable = "t.csv"\n', ("public",)),
    ],
)
def test_anchors_come_from_what_the_file_names_or_what_there_is(
    objective: str, expected: tuple[str, ...], tmp_path: Path
) -> None:
    assert load(tmp_path, MINIMAL + objective).anchor_sources == expected


@pytest.mark.parametrize(
    ("sources", "text"),
    [
        ("[]", "needs a source of texts"),
        ('["noise"]', r"needs a source of texts \(public, prompts, views or synthetic\)"),
        ('["prompts"]', r"and one of images \(public, synthetic or noise\)"),
        ('["synthetic", "synthetic"]', "names a source twice"),
        ('["public"]', "'public' takes them from public-start: name its data"),
        ('["queue"]', "'public', 'prompts', 'views', 'synthetic' or 'noise'"),
    ],
)
def test_anchors_from_sources_that_make_no_bank_are_refused(sources: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=text):
        load(tmp_path, MINIMAL + f"[objective]\nanchors-from = {sources}\n")


@pytest.mark.parametrize("sources", ["", 'anchors-from = ["synthetic"]\nform = "sigmoid"\n'])
def test_prototypes_are_found_beside_the_file_and_shown_without_their_folder(
    sources: str, tmp_path: Path
) -> None:
    federation = load(tmp_path, MINIMAL + f'[objective]\nprototypes = "kept/p.safetensors"\n{sources}')
    assert federation.objective.prototypes == tmp_path / "kept" / "p.safetensors"
    assert federation.public_settings()["objective"]["prototypes"] == "p.safetensors"
    assert "prototypes" not in load(tmp_path, MINIMAL).public_settings()["objective"]


@pytest.mark.parametrize("name", ["microbatch", "infonce"])
def test_prototypes_of_an_objective_without_anchors_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError, match=f"objective '{name}' has none: remove the key, or name 'anchored'"
    ):
        load(tmp_path, MINIMAL + f'[objective]\nname = "{name}"\nprototypes = "p.safetensors"\n')


def test_microbatch_may_claim_an_epsilon() -> None:
    document = {"version": 1, "name": "d", "privacy": {"epsilon": 3.0}, "objective": {"name": "microbatch"}}
    plan = Federation.parse(document, source="f").plan()
    assert (plan.objective, plan.groups, plan.epsilon) == ("microbatch", 16, 3.0)


def with_strategy(tmp_path: Path, keys: str) -> Federation:
    return load(tmp_path, f"{MINIMAL}[strategy]\n{keys}\n")


@pytest.mark.parametrize(
    ("keys", "ready", "asked"),
    [
        ("", 5, 5),
        ("", 0, 0),
        ("fraction = 0.5", 5, 3),
        ("fraction = 0.07", 100, 7),
        ("fraction = 0.01", 10, 2),
        ("fraction = 1e-9", 1, 1),
        ("target-sites = 3", 5, 3),
        ("target-sites = 9", 5, 5),
    ],
)
def test_so_many_of_the_ready_sites_are_asked(tmp_path: Path, keys: str, ready: int, asked: int) -> None:
    assert with_strategy(tmp_path, keys).strategy.asked_of(ready) == asked


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ("fraction = 0", "strategy.fraction: .*greater than 0"),
        ("fraction = 1.1", "strategy.fraction: .*less than or equal to 1"),
        ("fraction = 0.5\ntarget-sites = 3", "name one of: fraction, target-sites"),
        ("target-sites = 1", "target-sites = 1 asks fewer than min-sites = 2 needs"),
        ("late = 'never'", "strategy.late: .*'drop' or 'stale'"),
        ("retries = -1", "strategy.retries: .*greater than or equal to 0"),
        ("name = 'krum'", "'krum' cannot combine fewer than 5 releases: raise min-sites = 2"),
        ("name = 'scaffold'", "scaffold .*set 'sgd'"),
        ("targetsites = 3", "did you mean 'target-sites'"),
    ],
)
def test_a_choice_of_sites_that_cannot_be_meant_is_refused(tmp_path: Path, keys: str, text: str) -> None:
    with pytest.raises(SettingsError, match=text):
        with_strategy(tmp_path, keys)


def test_stopping_early_needs_something_to_evaluate_on(tmp_path: Path) -> None:
    evaluation = "[evaluation]\nstop-after = 3\n"
    with pytest.raises(SettingsError, match=r"evaluation\.stop-after needs evaluations: name public data"):
        load(tmp_path, MINIMAL + evaluation)
    public = 'data.table = "public.csv"\nmetric = "zero_shot.macro_auroc"\n'
    assert load(tmp_path, MINIMAL + evaluation + public).evaluation.stop_after == 3
    assert load(tmp_path, MINIMAL + evaluation + '[simulation]\nsites = "s"\n').evaluation.stop_after == 3


def test_an_unknown_metric_is_refused_and_the_known_ones_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"evaluation\.metric: .*zero_shot\.macro_auroc"):
        load(tmp_path, MINIMAL + '[evaluation]\nmetric = "accuracy"\n')


def test_at_least_one_checkpoint_is_kept(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL).checkpoints.keep == 3
    with pytest.raises(SettingsError, match=r"checkpoints\.keep: .*greater than or equal to 1"):
        load(tmp_path, MINIMAL + "[checkpoints]\nkeep = 0\n")


@pytest.mark.parametrize("name", ["scaffold", "feddyn"])
def test_what_remembers_every_weight_of_a_site_does_not_go_with_factors_by_turns(name: str) -> None:
    changes = {
        "strategy": {"name": name},
        "training": {"optimizer": "sgd"},
        "privacy": {"mode": "none"},
        "objective": {"name": "infonce"},
    }
    with pytest.raises(SettingsError, match=f"strategy '{name}' remembers .* set share.lora-train = 'b'"):
        Federation.parse({"version": 1, "name": "a", "share": {"part": "lora"}, **changes}, source="test")
    share = {"part": "lora", "lora-train": "b"}
    Federation.parse({"version": 1, "name": "a", "share": share, **changes}, source="test")


@pytest.mark.parametrize(
    ("share", "message"),
    [
        ({"part": "prompts", "keep": ["norms"]}, "prompts are neither norms nor heads: remove share.keep"),
        ({"part": "heads", "keep": ["heads"]}, "leaves nothing to share"),
    ],
)
def test_a_share_of_which_nothing_is_left_is_refused(share: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Federation.parse(
            {"version": 1, "name": "a", "privacy": {"epsilon": 8.0}, "share": share}, source="test"
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prototypes": None}, r"needs a table \[prototypes\]"),
        ({"training": {"rounds": 1}}, "needs training.rounds of at least 2"),
        ({"prototypes": {"every": 2}}, "needs prototypes.every = 1"),
        ({"objective": {"soft-targets": 10.0}}, "needs no objective.soft-targets"),
        ({"strategy": {"name": "fedadam"}}, "needs strategy.name = 'fedavg'"),
        ({"strategy": {"late": "stale"}}, "needs strategy.late = 'drop'"),
        ({"evaluation": {"stop-after": 1}, "simulation": {"sites": "."}}, "needs evaluation.stop-after = 0"),
        ({"share": {"part": "prototypes", "keep": ["norms"]}}, "remove share.keep"),
        (
            {"privacy": {"mode": "none"}, "objective": {"name": "infonce", "soft-positives": 0.4}},
            "needs privacy.mode = 'dp'",
        ),
    ],
)
def test_prototypes_alone_go_with_what_they_can(changes: dict[str, Any], message: str) -> None:
    document = {
        "version": 1,
        "name": "a",
        "privacy": {"epsilon": 8.0},
        "share": {"part": "prototypes"},
        "prototypes": {},
    }
    plan = Federation.parse(document, source="test").plan()
    assert (plan.shares_weights, plan.prototype_releases) == (False, plan.rounds - 1)
    changed = {key: value for key, value in {**document, **changes}.items() if value is not None}
    with pytest.raises(SettingsError, match=message):
        Federation.parse(changed, source="test")


def test_prototypes_are_anchors_and_need_an_objective_that_has_some() -> None:
    document = {"version": 1, "name": "a", "prototypes": {}, "privacy": {"mode": "none"}}
    with pytest.raises(SettingsError, match="prototypes are anchors, and this objective has none"):
        Federation.parse({**document, "objective": {"name": "infonce"}}, source="test")
    soft = {**document, "objective": {"name": "infonce", "soft-positives": 0.4}}
    assert Federation.parse(soft, source="test").plan().prototypes is not None


def test_targets_are_soft_by_words_or_by_embeddings() -> None:
    document = {"version": 1, "name": "a", "privacy": {"epsilon": 8.0}}
    both = {**document, "objective": {"soft-positives": 0.4, "soft-targets": 10.0}}
    with pytest.raises(SettingsError, match="soft-positives go by words, soft-targets by embeddings"):
        Federation.parse(both, source="test")
    soft = Federation.parse({**document, "objective": {"soft-targets": 10.0}}, source="test").plan()
    assert (soft.soft_targets, soft.soft_positives) == (10.0, None)


def test_concepts_of_prototypes_are_findings_and_views_each_once() -> None:
    found = Prototypes(findings=("effusion",), views=("planes", "techniques"))
    assert found.plan(wire="bf16").concepts[:3] == ("effusion present", "effusion absent", "axial")
    assert found.plan(wire="bf16").max_norm == pytest.approx(math.sqrt(3 * 2 * (1 + 0.25)))
    for table, message in (
        ({"findings": []}, "name findings, or views"),
        ({"findings": ["a", "a"]}, "concept 'a present' is named twice"),
        ({"views": ["regions", "regions"]}, "concept 'head' is named twice"),
        ({"findings": [" "]}, "expected the name of a finding"),
    ):
        with pytest.raises(SettingsError, match=message):
            Prototypes.parse(table, source="test")
