"""README, CONTRIBUTING and docs/: their text, code, tables, and the numbers of results files.

``python tests/support/pages.py`` rewrites all tables, and the sentences that repeat numbers of a
results file (``sentences``).  A table is the output of the command in the comment above it:

    <!-- benchmarks/report.py FILE -->

    | … |

So a new results file only needs a new name in that comment.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, CONTRIBUTING, ROOT / "benchmarks/README.md", *DOCS]
TABLE = re.compile(
    r"<!-- ((?:benchmarks|examples|tools/\w+)/\w+\.py[^\n]*?) -->\n\n(.*?)\n(?=\n|\Z)", re.S
)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
# The pages without fenced code, whose links and line lengths are not checked.
PROSE = {page: _FENCE.sub("", page.read_text()) for page in PAGES}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks_of(page: Path, language: str = "") -> list[str]:
    """The fenced blocks of a language; "" stands for blocks without a language."""
    return [code for name, code in _FENCE.findall(page.read_text()) if name == language]


def code_of(page: Path) -> list[str]:
    """All text in backticks, and all fenced blocks without a language."""
    return re.findall(r"`([^`\n]+)`", PROSE[page]) + blocks_of(page)


def printed_by(command: str) -> str:
    result = subprocess.run(
        [sys.executable, *command.split()], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return result.stdout.strip()


def tiny_tokenizer():
    """A tokenizer with a token for each byte, and ChatML's tokens."""
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(BPE({c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, []))
    words.pre_tokenizer, words.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|im_end|>")


def save_tiny_model(folder: Path) -> Path:
    """A tiny model in this folder, under the name of the model on the Hub that pages load.

    It needs no test package, because the release check calls it in an environment without them.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, **heads, vocab_size=len(tokenizer))
    name = folder / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
    tokenizer.save_pretrained(name)
    LlamaForCausalLM(config).save_pretrained(name)
    return name


def report_of(page: str, kind: str) -> dict:
    """The results file of this kind that the page links."""
    [name] = set(re.findall(rf"results/[\w-]+/{kind}-[\d-]+\.json", (ROOT / page).read_text()))
    return json.loads((ROOT / "benchmarks" / name).read_text())


def less(ratio: float) -> str:
    """A ratio below 1 as the percentage that it saves: "27" for 0.73."""
    return f"{100 * (1 - ratio):.0f}"


def numbers_of(report: dict, side: str) -> tuple[str, str]:
    """How much less step time a side takes than PEFT, and how much less its memory grows, in %."""
    growth = [report["results"][name]["peak_memory_growth"] for name in (side, "PEFT")]
    return less(report["step_time_over_peft"][side]["median"]), less(growth[0] / growth[1])


def medians_of(page: str, kind: str, quantity: str, *ratios: str) -> list[list[float]]:
    """The median ratios of each row of the results file of this kind that the page links."""
    rows = [row["ratios"][quantity] for row in report_of(page, kind)["rows"]]
    return [[row[ratio][1] for ratio in ratios] for row in rows]


def sentences() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """For each sentence: its page, a pattern with one group for each number, and the numbers."""
    demo = report_of("README.md", "demo")
    yield "README.md", r'make demo ARGS="--steps (\d+)"', (str(demo["settings"]["steps"]),)
    # Until 0.4 the demo's "fastlora" was another model, and "optimized" was PEFT's.
    fast = "optimized" if "optimized" in demo["results"] else "fastlora"
    ours = numbers_of(demo, fast)
    nf4 = numbers_of(report_of("docs/quantized.md", "demo-quantized"), "fastlora")
    experts = numbers_of(report_of("docs/experts.md", "demo-experts"), "fastlora")
    gain = r"\*\*(\d+) %\*\* less\s+time than PEFT's.*?grows\s+by\s+\*\*(\d+) %\*\* less"
    smaller = (
        r"\*\*(\d+) %\*\* less\s+time than PEFT's.*?peak\s+memory\s+is\s+\*\*(\d+) %\*\* smaller"
    )
    yield "README.md", smaller, ours
    over_frozen = (demo["step_time_over_frozen"][side]["median"] for side in (fast, "PEFT"))
    added = tuple(f"{100 * (ratio - 1):.0f}" for ratio in over_frozen)
    yield "README.md", r"LoRA adds \*\*(\d+) %\*\*.*?with PEFT it adds \*\*(\d+) %\*\*", added
    cells = r"[^|\n]* \| \*\*(\d+) %\*\* less time, \*\*(\d+) %\*\* less memory \|"
    yield "README.md", "Trainer" + cells, ours
    yield "README.md", "packed" + cells, experts
    yield "README.md", "GGUF" + cells, nf4
    for page, numbers in (("peft", ours), ("quantized", nf4), ("experts", experts)):
        yield f"docs/{page}.md", r"\*\*Gain\*\*: [^*]*?" + gain, numbers
    yield "docs/cpu.md", r"\*\*Gain\*\*: [^*]*?\*\*(\d+) %\*\* less\s+time than PEFT's", ours[:1]
    [(frozen, peft)] = medians_of(
        "docs/adapters.md", "mixed", "both", "fastlora/frozen", "peft/frozen"
    )
    yield "README.md", r"many adapters in one batch \| \*\*(\d+) %\*\*", (less(frozen / peft),)
    yield "docs/adapters.md", r"\*\*Gain\*\*: .*?\*\*(\d+) %\*\* less", (less(frozen / peft),)
    at_once = medians_of("docs/rank.md", "sweep", "step", "fastlora/eight runs")
    bounds = tuple(sorted(less(ratio) for [ratio] in at_once))
    yield "README.md", r"8 runs at once take (\d+) to (\d+) % less time", bounds
    yield (
        "docs/rank.md",
        r"at\s+once\s+takes\s+\*\*(\d+) %\*\*\s+to\s+\*\*(\d+) %\*\*\s+less",
        bounds,
    )
    small = demo["results"]["fastlora"]["resized"]
    losses = demo["results"]["fastlora"]["held_out_loss"][-1][1], *small["losses"].values()
    pattern = (
        r"effective rank (\S+)\) has a\s+held-out\s+loss\s+of\s+(\S+); at 8, 4, 2 and 1 it\s+has"
    )
    pattern += r"\s+(\S+),\s+(\S+),\s+(\S+)\s+and\s+(\S+)\s"
    shown = f"{small['effective_rank']:.1f}", *(f"{loss:.3f}" for loss in losses)
    yield "docs/rank.md", pattern, shown
    sweep = report_of("docs/rank.md", "demo-sweep")
    best = next(trial for trial in sweep["trials"] if trial["name"] == sweep["best"])
    pattern = r"\((\S+) before training\).*?some (\d+) minutes.*?rank (\d+) at a rate of\s+(\S+),"
    first, last = best["losses"][0][1], best["losses"][-1][1]
    shown = f"{first:.3f}", f"{sweep['seconds'] / 60:.0f}", str(best["config"]["r"])
    shown += (f"{best['learning_rate']:.0e}".replace("e-0", "e-"), f"{last:.3f}")
    yield "docs/rank.md", pattern + r" ends at (\S+) \(", shown


def write() -> None:
    for page in PAGES:
        text = page.read_text()
        new = TABLE.sub(lambda found: f"<!-- {found[1]} -->\n\n{printed_by(found[1])}\n", text)
        write_if_new(page, text, new)
    for name, pattern, numbers in sentences():
        text = new = (ROOT / name).read_text()
        found = re.search(pattern, text, re.S)
        # backwards, so that earlier positions stay valid
        for group, number in reversed([*enumerate(numbers, 1)]):
            new = new[: found.start(group)] + number + new[found.end(group) :]
        write_if_new(ROOT / name, text, new)


def write_if_new(page: Path, text: str, new: str) -> None:
    if new != text:
        page.write_text(new)
        print(f"{name_of(page)}: written")


if __name__ == "__main__":
    write()
