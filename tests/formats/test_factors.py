"""The factors in an adapter's file: which tensors belong together, and what the others say of it."""

import pytest

from lora_cli.errors import HeaderError
from lora_cli.formats.factors import Pair, sort_tensors
from lora_cli.formats.header import Header, parse_header
from tests.hostile.corpus import MODULE, safetensors, tensor

PAIR = ((f"{MODULE}.lora_A.weight", "F32", [2, 3]), (f"{MODULE}.lora_B.weight", "F32", [4, 2]))


def adapter(*tensors: tuple[str, str, list[int]]) -> Header:
    """The header of a file with these (name, dtype, shape), laid one after the other."""
    width = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1}
    header, at = {}, 0
    for name, dtype, shape in tensors:
        size = width[dtype]
        for length in shape:
            size *= length
        header[name] = tensor(dtype, shape, [at, at + size])
        at += size
    file = safetensors(header, b"\0" * at)
    return parse_header(file, len(file))


def pairs(*tensors: tuple[str, str, list[int]]) -> dict[str, Pair]:
    return dict(sort_tensors(adapter(*tensors)).pairs)


def test_factors_are_found_by_their_place_in_the_file() -> None:
    found = sort_tensors(
        adapter(
            *PAIR,
            ("base_model.model.lm_head.lora_A.default.weight", "BF16", [1, 5]),
            ("base_model.model.lm_head.lora_B.default.weight", "BF16", [6, 1]),
            ("base_model.model.score.weight", "F32", [2, 3]),
        )
    )
    assert list(found.pairs) == [MODULE, "base_model.model.lm_head"]
    assert (found.pairs[MODULE].rank, found.pairs[MODULE].b.shape) == (2, (4, 2))
    assert (found.names, found.refused) == ({"default"}, ())
    assert [entry.name for entry in found.whole] == ["base_model.model.score.weight"]


def test_embeddings_and_convolutions_have_factors_of_their_own_form() -> None:
    found = pairs(
        ("base_model.model.embed.lora_embedding_A", "F32", [2, 9]),
        ("base_model.model.embed.lora_embedding_B", "F32", [3, 2]),
        ("base_model.model.conv.lora_A.weight", "F32", [2, 3, 5, 5]),
        ("base_model.model.conv.lora_B.weight", "F32", [4, 2, 1, 1]),
    )
    assert [(pair.embedding, pair.convolution, pair.rank) for pair in found.values()] == [
        (True, False, 2),
        (False, True, 2),
    ]


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ([("x.y.lora_A.weight", "F32", [2, 3])], "x.y has lora_A but no lora_B"),
        ([("x.y.lora_B.weight", "F32", [2, 3])], "x.y has lora_B but no lora_A"),
        ([("x.y.lora_embedding_A", "F32", [2, 3])], "x.y has lora_embedding_A but no lora_embedding_B"),
        (
            [("x.y.lora_A.weight", "F32", [2, 3]), ("x.y.lora_B.weight", "F32", [4, 3])],
            "rank 2 in lora_A but 3 in lora_B",
        ),
        ([("x.y.lora_A.weight", "F32", [0, 3]), ("x.y.lora_B.weight", "F32", [4, 0])], "empty factor"),
        (
            [("x.y.lora_A.a.weight", "F32", [2, 3]), ("x.y.lora_A.weight", "F32", [2, 3])],
            "x.y has lora_A twice",
        ),
        (
            [("x.y.lora_A.weight", "F32", [2, 3, 5]), ("x.y.lora_B.weight", "F32", [4, 2])],
            "a kernel in lora_A that does not go with lora_B",
        ),
        (
            [("x.y.lora_A.weight", "F32", [2, 3, 5]), ("x.y.lora_B.weight", "F32", [4, 2, 3])],
            "a kernel in lora_A that does not go with lora_B",
        ),
    ],
)
def test_factors_that_do_not_belong_together_are_refused(
    tensors: list[tuple[str, str, list[int]]], reason: str
) -> None:
    with pytest.raises(HeaderError, match=reason):
        sort_tensors(adapter(*tensors))


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        (f"{MODULE}.lora_magnitude_vector", [4], "DoRA"),
        (f"{MODULE}.lora_magnitude_vector.weight", [4], "DoRA"),
        ("base_model.model.conv.lora_A.weight", [6], "not a matrix"),
        (f"{MODULE}.lora_B.bias", [4], "lora_bias"),
        (f"{MODULE}.lora_diag", [2], "KaSA"),
        (f"{MODULE}.lora_new_thing", [2], "not known here"),
        (f"{MODULE}.lora_A.one.two.weight", [2, 3], "a name that PEFT does not use"),
        ("base_model.model.model.layers.0.mlp.up_proj.bias", [4], "biases of the base were trained"),
        ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", [1, 3], "token embeddings"),
    ],
)
def test_a_tensor_that_makes_the_update_more_than_its_factors_is_refused(
    name: str, shape: list[int], reason: str
) -> None:
    [said] = sort_tensors(adapter(*PAIR, (name, "F32", shape))).refused
    assert reason in said


@pytest.mark.parametrize(
    ("names", "saved"),
    [
        (["base_model.model.score.weight"], True),
        (["base_model.model.classifier.dense.weight", "base_model.model.classifier.dense.bias"], True),
        (["base_model.model.model.embed_tokens.weight"], True),
        ([f"{MODULE}.base_layer.weight"], False),
        ([f"{MODULE}.lora_velora_embed"], False),
    ],
)
def test_modules_saved_whole_are_named_and_untouched_copies_are_none(names: list[str], saved: bool) -> None:
    found = sort_tensors(adapter(*PAIR, *((name, "F32", [2]) for name in names)))
    assert ([entry.name for entry in found.whole], found.refused) == (names if saved else [], ())
    assert [(place, entry.name) for place, entry in found.copies] == [
        (MODULE, name) for name in names if "base_layer" in name
    ]


def test_factors_of_integers_are_refused() -> None:
    header = adapter((f"{MODULE}.lora_A.weight", "I8", [2, 3]), (f"{MODULE}.lora_B.weight", "I8", [4, 2]))
    assert [reason for reason in sort_tensors(header).refused if "I8" in reason]
