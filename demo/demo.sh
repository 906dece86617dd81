#!/usr/bin/env bash
# Merge an adapter that teaches a small model SQL: look at it, merge it, ask the same question before and after.
set -euo pipefail

PATH="$PWD/.venv/bin:$PATH"
cache=${ADAPTERKIT_CACHE:-.cache}
base=$cache/SmolLM2-135M-Instruct
adapter=fixtures/smollm2-wikisql
merged=$cache/demo-merged
again=$cache/demo-again
rm -rf "$merged" "$again"

# Print a command as a reader could copy it, then run it.
run() {
    printf '\n$'
    printf ' %q' "$@"
    printf '\n'
    "$@"
}

# A question from the test split: its table was never seen in training.
prompt='table: 1-10548224-1
columns: Year, Game or event, Date contested, League or governing body, Sport, Winning team, Losing team, Final score
Q: What was the final score for the game that was contested on February 1, 2009?
A:'

echo "What is in this adapter? Only its header and its small factors are read."
run adapterkit inspect "$adapter"

printf '\nDoes it fit the base model?\n'
run adapterkit inspect "$adapter" --against "$base"

printf '\nWhat would a merge do? A dry run checks everything and writes nothing.\n'
run adapterkit merge "$base" "$adapter" -o "$merged" --dry-run

printf '\nThe base model, asked a question about a table, makes up an answer:\n'
run python demo/ask.py "$base" "$prompt" --line

printf '\nMerge for real:\n'
run adapterkit merge "$base" "$adapter" -o "$merged" --report

printf '\nThe merged model, asked the same, writes the SQL query that answers it:\n'
run python demo/ask.py "$merged" "$prompt" --line

printf '\nAnd back: the merge left a receipt, by which every file of the base comes out again as it was.\n'
run adapterkit unmerge "$merged" -o "$again" --adapter "$adapter"
run cmp "$base/model.safetensors" "$again/model.safetensors"
