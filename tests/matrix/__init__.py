"""Every architecture of transformers × the recipes of adapters, judged by PEFT's logits.

    python -m tests.matrix                        all, into results.json and docs/architectures.md (`make matrix`)
    python -m tests.matrix qwen3_moe causal/t5    these model types (of one task), and print the verdicts
    python -m tests.matrix gemma3 --recipe saved --untied --keep /tmp/look
                                                  one recipe; the base, adapter and output stay in the folder

`models` has the tiny models, `recipes` the adapters, `trial` one base × one recipe, `page` the page of the results.
"""
