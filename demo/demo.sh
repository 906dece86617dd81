#!/usr/bin/env bash
# Teach a small model to answer with function calls, measure it, merge the adapter, and undo the merge.
set -euo pipefail

PATH="$PWD/.venv/bin:$PATH"
cache=${ADAPTERKIT_CACHE:-.cache}
base=$cache/SmolLM2-135M-Instruct
work=$cache/demo
rm -rf "$work"

# Print a command as a reader could copy it, then run it.
run() {
    printf '\n$'
    printf ' %q' "$@"
    printf '\n'
    "$@"
}

prompt=$'On Friday at 6:45pm I have to call Ada, don\'t let me forget\n'

echo "400 requests with their calls, and 32 more for testing:"
run python demo/commands.py "$work/data"
head -n 2 "$work/data/train.jsonl"

printf '\nThe base model does not know these calls:\n'
run python demo/ask.py "$base" "$prompt" --line
run adapterkit eval "$base" "$work/data/test.jsonl"

printf '\nTrain an adapter (about a minute):\n'
run adapterkit train "$base" "$work/data/train.jsonl" -o "$work/adapter" \
    --targets all-linear --epochs 2 --lr 1e-3 --eval-data "$work/data/test.jsonl"

printf '\nInspect it, and check that it fits the base:\n'
run adapterkit inspect "$work/adapter" --against "$base"

printf '\nMerge it into the base:\n'
run adapterkit merge "$base" "$work/adapter" -o "$work/merged" --report

printf '\nThe merged model answers requests that it never saw:\n'
run python demo/ask.py "$work/merged" "$prompt" --line
run adapterkit eval "$work/merged" "$work/data/test.jsonl"

printf '\nUndo the merge: the receipt restores every file of the base, bit for bit:\n'
run adapterkit unmerge "$work/merged" -o "$work/again" --adapter "$work/adapter"
run cmp "$base/model.safetensors" "$work/again/model.safetensors"
