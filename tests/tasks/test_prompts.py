import pytest

from tasks.embeddings import EvaluationError
from tasks.prompts import prompts_for

FINDINGS = [
    "opacity",
    "consolidation",
    "effusion",
    "cardiomegaly",
    "pneumothorax",
    "nodule",
    "device",
    "atelectasis",
    "edema",
    "pneumonia",
    "fracture",
]


@pytest.mark.parametrize("finding", [*FINDINGS, "no finding"])
def test_a_listed_finding_has_its_own_distinct_sentences(finding: str) -> None:
    prompts = prompts_for(finding)

    assert min(len(prompts.positive), len(prompts.negative)) > 1
    sentences = prompts.positive + prompts.negative
    assert len(set(sentences)) == len(sentences)
    assert all(not sentence[0].islower() and sentence.endswith(".") for sentence in sentences)


def test_no_positive_sentence_is_a_negative_one_of_another_finding() -> None:
    positive = {sentence for finding in FINDINGS for sentence in prompts_for(finding).positive}
    negative = {sentence for finding in FINDINGS for sentence in prompts_for(finding).negative}

    assert not positive & negative


@pytest.mark.parametrize(
    ("label", "finding"),
    [
        ("Pleural Effusion", "effusion"),
        ("pleural_effusion", "effusion"),
        ("Lung Opacity", "opacity"),
        ("Support Devices", "device"),
        ("  Cardiomegaly ", "cardiomegaly"),
        ("No Finding", "no finding"),
    ],
)
def test_the_label_names_of_public_sets_are_known(label: str, finding: str) -> None:
    assert prompts_for(label) == prompts_for(finding)


def test_an_unknown_finding_gets_the_template() -> None:
    prompts = prompts_for("Pleural_Thickening")

    assert prompts.positive == ("There is pleural thickening.",)
    assert prompts.negative == ("There is no pleural thickening.",)


def test_no_finding_is_not_the_template_turned_upside_down() -> None:
    prompts = prompts_for("No Finding")

    assert "Normal chest radiograph. The lungs are clear." in prompts.positive
    assert not any("no no" in sentence.casefold() for sentence in prompts.positive + prompts.negative)


@pytest.mark.parametrize("blank", ["", "  ", "_"])
def test_a_blank_finding_is_an_error(blank: str) -> None:
    with pytest.raises(EvaluationError, match="expected the name of a finding"):
        prompts_for(blank)
