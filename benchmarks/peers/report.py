"""From the records of runs to numbers, and to a Markdown table. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from contenders import CONTENDERS, Contender
from measure import Measurement

WARM_UP = 2  # rounds that no steady figure counts
TOLERANCE = 1e-5  # of the largest difference over the norm of the reference
Records = Mapping[str, Sequence[Mapping[str, Any]]]


def derive(measurement: Measurement, marks: Mapping[str, Any], workers: int, cohort: int) -> dict[str, Any]:
    """Return the figures of one run.

    `start_seconds` is all that a run spends once, up to its first steady round: the end of the warm-up minus
    what as many steady rounds take. `overhead` is a round's time over what its clients' training would take
    if the workers did nothing else: 1 is perfect. `wall_seconds` ends with the first process.
    """
    ends = [end - measurement.started for end in marks["round_ends"]]
    if len(ends) <= WARM_UP:
        raise ValueError(f"{len(ends)} rounds: more than the {WARM_UP} of the warm-up are needed")
    steady = (ends[-1] - ends[WARM_UP - 1]) / (len(ends) - WARM_UP)
    trained = marks["train_seconds"][WARM_UP:]
    return {
        "clients_per_second": cohort / steady,
        "start_seconds": ends[WARM_UP - 1] - WARM_UP * steady,
        "wall_seconds": measurement.wall,
        "cpu_seconds": measurement.cpu,
        "peak_pss_bytes": measurement.peak_pss,
        "others_cpu_share": measurement.others / measurement.wall,
        "overhead": steady * workers / (sum(trained) / len(trained)),
        "round_ends": ends,
        "train_seconds": list(marks["train_seconds"]),
    }


def equal(equality: Mapping[str, Any] | None) -> bool:
    """Return whether a contender's final tensors were checked and agree with the reference's."""
    return equality is not None and equality.get("largest", float("inf")) <= TOLERANCE


def counts(name: str, equalities: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether a contender's times may be compared.

    federa in bf16 computes other numbers by intent: it counts if federa's same engine in fp32 does.
    """
    return equal(equalities.get(name.replace("bf16", "fp32")))


def best(framework: str, precision: str, runs: Records) -> Contender | None:
    """Return the arrangement with the most clients a second (median), of those that take part by default."""
    among = [
        c
        for c in CONTENDERS.values()
        if c.framework == framework and c.precision == precision and c.by_default and runs.get(c.name)
    ]
    return max(among, key=lambda c: median(run["clients_per_second"] for run in runs[c.name]), default=None)


def ratios(runs: Records, equalities: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return how many times faster federa is than the best arrangement of each framework.

    Ratios are taken between runs of the same turn, so that a slow minute of the machine hits both sides. A
    pair of which one side's results are not the reference's has `refused` in the place of numbers.
    """
    own = {precision: best("federa", precision, runs) for precision in ("fp32", "bf16")}
    out = []
    frameworks = dict.fromkeys(c.framework for c in CONTENDERS.values() if c.framework != "federa")
    for framework in frameworks:
        other = best(framework, "fp32", runs)
        for kind, precision in (("equal arithmetic", "fp32"), ("own arithmetic", "bf16")):
            if other is not None and own[precision] is not None:
                out.append(_ratio(kind, own[precision], other, runs, equalities))
    if own["fp32"] is not None and own["bf16"] is not None:
        out.append(_ratio("the arithmetic alone", own["bf16"], own["fp32"], runs, equalities))
    return out


def _ratio(
    kind: str, ours: Contender, theirs: Contender, runs: Records, equalities: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": kind, "faster": ours.name, "than": theirs.name}
    unequal = [name for name in (ours.name, theirs.name) if not counts(name, equalities)]
    if unequal:
        return row | {"refused": f"the final tensors of {' and '.join(unequal)} are not the reference's"}
    turns = {run["repeat"]: run["clients_per_second"] for run in runs[theirs.name]}
    paired = [
        run["clients_per_second"] / turns[run["repeat"]] for run in runs[ours.name] if run["repeat"] in turns
    ]
    if not paired:
        return row | {"refused": "no repeat of both is done"}
    return row | {"median": median(paired), "least": min(paired), "most": max(paired), "pairs": len(paired)}


def _span(runs: Sequence[Mapping[str, Any]], key: str, digits: int, unit: float = 1.0) -> str:
    values = [run[key] / unit for run in runs]
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _equality(name: str, equality: Mapping[str, Any] | None) -> str:
    if equality is None:
        return "not checked"
    if "largest" not in equality:
        return f"failed: {equality['error']}"
    verdict = "" if equal(equality) else (" (bf16)" if "bf16" in name else " **not equal**")
    return f"{equality['largest']:.1e}{verdict}"


def _quality(quality: Mapping[str, Any] | None) -> str:
    if quality is None:
        return ""
    return f"{quality['accuracy']:.3f}, {quality['loss']:.3f} after {quality['key']['rounds']} rounds"


def markdown(results: Mapping[str, Any]) -> str:
    """Return the tables of a comparison."""
    w, runs = results["workload"], {n: c["runs"] for n, c in results["contenders"].items()}
    machine = results["machine"]
    lines = [
        f"{w['clients']} clients, {w['cohort']} a round, {w['examples']} examples each of "
        f"{w['tokens']} tokens, batch {w['batch']}, 1 epoch, AdamW {w['lr']:g}; "
        f"{w['model']}, LoRA rank {w['rank']} on query and value; "
        f"{results['rounds']} rounds, of which {WARM_UP} warm-up. "
        f"{machine['processor']}, cores {machine['cores']}, Linux {machine['kernel']}, "
        f"Python {machine['python']}; federa at {results['commit']}.",
        "",
        "Medians (least to most). Equality: largest difference of a final tensor over the norm, in fp32 "
        f"without dropout, after {results['equality_rounds']} rounds. "
        "Quality: accuracy and loss on texts that nobody has trained on, of a run with the model's dropout.",
        "",
        "| contender | workers x threads | equality | steady clients/s | start s | wall s | CPU s | "
        "peak PSS MB | overhead | others' CPU | runs | quality |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results["contenders"].items():
        done, contender = runs[name], CONTENDERS[name]
        cells = [name, f"{contender.workers} x {contender.threads}", _equality(name, row["equality"])]
        if row["unavailable"]:
            cells += [f"not run: {row['unavailable']}", *[""] * 7]
        elif not done:
            cells += [""] * 8
        else:
            cells += [
                _span(done, "clients_per_second", 2),
                _span(done, "start_seconds", 1),
                _span(done, "wall_seconds", 1),
                _span(done, "cpu_seconds", 1),
                _span(done, "peak_pss_bytes", 0, 1e6),
                _span(done, "overhead", 2),
                f"{max(run['others_cpu_share'] for run in done):.2f}",
                str(len(done)),
            ]
        lines.append("| " + " | ".join([*cells, _quality(row["quality"])]) + " |")
    lines += [
        "",
        "How many times faster federa is, in steady clients/s, pairs of the same turn:",
        "",
        "| | federa's | against the better of | ratio |",
        "|---|---|---|---|",
    ]
    for row in results["ratios"]:
        text = f"refused: {row['refused']}" if "refused" in row else _ratio_text(row)
        lines.append(f"| {row['kind']} | {row['faster']} | {row['than']} | {text} |")
    lines += ["", *(f"Warning: {warning}" for warning in results["warnings"])]
    return "\n".join(lines).rstrip() + "\n"


def _ratio_text(row: Mapping[str, Any]) -> str:
    return f"{row['median']:.2f} ({row['least']:.2f} to {row['most']:.2f}, {row['pairs']} pairs)"
