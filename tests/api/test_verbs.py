"""Every verb has the same shape: one options class, a plan that prints and writes nothing, and a run of events."""

from __future__ import annotations

import inspect
import json
import pickle
from collections.abc import Iterator
from dataclasses import KW_ONLY, FrozenInstanceError, dataclass, fields
from pathlib import Path
from typing import Any

import click
import pytest
from handmade import Outcome, contents, write_adapter, write_base
from handmade import adapterkit as run_adapterkit

import adapterkit
from adapterkit.api.options.merges import MergeRunOptions
from adapterkit.cli.main import COMMANDS, group
from adapterkit.cli.options import options_of
from adapterkit.errors import UsageError
from adapterkit.options import Options, argument, option, output, parameters, takes
from adapterkit.tui.actions import ACTIONS, form_of

# Verb -> what is given to it, in a folder that has all of that.
VERBS: dict[str, list[str]] = {
    "merge": ["base", "one", "two:0.5"], "quantize": ["base", "--to", "nf4"], "unmerge": ["merged"],
    "combine": ["one", "two", "--method", "ties"], "resize": ["one", "--rank", "2"],
    "convert": ["one", "--to", "rslora"], "extract": ["base", "merged", "--rank", "2"],
}  # fmt: skip


@dataclass(frozen=True)
class ToyOptions(Options):
    """A toy."""

    adapters: AnyAdapters = argument("What to play with.")  # type: ignore[name-defined]  # noqa: F821
    out: str = output()
    _: KW_ONLY
    colour: str = option("red", "Colour.", ("red", "blue"))
    big: bool = option(False, "Large.")
    safe: bool = option(True, "Leave the edges sharp.")
    parts: dict[str, float] | None = option(None, "Parts.", example="wheel=2")


@takes(ToyOptions)
def play(o: ToyOptions) -> ToyOptions:
    """Play."""
    return o


def test_a_field_defines_a_keyword_an_option_and_a_form_field() -> None:
    names = [one.name for one in fields(ToyOptions)]
    assert list(inspect.signature(play).parameters) == names
    assert play.__doc__ is not None and play.__doc__.startswith("Play.\n\nArgs:\n    adapters: What to play with")
    assert "    colour: Colour (red or blue).\n" in play.__doc__
    given: list[dict[str, Any]] = []
    command = click.command()(_toy(given))
    assert [param.name for param in command.params] == names
    args = ["a:0.5", "b", "-o", "x", "--colour", "blue", "--big", "--no-safe", "--parts", "wheel=2"]
    command.main(args, standalone_mode=False)
    told = {
        "adapters": [("a", 0.5), ("b", 1.0)],
        "out": "x",
        "colour": "blue",
        "big": True,
        "safe": False,
        "parts": {"wheel": 2.0},
    }
    assert given == [told] and play(**told) == ToyOptions(**told)
    command.main(["a", "-o", "x"], standalone_mode=False)
    assert given[1:] == [{"adapters": [("a", 1.0)], "out": "x"}]  # the others have their defaults from the table
    asked = [(one.name, one.kind, one.default, one.needed) for one in form_of(ToyOptions)]
    assert asked == [
        ("adapters", "words", "", True), ("-o", "text", "", True), ("--colour", "choice", "red", False),
        ("--big", "flag", "", False), ("--no-safe", "flag", "", False), ("--parts", "words", "", False),
    ]  # fmt: skip
    with pytest.raises(UsageError, match=r"colour 'blu': expected one of red, blue; did you mean blue\?"):
        play("a", "x", colour="blu")
    with pytest.raises(TypeError, match="color"):
        play("a", "x", color="blue")  # type: ignore[call-arg]
    with pytest.raises(FrozenInstanceError):
        play("a", "x").colour = "blue"  # type: ignore[misc]


def _toy(given: list[dict[str, Any]]) -> Any:
    @options_of(ToyOptions)
    def toy(**values: Any) -> None:
        given.append(values["given"])

    return toy


@pytest.mark.parametrize("verb", [*VERBS, "pull", "push", "verify", "inspect", "list", "compare", "eval"])
def test_call_command_and_form_have_the_same_options(verb: str) -> None:
    one_call = getattr(adapterkit, {"list": "list_adapters", "eval": "evaluate"}.get(verb, verb))
    call = getattr(adapterkit, f"plan_{verb}", one_call)
    known = {one.name: one for one in parameters(call.options)}
    assert set(inspect.signature(call).parameters) == set(known)
    command = group.get_command(click.Context(group), verb)
    assert command is not None and verb in COMMANDS
    params = {param.name: param for param in command.params}
    more = {
        "dry_run",
        "as_json",
        "by",
        "modules",
        "paths",
        "plot",
        "recipe",
        *(one.name for one in parameters(MergeRunOptions)),
    }
    assert {name for name, one in known.items() if one.about.in_cli} == params.keys() - (more - known.keys())
    for name, one in known.items():
        if name in params:
            assert params[name].opts == list(one.flags or [name]), name
            assert params[name].required is (one.required and "recipe" not in params)  # a recipe may have it
    if verb in ACTIONS:
        asked = [field.name for field in ACTIONS[verb].fields]
        assert asked == [(one.flags or (one.name,))[0] for one in known.values() if one.about.in_form]
    assert set(known) <= set(inspect.signature(one_call).parameters)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all files that `VERBS` use."""
    folder = tmp_path_factory.mktemp("verbs")
    base = write_base(folder / "base")
    for name in ("one", "two"):
        write_adapter(folder / name)
    adapterkit.merge(base, [folder / "one"], folder / "merged")
    return folder


@pytest.mark.parametrize("verb", VERBS)
def test_a_plan_prints_pickles_and_runs_as_events(verb: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    before = contents(folder)

    def command(*more: str) -> Outcome:
        return run_adapterkit(verb, *VERBS[verb], "-o", f"out-{verb}", *more)

    shown, facts = command("--dry-run"), json.loads(command("--dry-run", "--json").out)
    assert shown.code == 0, shown
    assert f"writes    out-{verb}" in shown.out and shown.out.endswith("Dry run: nothing written\n")
    assert facts["output"] == f"out-{verb}" and contents(folder) == before
    plans: list[Any] = []

    def noted(plan: Any, **_: Any) -> Iterator[Any]:
        plans.append(plan)
        yield from ()

    monkeypatch.setattr("adapterkit.cli.run_plan.run", noted)
    with pytest.raises(AssertionError, match="ends with its result"):
        command()
    [plan] = plans
    assert str(plan).splitlines()[0] == shown.out.splitlines()[0] and contents(folder) == before
    *events, last = _frozen(adapterkit.run(pickle.loads(pickle.dumps(plan))))
    assert events and [event.done for event in events] == sorted(event.done for event in events)
    assert last.out == Path(f"out-{verb}") and last.out.exists()


def _frozen(events: Iterator[Any]) -> Iterator[Any]:
    """Return the events, checked to be of frozen types."""
    for event in events:
        assert type(event).__dataclass_params__.frozen
        yield event


def test_combining_refuses_options_of_merges(folder: Path, tmp_path: Path) -> None:
    plan = adapterkit.plan_resize(folder / "one", tmp_path / "out", rank=2)
    with pytest.raises(UsageError, match="unexpected option `threads`"):
        adapterkit.run(plan, threads=2)  # type: ignore[call-overload]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["report", "resume", "receipt", "link", "accept_loss"])
def test_unmerging_refuses_options_that_only_merging_has(name: str, folder: Path, tmp_path: Path) -> None:
    plan = adapterkit.plan_unmerge(folder / "merged", tmp_path / "out", adapters=[folder / "one"])
    with pytest.raises(UsageError, match=f"unexpected option `{name}`"):
        adapterkit.run(plan, **{name: name != "receipt"})
    assert not (tmp_path / "out").exists()
    *_, last = adapterkit.run(plan, threads=1, device="cpu", receipt=True)  # as by default
    assert last.out == tmp_path / "out"
