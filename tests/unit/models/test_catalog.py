"""Models by name, and what they cost."""

from decimal import Decimal
from pathlib import Path

import pytest

from models.catalog import Catalog, CatalogError, ModelSpec, UnknownModel
from models.protocol import Usage


def test_two_models_are_always_there() -> None:
    """Without any table there are echo and tiny-chat."""
    catalog = Catalog.from_mapping()
    assert catalog.names() == ("echo", "tiny-chat")
    assert (catalog.get("echo").engine, catalog.get("echo").slots) == ("echo", 256)
    assert catalog.get("tiny-chat").path.endswith("tiny-chat")
    assert catalog.get("tiny-chat").slots == 16


def test_a_table_changes_a_built_in_model_and_adds_others() -> None:
    """A table with a built-in's name changes only the fields it gives; another name is another model."""
    tables = {"echo": {"seconds_per_token": 0.01}, "big": {"path": "owner/big", "quantization": "nf4"}}
    catalog = Catalog.from_mapping(tables)
    assert (catalog.get("echo").engine, catalog.get("echo").seconds_per_token) == ("echo", 0.01)
    assert (catalog.get("big").path, catalog.get("big").quantization) == ("owner/big", "nf4")


@pytest.mark.parametrize(
    ("table", "field"),
    [
        ({"path": "a/b", "slots": 0}, "slots"),
        ({"path": "a/b", "quantization": "int3"}, "quantization"),
        ({"path": "a/b", "colour": "red"}, "colour"),
        ({"path": "a/b", "prompt_dollars_per_million_tokens": -1}, "prompt_dollars_per_million_tokens"),
        ({"path": "a/b", "name": "other"}, "name"),
        ({}, ""),
        ({"engine": "echo", "path": "a/b"}, ""),
        ({"path": "a/b", "seconds_per_token": 1.0}, ""),
    ],
)
def test_a_wrong_table_is_an_error_that_names_model_and_field(table: dict, field: str) -> None:
    """A catalog is not made from a table that is wrong."""
    with pytest.raises(CatalogError, match=r"models\.mine") as wrong:
        Catalog.from_mapping({"mine": table})
    assert (wrong.value.model, wrong.value.field) == ("mine", field)


def test_a_folder_and_a_hub_id_are_models_of_that_name(tmp_path: Path) -> None:
    """What needs no table: a folder that is there, and anything that could be a hub id."""
    catalog = Catalog.from_mapping()
    assert catalog.get(str(tmp_path)).folder == tmp_path
    assert (catalog.get("owner/model").path, catalog.get("owner/model").folder) == ("owner/model", None)


@pytest.mark.parametrize("name", ["gpt", "", "x\0y", "a/" * 200])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    """Any other name is no model."""
    with pytest.raises(UnknownModel, match="echo, tiny-chat") as unknown:
        Catalog.from_mapping().get(name)
    assert unknown.value.known == ("echo", "tiny-chat")


def test_a_relative_folder_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's processes find the folder wherever they run."""
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Catalog.from_mapping({"m": {"path": "mine"}}).get("m").path == str(tmp_path / "mine")


def test_price_by_tokens_and_by_machine_time() -> None:
    """Cached prompt tokens have a price of their own, and both prices are exact."""
    spec = ModelSpec(
        name="m",
        path="a/b",
        prompt_dollars_per_million_tokens=Decimal(1),
        cached_dollars_per_million_tokens=Decimal("0.1"),
        completion_dollars_per_million_tokens=Decimal(2),
        machine_dollars_per_hour=Decimal("3.6"),
    )
    price = spec.price(Usage(prompt_tokens=100, cached_tokens=40, completion_tokens=10), busy_seconds=2.5)
    assert price.token_dollars == Decimal("0.000084")
    assert price.machine_dollars == Decimal("0.0025")


def test_a_spec_survives_json_and_is_hashable() -> None:
    """It goes to the engine process as JSON, and keys caches."""
    spec = Catalog.from_mapping().get("tiny-chat")
    again = ModelSpec.model_validate_json(spec.model_dump_json())
    assert again == spec
    assert hash(again) == hash(spec)
