"""Settings as values: checked when they are made, and back from every form they are written in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import hypothesis.strategies as st
import pytest
from hypothesis import given
from pydantic import Field

from topiarist.core.grammar import OptionError, join_text, split_text
from topiarist.core.options import About, Registered, Settings, changed, given_or_made, options, plain, takes, to_text


@options
class Inner:
    """A method."""

    rank: Annotated[int, Field(gt=0)] = 16
    """Of the update."""
    share: float = 0.5


@options
class Other(Inner):
    """Another method."""

    kind: Literal["full", "lora"] = "full"
    leads = "kind"


TABLE = {"inner": Inner, "other": Other}


@options
class Outer:
    """A command's options."""

    method: Annotated[Inner, Registered(TABLE)] = Inner()
    """Name and settings."""
    refine: Annotated[Inner | None, Settings(Inner)] = None
    recover: Annotated[Other | None, Settings(Other)] = None
    data: str | None = None
    num_windows: Annotated[int, Field(ge=1)] = 128
    device: Annotated[str | None, About(result=False)] = None
    where: Path | None = None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_windows": 0}, "num_windows is 0, should be greater than or equal to 1"),
        ({"num_windows": "many"}, "num_windows is 'many', should be a valid integer"),
        ({"method": "inner:rank=-1"}, "Inner: rank is '-1', should be greater than 0"),
        ({"method": "inner:rang=1"}, "Inner has no field 'rang' (is rank meant?); it has rank, share"),
        ({"method": "nothing"}, "unknown method 'nothing'; choose one of inner, other"),
        ({"method": 3}, "3 is no method"),
        ({"method": Inner}, "is no method: give a value of it"),
        ({"recover": "half"}, "kind is 'half', should be 'full' or 'lora'"),
        ({"refine": "lora"}, "Inner takes field=value"),
        ({"refine": "rank=(2"}, "parenthesis without its partner"),
        ({"refine": 7}, "7 is no Inner"),
        ({"nonsense": 1}, "Outer has no field 'nonsense'"),
        ({"num_windows": 4, "samples": 5}, "given twice"),
    ],
)
def test_a_wrong_setting_is_one_line(settings: dict[str, Any], words: str):
    with pytest.raises(OptionError, match=r"^[^\n]*$") as stop:
        try:
            Outer(**settings)
        except OptionError:
            raise
        except Exception as error:  # what the table raises is a TopiaristError too
            raise OptionError(str(error)) from error
    assert words in str(stop.value)


def test_text_becomes_values():
    value = Outer(method="other:rank=3,kind=lora", refine="share=0.25", recover="lora:rank=8", samples="7", where="a/b")
    assert value == Outer(
        method=Other(rank=3, kind="lora"), refine=Inner(share=0.25), recover=Other(kind="lora", rank=8), num_windows=7,
        where=Path("a/b"),
    )  # fmt: skip
    assert Outer(refine=True).refine == Inner() and Outer(refine=False).refine is None


def test_every_form_leads_back():
    for value in (
        Outer(),
        Outer(method="other:rank=3"),
        Outer(refine=True, recover="lora:rank=8"),
        Outer(num_windows=2),
    ):
        texts = {name: to_text(entry, TABLE if name == "method" else None) for name, entry in changed(value).items()}
        assert Outer(**texts) == value
        said = plain(value)
        assert "device" not in said and Outer(**said) == value
    assert to_text(Outer(recover="lora:rank=8").recover) == "lora:rank=8"
    assert to_text(object()) is None and to_text([1]) is None and to_text(0.1) == "0.1" and to_text(1e-5) == "1e-05"


NAMES = st.text(st.sampled_from("abcxyz_"), min_size=1)
VALUES = st.recursive(
    st.text(st.sampled_from("abc019.-+/"), min_size=1).filter(lambda text: text != "none"),
    lambda inner: st.builds(join_text, NAMES, st.dictionaries(NAMES, inner, min_size=1, max_size=3)),
    max_leaves=4,
)


@given(NAMES, st.dictionaries(NAMES, VALUES, max_size=3))
def test_join_and_split_are_inverse(name: str, fields: dict[str, str]):
    assert split_text(join_text(name, fields)) == (name, fields)


def test_a_function_shows_the_settings_it_takes():
    import inspect

    @takes(Outer)
    def run(model: str, *, options: Outer | None = None, **settings: Any) -> Outer:
        """Run."""
        return given_or_made(Outer, options, settings)

    assert {"method", "refine", "num_windows"} <= set(inspect.signature(run).parameters)
    assert "num_windows" in (run.__doc__ or "") and "Name and settings." in (run.__doc__ or "")
    assert run("m", num_samples=3).num_windows == 3
    with pytest.raises(OptionError, match="not both"):
        run("m", options=Outer(), num_windows=3)


def test_one_edit_adds_an_option(tmp_path: Path):
    """A field of an options value is all it takes: flags, signature, fingerprint and command know it."""
    import inspect

    import typer
    from typer.testing import CliRunner

    from topiarist.cli.from_options import flags, understood
    from topiarist.pipelines.common.reproduce import command
    from topiarist.pipelines.pruning.options import PruneOptions

    @options
    class MoreOptions(PruneOptions):
        sharpen: Annotated[int, Field(ge=0)] = 3
        """Sharpens everything."""

    seen: list[MoreOptions] = []
    text = tmp_path / "text.txt"
    text.write_text("words")

    @takes(MoreOptions)
    def prune(model: str, *, options: MoreOptions | None = None, **settings: Any) -> MoreOptions:
        """Prune."""
        return given_or_made(MoreOptions, options, settings)

    @flags(MoreOptions)
    def prune_command(model: str, options: MoreOptions) -> None:
        """Prune."""
        seen.append(options)

    app = typer.Typer()
    app.command()(prune_command)
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    assert "--sharpen" in shown and "sharpens everything (default: 3)" in shown
    words = understood(
        ["m", "--sharpen", "5", "--refine", "--correct", "share=0.5", "--calibration", str(text)], [MoreOptions]
    )
    assert CliRunner().invoke(app, words).exit_code == 0
    assert seen[0].sharpen == 5 and seen[0].refine is not None and seen[0].correct is not None
    assert inspect.signature(prune).parameters["sharpen"].default == 3 and prune("m", sharpen=5).sharpen == 5
    assert plain(seen[0])["sharpen"] == 5
    said, unsaid = command("prune", "m", seen[0])
    assert said[said.index("--sharpen") + 1] == "5" and not unsaid
    assert command("prune", "m", MoreOptions())[0] == ["topiarist", "prune", "m", "OUT"]
