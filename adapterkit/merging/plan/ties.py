"""Tied embeddings: the head follows what an adapter changes in the embedding, as it did in training."""

from __future__ import annotations

from dataclasses import replace

from adapterkit.base.ties import Tie, unknown_tie
from adapterkit.errors import FitError
from adapterkit.merging.plan.changes import Changes


def follow(tie: Tie, mine: Changes, label: str, keeps: bool) -> bool:
    """Have the head follow one adapter's changes to the embedding as it did in training; whether the two part.

    There PEFT updates a tied embedding and head apart, except for trained tokens, and with `keeps`
    (`ensure_weight_tying`). Raises FitError where it cannot be known whether they are tied.
    """
    touched = [name for name in (tie.embedding, *tie.others) if mine.touch(name)]
    if not touched and not mine.touch(tie.head):
        return False
    if not tie.certain:
        if touched and not tie.stored:
            raise FitError(f"{label}: changes {touched[0]}, and {unknown_tie(tie)}")
        return False  # transformers ties two stored tensors only where it is told to
    if touched and tie.shared:
        _follow_shared(tie, mine, label, touched)
    if keeps and tie.stored and not tie.equal():  # PEFT ties what is one tensor; trained tokens go by the config alone
        keeps = False
    replaced, deltas = mine.replaced.get(tie.embedding, []), mine.deltas.get(tie.embedding, []) if keeps else []
    rows = [change for change in replaced if keeps or change.rows is not None]
    alone = len(rows) < len(replaced) or (tie.embedding in mine.deltas and not keeps)
    parts = alone or mine.touch(tie.head)
    if rows and tie.head not in mine.replaced:
        mine.replaced[tie.head] += rows
    if deltas and tie.head not in mine.deltas:
        mine.deltas[tie.head] += [replace(one, target=replace(one.target, tensor=tie.head)) for one in deltas]
    return parts


def _follow_shared(tie: Tie, mine: Changes, label: str, touched: list[str]) -> None:
    """Have an encoder's and a decoder's embeddings follow the tokens that were trained in the one they share.

    PEFT trains those in all that are tied, but factors and whole tensors in a module that such a model does not use.
    Raises FitError for them, and where it is not known what is tied.
    """
    changes = mine.replaced.get(tie.embedding, [])
    only_rows = bool(changes) and all(change.rows is not None for change in changes)
    if touched != [tie.embedding] or mine.deltas.get(tie.embedding) or not only_rows:
        raise refuse_shared(tie, label, touched[0])
    for other in tie.others:
        if not tie.equal(other):
            raise refuse_shared(tie, label, touched[0])
        mine.replaced[other] += changes


def refuse_shared(tie: Tie, label: str, name: str) -> FitError:
    """Explain that an adapter cannot be merged that changes `name`."""
    names = ", ".join(one for one in (tie.embedding, *tie.others, tie.head) if one != name)
    return FitError(
        f"{label}: changes {name}, which may be one with {names} in {tie.base.name}: merging into embeddings that an "
        "encoder and a decoder share is not supported, except for trained tokens"
    )
