"""Which arrays travel and which a round trains follows from their names alone."""

import numpy as np
import pytest

from encoders.parts import trainable_part
from strategies.messages import MessageError
from strategies.share import personal, shared, trained
from tests.encoders.micro import micro_encoder
from tests.small_hospitals import plan

FULL = frozenset(trainable_part(micro_encoder(), "full").arrays())
LORA = frozenset(trainable_part(micro_encoder(), "lora").arrays())
HEADS = {"visual_projection.weight", "text_projection.weight"}


def test_without_anything_kept_all_is_shared() -> None:
    assert shared(FULL, plan(part="full")) == FULL
    assert personal(FULL, plan(part="full")) == frozenset()


def test_every_norm_of_a_clip_model_is_found_by_its_name() -> None:
    model = trainable_part(micro_encoder(), "full").encoder.model
    norms = {
        f"{name}.{weight}"
        for name, layer in model.named_modules()
        if type(layer).__name__ == "LayerNorm"
        for weight in ("weight", "bias")
    }
    assert norms
    assert personal(FULL, plan(part="full", personal=("norms",))) == norms


def test_heads_stay_at_the_site() -> None:
    asked = plan(part="lora", personal=("heads",))
    assert personal(LORA, asked) == HEADS
    assert shared(LORA, asked) == LORA - HEADS


def test_a_part_of_which_nothing_is_left_is_refused() -> None:
    with pytest.raises(MessageError, match="part 'heads' has nothing to share once heads stay at the sites"):
        shared(HEADS, plan(personal=("heads",)))


def factors(names: frozenset[str]) -> set[str]:
    return {letter for letter in "AB" if any(f"lora_{letter}" in name for name in names)}


@pytest.mark.parametrize(
    ("lora_train", "server_round", "expected"),
    [("alternating", 1, "B"), ("alternating", 2, "A"), ("alternating", 3, "B"), ("b", 1, "B"), ("b", 2, "B")],
)
def test_one_factor_is_trained_at_a_time(lora_train: str, server_round: int, expected: str) -> None:
    names = trained(LORA, plan(part="lora", lora_train=lora_train), server_round)
    assert factors(names) == {expected}
    assert names >= HEADS


def test_other_parts_are_trained_whole_in_every_round() -> None:
    assert trained(FULL, plan(part="full"), 2) == FULL


@pytest.mark.parametrize("server_round", [1, 2])
def test_the_mean_of_one_factor_is_the_mean_of_the_products_and_of_both_it_is_not(server_round: int) -> None:
    rng, sites = np.random.default_rng(0), 3
    start = {"lora_A": rng.standard_normal((2, 5)), "lora_B": rng.standard_normal((4, 2))}
    free = trained(start, plan(part="lora"), server_round)

    def products(names: frozenset[str]) -> tuple[np.ndarray, np.ndarray]:
        at_sites = [
            {
                name: value + rng.standard_normal(value.shape) * (name in names)
                for name, value in start.items()
            }
            for _ in range(sites)
        ]
        mean = {name: np.mean([own[name] for own in at_sites], axis=0) for name in start}
        return mean["lora_B"] @ mean["lora_A"], np.mean(
            [own["lora_B"] @ own["lora_A"] for own in at_sites], axis=0
        )

    of_means, mean_of = products(free)
    assert of_means == pytest.approx(mean_of, abs=1e-12)
    of_means, mean_of = products(frozenset(start))
    assert np.abs(of_means - mean_of).max() > 0.1
