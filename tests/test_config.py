"""FluxConfig: what it accepts, what it refuses, and that its JSON and hash are stable."""

import dataclasses
import subprocess
import sys

import pytest

from fluxcompile.config import BLOCKS, FluxConfig
from fluxcompile.errors import ConfigError
from fluxcompile.kernels import validation

ALTERED = {
    "sparse": "triangle",
    "sink": 64,
    "local": 512,
    "pool_size": 16,
    "decode": "dense",
    "retrieval": "xattention",
    "stride": 8,
    "threshold": 0.5,
    "block": 64,
    "last": 7,
    "prefix_size": 0,
    "suffix_size": 12,
    "segments": "separate",
    "heads": "each",
    "standardize": True,
}


def test_defaults_are_the_methods():
    assert FluxConfig().to_dict() == {
        "sparse": "streaming",
        "sink": 128,
        "local": 2048,
        "pool_size": 100,
        "decode": "sparse",
        "retrieval": "full",
        "stride": 16,
        "threshold": 0.9,
        "block": 128,
        "last": 128,
    }


def test_what_the_paper_lacks_is_written_only_where_it_is_used():
    """A router of the paper's has the fields and the hash that it had before there were others."""
    paper = FluxConfig().to_dict()
    assert "segments" not in paper
    assert FluxConfig.from_dict({**paper, "segments": "joint", "prefix_size": None}) == FluxConfig()
    used = FluxConfig(suffix_size=16, standardize=True).to_dict()
    assert {name: used[name] for name in used.keys() - paper.keys()} == {
        "suffix_size": 16,
        "standardize": True,
    }


def test_ends_of_the_prompt():
    assert FluxConfig().pooling == (100, 100, False, False)
    config = FluxConfig(pool_size=50, suffix_size=16, segments="separate", heads="each")
    assert config.pooling == (50, 16, True, True)
    assert config.pooling.features(64, heads=9) == 2 * 9 * 64
    assert FluxConfig(prefix_size=0, segments="separate").pooling.features(64, None) == 64


def test_every_choice_is_accepted():
    for mode in ("streaming", "xattention", "triangle", "power"):
        assert FluxConfig(sparse=mode).sparse == mode
    for block in BLOCKS:
        assert FluxConfig(block=block).block == block
    assert BLOCKS == validation.BLOCKS  # what the kernels take


def test_frozen_and_hashable():
    config = FluxConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.sink = 1
    assert len({config, FluxConfig(), FluxConfig(sink=1)}) == 2


@pytest.mark.parametrize(
    "config", [FluxConfig(), FluxConfig(**ALTERED)], ids=["default", "altered"]
)
def test_round_trips(config):
    assert FluxConfig.from_json(config.to_json()) == config
    assert FluxConfig.from_dict(config.to_dict()) == config


def test_absent_fields_take_defaults():
    assert FluxConfig.from_dict({"sink": 64}) == FluxConfig(sink=64)


SPARSE = "'streaming', 'xattention', 'triangle', 'power'"


@pytest.mark.parametrize(
    ("fields", "expected", "got"),
    [
        ({"sparse": "dilated"}, SPARSE, "'dilated'"),
        (
            {"sparse": ["streaming"]},
            "'streaming', 'xattention', 'triangle', 'power'",
            "['streaming']",
        ),
        ({"decode": "fast"}, "'sparse', 'dense'", "'fast'"),
        ({"retrieval": "streaming"}, "'full', 'xattention'", "'streaming'"),
        ({"sink": 0}, "an int >= 1", "0"),
        ({"local": -5}, "an int >= 1", "-5"),
        ({"pool_size": 0}, "an int >= 1", "0"),
        ({"sink": 1.5}, "an int >= 1", "1.5"),
        ({"sink": True}, "an int >= 1", "True"),
        ({"local": "2048"}, "an int >= 1", "'2048'"),
        ({"last": None}, "an int >= 1", "None"),
        ({"stride": 0}, "an int >= 1", "0"),
        ({"threshold": 0}, "a number in (0, 1]", "0"),
        ({"threshold": 1.01}, "a number in (0, 1]", "1.01"),
        ({"threshold": float("nan")}, "a number in (0, 1]", "nan"),
        ({"threshold": "0.9"}, "a number in (0, 1]", "'0.9'"),
        ({"block": 24}, "a multiple of stride (16)", "24"),
        ({"block": 256}, "one of (16, 32, 64, 128)", "256"),
        ({"prefix_size": -1}, "an int >= 0, or None for pool_size", "-1"),
        ({"suffix_size": True}, "an int >= 0, or None for pool_size", "True"),
        ({"suffix_size": 0, "prefix_size": 0}, "an int >= 1 (prefix_size is 0)", "0"),
        ({"segments": "both"}, "'joint', 'separate'", "'both'"),
        ({"heads": 4}, "'mean', 'each'", "4"),
        ({"standardize": 1}, "True or False", "1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_fields_say_expected_and_got(fields, expected, got):
    with pytest.raises(ConfigError) as caught:
        FluxConfig(**fields)
    message = str(caught.value)
    assert f"FluxConfig.{next(iter(fields))}" in message
    assert expected in message
    assert message.endswith(f"got {got}")


def test_unknown_fields_are_named_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'sink'.*got unknown \['sinks', 'temperature'\]"):
        FluxConfig.from_dict({"sinks": 1, "temperature": 2, "local": 3})


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "null", '{"sink": NaN}', "[" * 100_000])
def test_bad_json_is_a_config_error(text):
    with pytest.raises(ConfigError, match=r"expected .*got"):
        FluxConfig.from_json(text)


def test_hash_follows_every_field():
    hashes = {FluxConfig(**{name: value}).stable_hash() for name, value in ALTERED.items()}
    assert len(hashes | {FluxConfig().stable_hash()}) == len(ALTERED) + 1
    assert FluxConfig(threshold=1).stable_hash() == FluxConfig(threshold=1.0).stable_hash()


def test_hash_is_the_same_in_another_process():
    script = "from fluxcompile.config import FluxConfig; print(FluxConfig(sink=7).stable_hash())"
    out = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "12345", "PYTHONPATH": ":".join(sys.path)},
    )
    assert out.stdout.strip() == FluxConfig(sink=7).stable_hash()
