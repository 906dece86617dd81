"""Files of a plan made one by one, in any order and in another process, equal a run of the whole plan."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, factors
from handmade import contents

import adapterkit
from adapterkit import MergePlan, RunOptions, finish, run_file
from adapterkit.errors import ChangedError, FitError
from adapterkit.merging.blocks import device
from adapterkit.merging.plan.edits import MergeEdit, RestoreEdit
from adapterkit.merging.receipts.finished_file import FileDone
from adapterkit.merging.run.builder import FileBuilder, Job
from adapterkit.merging.run.device import Place
from adapterkit.merging.run.run import run
from adapterkit.merging.run.worker import Worker

FOUR = RunOptions(threads=4)


@pytest.fixture(scope="module")
def child() -> Iterator[ProcessPoolExecutor]:
    """A spawned process, which shares nothing with this one."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield pool


@pytest.fixture
def base(make_base: Callable[..., Path]) -> Path:
    """Three files, the last one unchanged."""
    shapes = {f"layers.{i}.{n}.weight": (12, 8) for i in range(2) for n in "qkv"} | {"z.a": (4, 8), "z.b": (4, 8)}
    return make_base({name: torch.randn(*shape).bfloat16() for name, shape in shapes.items()}, shards=3)


@pytest.fixture
def adapter(make_adapter: Callable[..., Path]) -> Path:
    return make_adapter({n: t for i in range(2) for m in "qv" for n, t in factors(f"layers.{i}.{m}", 12, 8).items()})


def made(plan: MergePlan, where: Path, child: ProcessPoolExecutor, options: RunOptions = FOUR) -> list[FileDone]:
    """Make every file of the plan, the last one first, each by a call in another process."""
    return [child.submit(run_file, plan, file, where, options).result() for file in reversed(plan.files)]


@pytest.mark.parametrize("how", [{}, {"receipt": False}, {"report": True, "link": True}], ids=str)
def test_files_made_one_by_one_equal_a_run(
    base: Path, adapter: Path, tmp_path: Path, child: ProcessPoolExecutor, how: dict[str, bool]
) -> None:
    options = replace(FOUR, **how)
    plan = adapterkit.plan_merge(base, [(adapter, 0.5)], tmp_path / "out")
    where = tmp_path / "made"
    where.mkdir()
    done = made(plan, where, child, options)
    result = finish(plan, done, where, options)
    plan = adapterkit.plan_merge(base, [(adapter, 0.5)], tmp_path / "out")  # after links were made to the base
    *_, expected = run(plan, options)
    assert result == expected and contents(where) == contents(tmp_path / "out")
    if options.receipt:
        undo = adapterkit.plan_unmerge(where, tmp_path / "again", adapters=[adapter])
        assert isinstance(undo, MergePlan)
        (tmp_path / "again").mkdir()
        finish(undo, made(undo, tmp_path / "again", child), tmp_path / "again", FOUR)
        assert contents(tmp_path / "again") == contents(base)


def test_a_single_file_is_made_with_its_receipt_beside_it(tmp_path: Path, child: ProcessPoolExecutor) -> None:
    base = FIXTURES / "bases" / "tiny-llama" / "model.safetensors"
    plan = adapterkit.plan_merge(base, [FIXTURES / "tiny-dora"], tmp_path / "out.safetensors")
    *_, expected = run(plan, FOUR)
    (tmp_path / "made").mkdir()
    where = tmp_path / "made" / "new"
    assert finish(plan, made(plan, where, child), where, FOUR) == expected
    assert where.read_bytes() == plan.out.read_bytes()
    assert contents(where.with_name("receipt")) == contents(tmp_path / "out.safetensors.receipt")


def test_a_plan_of_some_files_runs(base: Path, adapter: Path, tmp_path: Path) -> None:
    """`run_file` needs no other file than its own, whatever else is in the plan."""
    plan = adapterkit.plan_merge(base, [adapter], tmp_path / "out")
    some = replace(plan, files=plan.files[1:2])
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    assert run_file(some, plan.files[1], tmp_path / "a", FOUR) == run_file(plan, plan.files[1], tmp_path / "b", FOUR)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert not (tmp_path / "out").exists()


def test_finish_refuses_missing_or_foreign_files(base: Path, adapter: Path, tmp_path: Path) -> None:
    plan, where = adapterkit.plan_merge(base, [adapter], tmp_path / "out"), tmp_path / "made"
    other, twice = tmp_path / "other", adapterkit.plan_merge(base, [(adapter, 2.0)], tmp_path / "out")
    where.mkdir(), other.mkdir()
    done = [run_file(plan, file, where, FOUR) for file in plan.files]
    foreign = run_file(twice, twice.files[0], other, FOUR)
    before = contents(where)
    for given, said in (
        (done[1:], f"{done[0].name}: missing or incomplete"),
        ([foreign, *done[1:]], f"{done[0].name}: made from another plan"),
        ([*done, replace(done[0], name="extra.safetensors")], "extra.safetensors: not a file of this plan"),
    ):
        with pytest.raises(FitError, match=said):
            finish(plan, given, where, FOUR)
    with pytest.raises(FitError, match="with other options"):
        finish(plan, done, where, replace(FOUR, receipt=False))
    assert contents(where) == before
    (where / done[1].name).unlink()
    with pytest.raises(FitError, match=f"{done[1].name}: missing or incomplete"):
        finish(plan, done, where, FOUR)


def test_an_input_that_changed_since_the_plan_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    plan, where = adapterkit.plan_merge(base, [adapter], tmp_path / "out"), tmp_path / "made"
    where.mkdir()
    first, second, _ = plan.files
    done = run_file(plan, first, where, FOUR)
    raw = bytearray(second.source.read_bytes())
    raw[-1] ^= 1
    second.source.write_bytes(raw)
    with pytest.raises(ChangedError, match=second.name):
        run_file(plan, second, where, FOUR)
    with pytest.raises(ChangedError, match=second.name):
        finish(plan, [done], where, FOUR)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_plans_and_records_are_plain_data(base: Path, adapter: Path, tmp_path: Path, quantize: str | None) -> None:
    plan = adapterkit.plan_merge(base, [adapter], tmp_path / "out", quantize=quantize)
    assert pickle.loads(pickle.dumps(plan)) == plan
    done = run_file(plan, plan.files[0], tmp_path, replace(FOUR, accept_loss=True))
    assert pickle.loads(pickle.dumps(done)) == FileDone.from_json(json.loads(json.dumps(done.to_json()))) == done
    assert done.retention and done.size == (tmp_path / done.name).stat().st_size
    assert {type(edit) for file in plan.files for edit in file.edits} == {MergeEdit}
    if quantize is None:
        undo = adapterkit.plan_unmerge(adapterkit.merge(base, [adapter], tmp_path / "out").out, tmp_path / "again")
        assert isinstance(undo, MergePlan)
        assert {type(edit) for file in undo.files for edit in file.edits} == {RestoreEdit}
        again = pickle.loads(pickle.dumps(undo))
        assert replace(again, write_companions=None) == replace(undo, write_companions=None)


def test_an_edit_without_blocks_does_not_keep_a_file_open(base: Path, adapter: Path, tmp_path: Path) -> None:
    """A tensor of zero bytes has nothing to restore; if the file waited for it, the run would hang."""
    plan = adapterkit.plan_merge(base, [adapter], tmp_path / "out")
    empty = RestoreEdit("empty", None, "BF16", (0, 4), plan.files[0].size, plan.files[0].size)
    file = replace(plan.files[0], edits=(*plan.files[0].edits, empty))
    place, where = Place(), tmp_path / "made"
    place.device = device.CPU
    where.mkdir()
    done: list[FileDone] = []
    with ThreadPoolExecutor(1) as writers:
        worker = Worker(writers)
        builder = FileBuilder(Job(plan, where, RunOptions()), file, lambda _: None, lambda _, one: done.append(one))
        while builder.input.left:
            builder.hash_next(worker)
        for piece in builder.pieces:
            builder.make(piece, place, worker)
        worker.release()
    assert len(done) == 1
