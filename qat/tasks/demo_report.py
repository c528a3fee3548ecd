"""What the demo measured, as rows (results.json), as a table on the screen and as a page (report.html)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from qat.report import write_report, write_text
from qat.tasks.measure import environment

if TYPE_CHECKING:
    from rich.console import Console

    from qat.tasks.demo import Demo, Outcome

KL, PERPLEXITY, TOP1 = "kl", "perplexity", "top-1 %"
# of the quantized weights alone: what the recipe leaves in float counts in the bytes of the file
BITS, BYTES = "bits per quantized weight", "file bytes"
READ_KL, DIFFERENCE = "kl of reading program", "largest difference"
BETTER = {TOP1: "higher"}
FLOAT, TRAINED_ON, RTN, QAT, Q8 = "float", "float trained on", "RTN (MSE)", "qat", "float Q8_0"


def rows_of(demo: Demo) -> list[dict[str, Any]]:
    """Flat rows {suite, case, tool, metric, value, better}."""
    rows: list[dict[str, Any]] = []

    def add(case: str, tool: str, **values: float) -> None:
        for key, value in values.items():
            metric = _METRICS[key]
            better = BETTER.get(metric, "lower")
            row = {"suite": "demo", "case": case, "tool": tool, "metric": metric}
            rows.append({**row, "value": value, "better": better})

    size = (demo.out / "float" / "model.safetensors").stat().st_size
    add("32 bits", FLOAT, kl=0.0, perplexity=demo.float_scores.perplexity, top1=100.0, bits=32.0, size=size)
    add("32 bits", TRAINED_ON, kl=demo.continued.kl, perplexity=demo.continued.perplexity, top1=demo.continued.top1)
    for found in demo.outcomes:
        name = found.case.name
        add(name, RTN, kl=found.rtn.kl, perplexity=found.rtn.perplexity, top1=found.rtn.top1)
        add(name, QAT, kl=found.qat.kl, perplexity=found.qat.perplexity, top1=found.qat.top1)
        difference = max(row.max_abs_diff for row in found.checked)
        add(name, QAT, bits=found.bits_per_weight, size=found.file_bytes, reader=found.engine.kl, difference=difference)
    add("8 bits (Q8_0)", Q8, size=demo.q8_bytes, reader=demo.q8.kl)
    return rows


_METRICS = {"kl": KL, "perplexity": PERPLEXITY, "top1": TOP1, "bits": BITS, "size": BYTES, "reader": READ_KL}
_METRICS["difference"] = DIFFERENCE


def environment_of(demo: Demo) -> dict[str, Any]:
    """Where and on what the figures were measured."""
    found = environment()
    versions = found.pop("versions")
    return {
        **found,
        "seed": demo.seed,
        "corpus sha256": demo.corpus.sha256,
        "held-out tokens": demo.float_scores.positions,
        "settings": dict(vars(demo.settings)),
        "seconds": {name: round(value, 1) for name, value in demo.seconds.items()},
        "versions": versions,
    }


def save_results(demo: Demo) -> dict[str, Any]:
    """Write results.json and the report below `demo.out`; returns what results.json holds."""
    results = {"environment": environment_of(demo), "rows": rows_of(demo)}
    write_text(demo.out / "results.json", json.dumps(results, indent=1) + "\n")
    write_report(report_of(demo, results), demo.out)
    return results


def pivot(results: dict[str, Any]) -> dict[tuple[str, str], dict[str, float]]:
    """(case, tool) -> metric -> value, in order."""
    table: dict[tuple[str, str], dict[str, float]] = {}
    for row in results["rows"]:
        table.setdefault((row["case"], row["tool"]), {})[row["metric"]] = row["value"]
    return table


def cells(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column titles and rows of text, for the screen and the page."""
    rows = []
    for (case, tool), values in pivot(results).items():
        texts = [_FORMATS[metric].format(values[metric]) if metric in values else "" for metric in _SHOWN]
        rows.append([case, {QAT: "QAT"}.get(tool, tool), *texts])
    return ["", "weights", *_SHOWN.values()], rows


_SHOWN = {KL: "KL", PERPLEXITY: "ppl", TOP1: "top-1", BITS: "bits", BYTES: "bytes", READ_KL: "KL read"}
_FORMATS = {KL: "{:.5f}", PERPLEXITY: "{:.2f}", TOP1: "{:.1f} %", BITS: "{:.2f}", BYTES: "{:,.0f}", READ_KL: "{:.1e}"}
_LEGEND = (
    "KL: KL(float || model) in nats per token; ppl: perplexity; top-1: same most likely token as float; bits: stored "
    "bits of a quantized weight, scales included; KL read: KL(trained model in PyTorch || exported file in the program "
    "that reads it)"
)


def print_table(results: dict[str, Any], console: Console) -> None:
    """The figures on the screen."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    columns, rows = cells(results)
    # On the screen case and weights share a column: eighty characters are enough.
    lines = [[f"{row[0].partition(' (')[0]}  {row[1]}", *row[2:]] for row in rows]
    title = f"\n{results['environment']['held-out tokens']:,} held-out tokens"
    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for column in ["", *columns[2:]]:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line, style="bold green" if line[0].endswith("QAT") else None)
    console.print(table)
    console.print(f"[dim]{_LEGEND}[/]", highlight=False)


def report_of(demo: Demo, results: dict[str, Any]) -> dict[str, Any]:
    """The page, as `qat.report` takes it."""
    columns, rows = cells(results)
    tokens = demo.float_scores.positions
    four, two = demo.outcomes
    steps = demo.settings.extra_steps
    packed = [row for found in demo.outcomes for row in found.checked]
    equal = sum(row.max_abs_diff == 0 for row in packed)
    lead = [
        f"A Llama of {_params(demo):,} parameters, trained on {demo.corpus.bytes / 1e6:.1f} MB of the Python "
        f"standard library's source text in {demo.settings.float_steps} steps; then quantized to 4 and to 2 bits, and "
        f"measured on {tokens:,} tokens of files that no training saw.",
    ]
    tiles = [
        [f"{_share(four)} %", f"of the KL of rounding to 4 bits removed by {steps} steps of QAT"],
        [f"{_share(two)} %", f"of the KL of rounding to 2 bits removed by {steps} steps of QAT"],
        [f"{equal} of {len(packed)}", "packed tensors read back equal to the trained ones, bit for bit"],
        [f"{_float_bytes(demo) / four.file_bytes:.1f} to 1", "32-bit float against the 4-bit GGUF, tokenizer included"],
    ]
    strong = [index for index, row in enumerate(rows) if row[1] == "QAT"]
    sections: list[dict[str, Any]] = [
        {"kind": "tiles", "tiles": tiles},
        {
            "kind": "table",
            "title": "Side by side",
            "columns": columns,
            "rows": rows,
            "strong": strong,
            "names": 2,
            "note": _table_note(demo),
        },
        *[
            {"kind": "text", "half": True, "title": f"What {found.case.name} costs", "paragraphs": _words(demo, found)}
            for found in demo.outcomes
        ],
        *_plots(demo),
        _completions(demo),
        *[_exact(found) for found in demo.outcomes],
        _about(demo, results),
    ]
    return {"title": "Trained on the grid it is deployed on", "lead": lead, "sections": sections}


def _params(demo: Demo) -> int:
    return sum(p.numel() for p in demo.float_model.parameters())


def _float_bytes(demo: Demo) -> int:
    return (demo.out / "float" / "model.safetensors").stat().st_size


def _share(found: Outcome) -> str:
    """% of rounding's KL that training removed."""
    return f"{100 * (1 - found.qat.kl / found.rtn.kl):.0f}"


def _table_note(demo: Demo) -> str:
    return (
        "KL is the mean over held-out positions of KL(float || model) in nats; ppl is perplexity; top-1 the share of "
        "positions with the same most likely token as float; bits the stored bits of a quantized weight, scales "
        "included. “Float trained on” is the control: the float model after as many further steps "
        f"({demo.settings.extra_steps}) on the same batches in the same order. RTN rounds to the nearest code on the "
        "same grid, with scales searched for least squared error and no training. “KL read” is KL(trained model in "
        "PyTorch || exported file in the program that reads it): llama.cpp computes with 8-bit activations, and the "
        "last line shows what that alone does: the float model's Q8_0 file in llama.cpp against PyTorch on the same "
        "8-bit weights."
    )


def _words(demo: Demo, found: Outcome) -> list[str]:
    bits = found.case.recipe.rules["linears"].weight
    assert bits is not None
    base, size = demo.float_scores, _float_bytes(demo)
    rest = "embeddings and head get 8 bits" if found.case.format == "gguf" else "embeddings and head stay in float"
    change = 100 * (found.qat.perplexity / base.perplexity - 1)
    return [
        f"Bits: the recipe {found.case.recipe.name} gives every linear layer {bits.bits} bits in groups of "
        f"{bits.group_size}, and {rest}; {_why(found)}. {found.coverage:.1f} % of the parameters lie on the grid, "
        f"at {found.bits_per_weight:.2f} stored bits each.",
        f"Bytes: the file has {found.file_bytes:,}, {100 * found.file_bytes / size:.0f} % of the {size:,} of the float "
        f"file in 32 bits and {200 * found.file_bytes / size:.0f} % of one in 16. {found.float_bytes:,} of them are "
        "parameters that the recipe leaves in float, as wide as they were trained.",
        f"Price: perplexity {found.qat.perplexity:.2f} instead of {base.perplexity:.2f} ({change:+.2f} %; rounding "
        f"alone {found.rtn.perplexity:.2f}); another most likely token at {100 - found.qat.top1:.1f} % of the "
        f"positions (rounding alone {100 - found.rtn.top1:.1f} %); KL to float {found.qat.kl:.5f} nats (rounding alone "
        f"{found.rtn.kl:.5f}).",
    ]


def _why(found: Outcome) -> str:
    if found.case.format == "gguf":
        return "chosen because they are what llama.cpp's Q4_0 and Q8_0 blocks hold"
    return "chosen because rounding alone loses much there, and compressed-tensors packs them"


def _short(found: Outcome) -> str:
    return found.case.name.partition(" (")[0]


def _plots(demo: Demo) -> list[dict[str, Any]]:
    names = [name.removeprefix("model.layers.") for name in demo.outcomes[0].errors["QAT"]]
    layers = [name.replace("self_attn.", "").replace("mlp.", "") for name in names]
    sections: list[dict[str, Any]] = [
        {
            "kind": "lines",
            "half": True,
            "title": "Pretraining",
            "x": "step",
            "y": "cross entropy (nats)",
            "lines": [["float", demo.float_curve.losses]],
        },
        {
            "kind": "lines",
            "half": True,
            "log": True,
            "title": "QAT: distillation loss",
            "x": "step",
            "y": "KL to float (nats)",
            "lines": [[found.case.name, found.curve.losses] for found in demo.outcomes],
        },
        {
            "kind": "lines",
            "half": True,
            "log": True,
            "title": "Held-out text while training",
            "x": "step",
            "y": "KL to float (nats)",
            "lines": [
                *[[found.case.name, found.curve.measured] for found in demo.outcomes],
                ["float trained on", [point for point in demo.continued_curve.measured if point[1] > 0]],
            ],
            "note": "Step 0 is rounding to nearest. The control drifts away from float; QAT approaches it.",
        },
        {
            "kind": "bars",
            "half": True,
            "title": "Perplexity",
            "y": "held-out perplexity",
            "bars": [
                ["float", demo.float_scores.perplexity, f"{demo.float_scores.perplexity:.1f}"],
                ["float\ntrained on", demo.continued.perplexity, f"{demo.continued.perplexity:.1f}"],
                *[
                    [f"{_short(found)}\n{tool}", scores.perplexity, f"{scores.perplexity:.1f}"]
                    for found in demo.outcomes
                    for tool, scores in (("RTN", found.rtn), ("QAT", found.qat))
                ],
            ],
        },
    ]
    sizes = {"float\n32 bits": _float_bytes(demo), "float\n16 bits": _float_bytes(demo) // 2}
    sizes.update({f"{_short(found)}\nQAT": found.file_bytes for found in demo.outcomes})
    bars = [[name, size / 1e6, f"{size / 1e6:.2f} MB"] for name, size in sizes.items()]
    title = "Size of the weights' file"
    sections.append({"kind": "bars", "half": True, "title": title, "y": "megabytes", "bars": bars})
    kl = [
        [f"{_short(found)}\n{tool}", scores.kl, f"{scores.kl:.3g}"]
        for found in demo.outcomes
        for tool, scores in (("RTN", found.rtn), ("QAT", found.qat))
    ]
    title = "Distance from float"
    sections.append({"kind": "bars", "half": True, "log": True, "title": title, "y": "KL (nats)", "bars": kl})
    for found in demo.outcomes:
        series = [[tool, list(errors.values())] for tool, errors in found.errors.items()]
        title = f"Error at the output of each layer, {found.case.name}"
        note = "|y - y_float| / |y_float| over held-out tokens, with everything before the layer quantized too."
        section = {"kind": "layers", "title": title, "y": "relative error", "names": layers, "series": series}
        sections.append({**section, "note": note})
    return sections


def _completions(demo: Demo) -> dict[str, Any]:
    from qat.tasks.demo import PROMPTS

    models = ["float, PyTorch", *[f"{_short(found)}, exported file in {found.case.reader}" for found in demo.outcomes]]
    answers = zip(demo.float_texts, *[found.completions for found in demo.outcomes], strict=True)
    rows = [[prompt, list(texts)] for prompt, texts in zip(PROMPTS, answers, strict=True)]
    note = "Greedy. A model this small writes code-shaped text at best; what matters is how alike the columns are."
    title = "The same beginnings, continued"
    return {"kind": "completions", "title": title, "models": models, "rows": rows, "note": note}


def _exact(found: Outcome) -> dict[str, Any]:
    rows = [[r.name, r.spec, "x".join(map(str, r.shape)), r.sha256[:12], f"{r.max_abs_diff:g}"] for r in found.checked]
    worst = max(row.max_abs_diff for row in found.checked)
    return {
        "kind": "table",
        "title": f"Packed tensors, {found.case.name}",
        "fold": f"{len(rows)} tensors decoded by {found.checked[0].reader}: largest difference {worst:g}",
        "columns": ["tensor", "grid", "shape", "sha256 of the weight", "largest difference"],
        "rows": rows,
    }


def _about(demo: Demo, results: dict[str, Any]) -> dict[str, Any]:
    environment = results["environment"]
    rows = [[name, str(value)] for name, value in environment.items() if not isinstance(value, dict)]
    rows += [[name, str(value)] for name, value in environment["versions"].items()]
    rows += [[f"seconds: {name}", str(value)] for name, value in environment["seconds"].items()]
    rows += [[f"setting: {name}", str(value)] for name, value in environment["settings"].items()]
    fold = "environment, settings, times"
    return {"kind": "table", "title": "Measured with", "fold": fold, "columns": ["", ""], "rows": rows}
