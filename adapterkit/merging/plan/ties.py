"""Tied embeddings: apply an adapter's changes to the embedding to the tied head too, as in training."""

from __future__ import annotations

from dataclasses import replace

from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.tied_embeddings import Tie, unknown_tie
from adapterkit.base.vocabulary import input_embeddings
from adapterkit.errors import FitError
from adapterkit.merging.plan.changes import Changes
from adapterkit.merging.plan.edits import Replacement


def apply_to_tied(tie: Tie, changes: Changes, label: str, keeps_tie: bool) -> bool:
    """Apply the changes to the embedding to the head as well, as in training; return whether the two become untied.

    PEFT updates a tied embedding and head separately, except for trained tokens, or with `ensure_weight_tying`
    (`keeps_tie`). Raises FitError if it is unknown whether they are tied.
    """
    touched = [name for name in (tie.embedding, *tie.others) if changes.touches(name)]
    if not touched and not changes.touches(tie.head):
        return False
    if not tie.certain:
        if touched and not tie.stored:
            raise FitError(f"{label}: changes {touched[0]}, and {unknown_tie(tie)}")
        return False  # transformers ties two stored tensors only if the config says so
    if touched and tie.shared:
        _apply_to_shared(tie, changes, label, touched)
    one_layer = _share_layer(tie, changes)
    replaced = changes.replaced.get(tie.embedding, [])
    deltas = changes.deltas.get(tie.embedding, []) if keeps_tie else []
    rows = [
        change
        for change in replaced
        if (tie.follows_tokens if change.rows is not None else one_layer if change.of_base else keeps_tie)
    ]
    alone = len(rows) < len(replaced) or (tie.embedding in changes.deltas and not keeps_tie)
    unties = alone or changes.touches(tie.head)
    if rows and tie.head not in changes.replaced:
        changes.replaced[tie.head] += rows
    if deltas and tie.head not in changes.deltas:
        changes.deltas[tie.head] += [replace(delta, target=replace(delta.target, tensor=tie.head)) for delta in deltas]
    return unties


def _share_layer(tie: Tie, changes: Changes) -> bool:
    """Give embedding and head the layer that the adapter stores of either; return whether they are one in training.

    PEFT stores a layer that was resized, under both names if neither is trained.
    """
    embedding, head = changes.replaced.get(tie.embedding, []), changes.replaced.get(tie.head, [])
    layers = [change for change in head if change.of_base]
    if not any(change.of_base for change in (*embedding, *head)) or not (tie.implied or tie.equal()):
        return False
    if not embedding:
        changes.replaced[tie.embedding] += layers
    elif layers and len(head) == len(embedding) and all(map(_same, embedding, head)):
        del changes.replaced[tie.head]
    return True


def _same(one: Replacement, other: Replacement) -> bool:
    return one.rows == other.rows and one.values.equals(other.values)


def _apply_to_shared(tie: Tie, changes: Changes, label: str, touched: list[str]) -> None:
    """Apply tokens trained in the embedding that an encoder and a decoder share to all tied embeddings.

    PEFT trains tokens in every tied module and resizes all, but trains factors and copies (modules_to_save) in a module
    that such a model does not use. Raises FitError for those, and if it is unknown which embeddings are tied.
    """
    replaced = changes.replaced.get(tie.embedding, [])
    everywhere = bool(replaced) and all(change.rows is not None or change.of_base for change in replaced)
    if touched != [tie.embedding] or changes.deltas.get(tie.embedding) or not everywhere:
        raise shared_embedding_error(tie, label, touched[0])
    for other in tie.others:
        if not tie.equal(other):
            raise shared_embedding_error(tie, label, touched[0])
        changes.replaced[other] += replaced


def check_shared(base: Checkpoint, changes: Changes, label: str) -> None:
    """Check an embedding that an encoder and a decoder share, in a base whose head is not tied to it.

    PEFT then trains a copy for the module named `shared`, while other modules call the original. Raises FitError if the
    adapter has such a copy.
    """
    found = input_embeddings(base.tensors, base.config)
    if len(found) != 1 or not found[0].endswith("shared.weight"):
        return
    [name] = found
    if name in changes.deltas or any(not change.of_base for change in changes.replaced.get(name, ())):
        raise FitError(
            f"{label}: changes {name}, which is shared by an encoder and a decoder in {base.name}: PEFT trains a copy "
            "that not all modules call, which one tensor cannot represent",
            hint="train an adapter without the shared embedding",
        )


def shared_embedding_error(tie: Tie, label: str, name: str) -> FitError:
    """The error for an adapter that changes `name`, an embedding shared by an encoder and a decoder."""
    names = ", ".join(tensor for tensor in (tie.embedding, *tie.others, tie.head) if tensor != name)
    return FitError(
        f"{label}: changes {name}, which may be tied to {names} in {tie.base.name}: merging into embeddings shared by "
        "an encoder and a decoder is not supported, except for trained tokens"
    )
