"""The shipped vocabulary is what its recipe makes, from public text alone."""

import hashlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

from clipward.vocabulary import SIZE, make, public_text, shipped
from encoders.tokenizer import TextTokenizer

ROOT = Path(__file__).resolve().parents[2]
REMEDY = "the recipe's text changed: run `python -m clipward.vocabulary`"


def test_the_shipped_vocabulary_is_the_one_that_is_made() -> None:
    assert json.loads(shipped().read_text(encoding="utf-8")) == make(), REMEDY


def test_it_is_the_same_in_another_process() -> None:
    script = "import json, clipward.vocabulary as v; print(json.dumps(v.make(), sort_keys=True))"
    other = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "7", "TOKENIZERS_PARALLELISM": "false"},
    )
    ours = json.dumps(make(), sort_keys=True).encode()
    assert hashlib.sha256(other.stdout.strip()).digest() == hashlib.sha256(ours).digest()


def test_libraries_that_register_uids_of_their_own_change_nothing() -> None:
    before = public_text()
    importlib.import_module("pynetdicom")
    assert public_text() == before


def test_it_keeps_to_its_size_and_numbers_every_entry_once() -> None:
    vocabulary = make()["vocabulary"]
    assert len(vocabulary) == SIZE
    assert sorted(vocabulary.values()) == list(range(SIZE))


def test_common_wording_is_few_tokens() -> None:
    tokenizer = TextTokenizer.shipped(max_tokens=77)
    for text in ("pleural effusion", "clear lungs", "pneumothorax", "cardiomegaly"):
        assert tokenizer([text]).shape[1] <= 2 + 2 * len(text.split())


def test_the_recipe_reads_the_standard_and_our_wording() -> None:
    text = public_text()
    assert "Study Instance UID" in text
    assert any("effusion" in line.lower() for line in text)
    assert len(text) > 10_000
