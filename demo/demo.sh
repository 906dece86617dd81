#!/usr/bin/env bash
# Teach a small model to answer with function calls, merge what it learned, measure it, and take it out again.
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

echo "400 requests and the calls that answer them, and 32 others to test with:"
run python demo/commands.py "$work/data"
head -n 2 "$work/data/train.jsonl"

printf '\nThe base model knows nothing of such calls:\n'
run python demo/ask.py "$base" "$prompt" --line
run adapterkit eval "$base" "$work/data/test.jsonl"

printf '\nTrain an adapter, which takes about a minute:\n'
run adapterkit train "$base" "$work/data/train.jsonl" -o "$work/adapter" \
    --targets all-linear --epochs 2 --lr 1e-3 --eval-data "$work/data/test.jsonl"

printf '\nWhat is in it, and does it fit?\n'
run adapterkit inspect "$work/adapter" --against "$base"

printf '\nMerge it into the base:\n'
run adapterkit merge "$base" "$work/adapter" -o "$work/merged" --report

printf '\nThe merged model makes calls of requests that it never saw:\n'
run python demo/ask.py "$work/merged" "$prompt" --line
run adapterkit eval "$work/merged" "$work/data/test.jsonl"

printf '\nAnd back: the merge left a receipt, by which every file of the base comes out again as it was.\n'
run adapterkit unmerge "$work/merged" -o "$work/again" --adapter "$work/adapter"
run cmp "$base/model.safetensors" "$work/again/model.safetensors"
