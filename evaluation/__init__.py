"""The commands of eval.py, a module each, and what they share.

generate.py      continues token ids, in ragged batches over a cache of keys and values
prompts.py       reads prompts of any form and encodes them
answers.py       `generate`: answers to prompts, in files that several processes write
likelihood.py    `likelihood`: log-probs of preference pairs
scores.py        `score`: BLEU-4 and ROUGE
benchmarks.py    `mt-bench answer`, `arena-hard answer`; questions and answers
judge.py         `... judge`: verdicts of a judge behind an endpoint
reports.py       `... report`: scores with intervals
tables.py        `tables`: the paper's tables, models side by side
figures.py       `figures`: the paper's figures, and the curves of a run
rows.py          rows of JSON in and out; intervals.py: the bootstrap
"""
