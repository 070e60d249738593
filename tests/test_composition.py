"""Rules joined with `+`: filters and masks AND, weights multiply and are normalised once, and it is all on record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import fire_data as fd
from fire_data.rules import make_rule
from fire_data.schemas.errors import ConfigError
from tests.ragged import ragged

FRAME = ragged(24, seed=7)


def _rows(name: str, **params: Any) -> pl.DataFrame:
    return fd.weigh(FRAME, name, batch_size=8, **params).collect()


def _flat(series: pl.Series) -> np.ndarray:
    return np.concatenate([np.asarray(x, dtype=np.float64) for x in series.to_list()])


def test_filters_and_masks_and() -> None:
    both = _rows("fire-filter+verified-only+tip+esr", **{"esr.tokens": 3})
    parts = [_rows("fire-filter"), _rows("verified-only")]
    assert both["keep"].to_list() == [a and b for a, b in zip(*(p["keep"] for p in parts), strict=True)]
    masks = [_flat(_rows("tip")["token_keep"]), _flat(_rows("esr", tokens=3)["token_keep"])]
    assert (_flat(both["token_keep"]) == masks[0] * masks[1]).all()


def test_the_first_rule_that_drops_gives_the_reason() -> None:
    both = _rows("fire-filter+verified-only")
    for row, first in zip(both.iter_rows(named=True), _rows("fire-filter")["drop_reason"], strict=True):
        assert row["drop_reason"] == (first or (None if row["keep"] else "the answer is not right"))


def test_weights_multiply_and_are_normalised_once_by_the_first_that_normalises() -> None:
    both = _rows("fire-weights+iw-opd")
    raw = [_flat(_rows(n)["weight"]) for n in ("fire-weights", "iw-opd")]
    steps = np.repeat(both["step"].to_numpy(), both["weight"].list.len().to_numpy())
    for step in range(3):
        product = (raw[0] * raw[1])[steps == step]
        np.testing.assert_allclose(_flat(both["weight"])[steps == step], product / product.mean(), rtol=1e-5)


def test_the_order_of_the_names_does_not_matter() -> None:
    one, other = _rows("fire+repetition-guard+tanh"), _rows("tanh+repetition-guard+fire")
    np.testing.assert_allclose(_flat(one["coefficient"]), _flat(other["coefficient"]), rtol=1e-6)
    assert one["keep"].to_list() == other["keep"].to_list()


def test_normalisation_can_be_given() -> None:
    for scope, over in (("none", "all"), ("trajectory", "all"), ("round", "kept")):
        mine = _rows("fire+iw-opd", normalise=scope, normalise_over=over)
        weights = [np.array(x) for x in mine["weight"].to_list()]
        if scope == "trajectory":
            np.testing.assert_allclose([w.mean() for w in weights], 1, rtol=1e-5)
        if scope == "round":
            kept = np.concatenate([w for w, k in zip(weights, mine["keep"], strict=True) if k])
            assert kept.mean() == pytest.approx(1, rel=1e-5)
        if scope == "none":
            assert np.concatenate(weights).mean() > 1.5


def test_a_parameter_goes_to_the_component_that_has_it() -> None:
    rule: Any = make_rule("fire+repetition-guard", {"percentile": 30, "repetition-guard.most": 0.1})
    assert (rule.rules[0].percentile, rule.rules[1].most) == (30, 0.1)


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("fire+tanh+clip", {}, "both set the advantage"),
        ("eopd+tropd", {}, "both set the forward-KL term"),
        ("fire+fire", {}, "there twice"),
        ("fire+random", {}, "cannot be composed"),
        ("fire+", {}, "no rule ''"),
        ("fire+tipp", {}, "did you mean 'tip'"),
        ("fire+soft-filter", {"percentile": 3}, "both have a parameter 'percentile'"),
        ("fire+tip", {"fire.percentil": 3}, "did you mean 'percentile'"),
        ("fire+tip", {"nosuch": 3}, "no parameter 'nosuch'"),
    ],
)
def test_what_cannot_be_composed_is_refused(name: str, params: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_rule(name, params)


def test_a_composition_has_the_denominator_of_its_parts() -> None:
    assert make_rule("pw-opsd+fire-released").denominator == "sequences"
    assert make_rule("fire+tip").denominator == "tokens"


def test_a_composition_has_the_scopes_of_its_parts_and_of_its_normalisation() -> None:
    assert make_rule("tip+prompt-gate").scopes == ("group", "step")
    assert not make_rule("verified-only+iw-opd").uses_groups
    assert make_rule("verified-only+iw-opd", {"normalise": "group"}).uses_groups


def test_what_is_normalised_over_needs_a_normalisation() -> None:
    with pytest.raises(ConfigError, match="they are not normalised"):
        make_rule("verified-only+tip", {"normalise_over": "kept"})
    mine = _rows("pw-opsd+verified-only", normalise_over="kept", **{"pw-opsd.normalise": "round"})
    kept = np.concatenate([np.array(w) for w, k in zip(mine["weight"].to_list(), mine["keep"], strict=True) if k])
    assert kept.mean() == pytest.approx(1, rel=1e-5)


def test_a_composition_is_recorded_with_all_its_parameters(
    tmp_path: Path, make_fake_run: Callable[..., Any], fire: Callable[..., Any]
) -> None:
    from fire_data.shards import sealed

    run = make_fake_run(tmp_path / "run")
    for command in (["rollout"], ["score"], ["weigh", "--rule", "fire+length-guard", "-p", "fire.percentile=30"]):
        answer = fire(command[0], run.root, *command[1:])
        assert answer.code == 0, answer.err
    manifest = sealed(run.part("weights", 0, "fire+length-guard"))
    rule = manifest.fields["rule"]
    assert rule["name"] == "fire+length-guard"
    assert [r["name"] for r in rule["rules"]] == ["fire", "length-guard"]
    assert rule["rules"][0]["percentile"] == 30
    assert rule["normalise"] == {"scope": "step", "over": "all", "by": None}
    assert {"fire/threshold", "length-guard/length_limit"} <= manifest.stats["rule"].keys()
    status = fire("status", run.root, "--json").json
    assert "weights/fire+length-guard" in [row["stage"] for row in status]
