"""The examples do what they say."""

import importlib.util
import pathlib

import pytest

from groupconv.perf_reports import advise

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_train_digits(tmp_path, capsys):
    """The loss falls, and to the bit the same way."""
    apart = example("train_digits").main(
        ["--device", "cpu", "--steps", "40", "--batch", "64", "--width", "32", "--groups", "8", "--out", str(tmp_path)]
    )
    assert apart == 0
    lines = (tmp_path / "digits.csv").read_text().splitlines()
    assert lines[0] == "step,plain,converted,enabled"
    losses = [float(line.split(",")[1]) for line in lines[1:]]
    assert len(losses) == 40
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert "2 of 7 convolutions by groupconv" in capsys.readouterr().out
    assert (tmp_path / "digits.png").stat().st_size > 10_000


@pytest.mark.timeout(300)
def test_own_model(tmp_path, capsys):
    """Its layers are listed, tuned against a pretended clock, and advised on."""
    module = example("own_model")
    assert module.main(["--batch", "2", "--size", "32", "--budget-seconds", "5", "--out", str(tmp_path)]) == 0
    layers = [line.split(",") for line in (tmp_path / "layers.csv").read_text().splitlines()]
    assert layers[0] == module.COLUMNS
    assert [layer[0] for layer in layers[1:]] == ["depthwise", "grouped"]
    assert list((tmp_path / "tuned").glob("*.json"))
    rows = [row.split(",") for row in (tmp_path / "advise.csv").read_text().splitlines()]
    assert {row[rows[0].index("layer")] for row in rows[1:]} == {"depthwise", "grouped"}
    assert rows[0] == list(advise.FIELDS)
    capsys.readouterr()
