"""fastlora, PEFT and the frozen layer, measured side by side: ``make bench``.

An absolute time says nothing on a shared machine, so every time is a ratio, taken in pairs: a
round runs the frozen layer, fastlora and PEFT in turn on the same tensors (``rounds.py``), and
gives one ratio each; what is reported is the median of the rounds' ratios, with quartiles.
"Frozen" is ``nn.Linear`` with no adapter: its forward and its dx.

Before a row is timed, fastlora's results, and PEFT's without dropout, are compared with the
float64 oracle (``fastlora.reference``),
and the bytes that it saves for backward are counted.  A wrong result or a byte too many fails the
test; a missed time is marked in the table, and fails only with ``--strict-targets``.

    make bench                                  everything, about 8 minutes on 2 cores
    make bench ARGS="-k quick"                  tiny shapes, seconds: does the suite still work?
    make bench ARGS="-k 2048x2048x2048-bf16"    some rows
    make bench ARGS=--save-results              also benchmarks/results/<device>/<date>.json
    python benchmarks/report.py <file.json>     that file as Markdown

A row's id is [name-]MxKxN-dtype[-f32adapter]-r-p, with several parts in N for a group of
projections of one x.  The suite measures the CPU; it starts no GPU.
"""
