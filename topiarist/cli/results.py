"""The commands that look at results: eval, inspect, report."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from topiarist.cli.common import err, literal, out, progress_bar, say, set_threads
from topiarist.core import former
from topiarist.results.formats import start_text

BROKEN, UNSEEN = 1, 2
BOS = ("auto", "always", "never")


def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="model folders; a pruned one's base is added")
    ],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            "--data",
            help=".txt, .jsonl, .csv, .parquet (also .gz, .zst ...), a datasets folder or hub:NAME[:CONFIG]; may be repeated",
        ),
    ] = None,
    text_field: Annotated[str, typer.Option(help="field of rows that holds the text, or chat messages")] = "text",
    split: Annotated[str | None, typer.Option(help="split of datasets; default: test, or validation")] = None,
    bos: Annotated[
        str, typer.Option(help="start token before every window: auto (as the tokenizer does), always or never")
    ] = "auto",
    tokenizer: Annotated[Path | None, typer.Option(help="folder of the tokenizer; default: each model's own")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="zero-shot tasks, e.g. piqa,arc_easy, through lm-evaluation-harness")
    ] = None,
    task_files: Annotated[
        Path | None, typer.Option(help="folder with the tasks' items, e.g. piqa_valid.jsonl; needs no network")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="only the first items of each task")] = None,
    window: Annotated[int, typer.Option(help="tokens a window; windows do not overlap")] = 1024,
    max_windows: Annotated[int | None, typer.Option(help="only the first windows of each text")] = None,
    batch_size: Annotated[int, typer.Option(help="windows, or task requests, a forward pass")] = 1,
    device: Annotated[str | None, typer.Option(help="default: a GPU if there is one")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads")] = None,
    reference: Annotated[bool, typer.Option(help="add the dense base of a pruned model as first row")] = True,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="put on the low-rank companion of every MODEL that has one (needs peft)")
    ] = False,
    allow_overlap: Annotated[bool, typer.Option(help="evaluate on calibration text all the same")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="run Python code that the model folder brings")] = False,
    save: Annotated[
        bool, typer.Option("--save", help="put the results beside each pruned model, and on its page")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Perplexity of every MODEL on every text file, and its score in every task, dense reference first."""
    from topiarist.core.errors import TopiaristError
    from topiarist.data import text_files
    from topiarist.evaluation.adapter import has_adapter
    from topiarist.evaluation.comparison import check_heeded, compare, entries
    from topiarist.evaluation.tasks import compare_tasks, specs_of
    from topiarist.evaluation.tasks import entries as task_entries
    from topiarist.results.pages import save_evaluation

    set_threads(threads)
    if not text and not tasks:
        raise TopiaristError("nothing to evaluate on: name --text heldout.txt or --tasks piqa,arc_easy")
    if adapter and (tasks or save):
        raise TopiaristError(
            "--adapter measures perplexity alone and saves nothing, for what is saved is said of the model without it: leave "
            f"{'--save' if save else '--tasks'} out"
        )
    if allow_overlap and save:
        raise TopiaristError(
            "--allow-overlap measures on text that the model knows, and what is saved is said of text that it does not: leave "
            "--save out"
        )
    paths, wanted = text or [], [task.strip() for task in (tasks or "").split(",") if task.strip()]
    options: dict[str, Any] = {"window": window, "max_windows": max_windows, "allow_overlap": allow_overlap, "bos": bos}
    # Refused before any text is measured.
    specs_of(wanted, task_files, limit)
    check_heeded(paths, text_field=text_field, split=split, **options)
    whole = text_files(paths, field=text_field, split=split) if paths else None
    sources = [replace(whole, paths=(path,)) for path in whole.paths] if whole else []
    common: dict[str, Any] = {
        "batch_size": batch_size,
        "device": device,
        "reference": reference,
        "trust_remote_code": trust_remote_code,
        "tokenizer": tokenizer,
    }
    if bos not in BOS:
        raise TopiaristError(f"--bos {bos}: it is one of {', '.join(BOS)}")
    scores: list[Any] = []
    with progress_bar() as progress:

        def score() -> None:
            if wanted:
                scores.extend(compare_tasks(models, wanted, files=task_files, limit=limit, progress=progress, **common))

        rows = []
        if sources:  # whose refusals come before hours of tasks
            rows = compare(models, sources, ready=score, progress=progress, adapter=adapter, **options, **common)
        else:
            score()
    if as_json:
        tables = {"perplexity": [asdict(row) for row in rows], "tasks": [asdict(row) for row in scores]}
        # One kind of measurement is a plain list, as it always was.
        sys.stdout.write(
            json.dumps(tables if rows and scores else tables["tasks" if scores else "perplexity"], indent=2) + "\n"
        )
    else:
        if rows:
            _print_perplexities(rows, paths, window)
            for name in () if adapter else filter(has_adapter, models):
                out.print(
                    literal(f"{name} has a low-rank companion, which was left out: --adapter puts it on"),
                    soft_wrap=True,
                )
        if scores:
            _print_scores(scores)
    if save:
        texts, items = entries(rows, [path.name for path in paths]), task_entries(scores)
        if not texts and not items:
            err.print(
                "nothing is saved: --save puts figures beside pruned models, and no MODEL is one", highlight=False
            )
        for folder in dict.fromkeys([*texts, *items]):
            save_evaluation(folder, {"perplexity": texts.get(folder, []), "tasks": items.get(folder, [])})


def _print_perplexities(rows: Sequence[Any], text: Sequence[Path], window: int) -> None:
    begin = start_text(row.results[0].start_tokens for row in rows)
    table = Table(title=f"perplexity, windows of {window} tokens without overlap, {begin}")
    table.add_column("model")
    table.add_column("dtype")
    for path, results in zip(text, zip(*(row.results for row in rows), strict=True), strict=True):
        same = len({result.text_digest for result in results}) == 1
        what = f"{results[0].tokens:,} tokens\nsha256 {results[0].text_digest[:12]}" if same else "tokens differ"
        table.add_column(f"{literal(path.name)}\n{what}", justify="right")
    for row in rows:
        cells = [f"{r.value:.2f}" if r.value < 1e5 else f"{r.value:.3g}" for r in row.results]
        table.add_row(literal(row.model) + (" (dense)" if row.dense else ""), row.results[0].dtype, *cells)
    out.print(table)


def _print_scores(results: Sequence[Any]) -> None:
    table = Table(title=f"zero-shot, {results[0].harness}; ± one standard error")
    for column in ("task", "metric"):
        table.add_column(column)
    for column in ("items", *(literal(result.model) + (" (dense)" if result.dense else "") for result in results)):
        table.add_column(column, justify="right")
    for same in zip(*(result.scores for result in results), strict=True):
        errors = ["" if score.stderr is None else f" ± {score.stderr:.4f}" for score in same]
        cells = [f"{score.value:.4f}{error}" for score, error in zip(same, errors, strict=True)]
        table.add_row(same[0].task, same[0].metric, f"{same[0].num_items:,}", *cells)
    out.print(table)


def inspect(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="checkpoint folder")],
    verify: Annotated[
        bool,
        typer.Option("--verify", help="only check that patterns and masks still hold; exit code 1 if not, 2 if unseen"),
    ] = False,
    masks: Annotated[
        Path | None, typer.Option(help="with --verify: the masks that must hold; default DIR/masks.safetensors")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """What is in a checkpoint: sparsity of every layer, whether its pattern holds in the files, provenance."""
    from topiarist.evaluation.audit import audit
    from topiarist.structured import audit_shrunk

    if verify or masks is not None:
        _verify(folder, masks, as_json)
        return
    provenance, audits = audit(folder)
    shrunk = audit_shrunk(folder)
    if as_json:
        plain = {"pruning_config": provenance, "matrices": [asdict(a) for a in audits]}
        if shrunk is not None:
            counted = {"parameters": shrunk.parameters, "claimed": shrunk.spec.parameters, "holds": shrunk.holds}
            plain["structured"] = {**counted, "units": [asdict(unit) for unit in shrunk.units]}
        sys.stdout.write(json.dumps(plain, indent=2) + "\n")
        return
    table = Table(title=literal(str(folder)))
    for column in ("layer", "shape", "sparsity", "pattern", "holds"):
        table.add_column(column, justify="right" if column == "sparsity" else "left")
    for a in audits:
        holds = "unseen" if a.unread else "" if a.holds is None else "yes" if a.holds else "[red]NO[/red]"
        sparsity = "" if a.sparsity is None else f"{a.sparsity:.4f}"
        table.add_row(literal(a.name), " x ".join(map(str, a.shape)), sparsity, literal(a.pattern or ""), holds)
    out.print(table)
    seen = [(math.prod(a.shape), a.sparsity) for a in audits if a.sparsity is not None]
    if size := sum(size for size, _ in seen):
        zeros = sum(size * sparsity for size, sparsity in seen)
        out.print(f"{zeros / size:.2%} zeros in {len(seen)} matrices ({size:,} weights)")
    _print_unread({a.name: a.unread for a in audits if a.unread})
    broken = [a.name for a in audits if a.holds is False]
    if broken:
        say(f"the claimed pattern is broken in {len(broken)} matrices, first {broken[0]}")
    if shrunk is not None:
        _print_shrunk(shrunk)
    if provenance:
        calibration = former.calibration(provenance.get("calibration", {}))
        text = (
            f"calibration {calibration['num_windows']} x {calibration['window_tokens']} tokens, sha256 "
            f"{str(calibration.get('digest'))[:12]}"
            if calibration.get("num_windows")
            else "no calibration text"
        )
        say(
            f"pruned from {provenance.get('base_model')} with {provenance.get('method')} {provenance.get('pattern')} "
            f"(topiarist {provenance.get('version')}), {text}"
        )
    else:
        out.print("no pruning_config: not pruned by topiarist")


def _print_shrunk(shrunk: Any) -> None:
    """Units that stay, kind by kind, and whether the files agree with the PruneSpec."""
    table = Table(title=f"units ({literal(shrunk.spec.layout)})")
    for column in ("units", "kept", "of", "holds"):
        table.add_column(column, justify="left" if column in ("units", "holds") else "right")
    for kind in dict.fromkeys(unit.kind for unit in shrunk.units):
        same = [unit for unit in shrunk.units if unit.kind == kind]
        holds = (
            "yes"
            if all(unit.holds for unit in same)
            else f"[red]NO[/red]: {literal(next(u.name for u in same if not u.holds))}"
        )
        table.add_row(literal(kind), f"{sum(u.kept for u in same):,}", f"{sum(u.of for u in same):,}", holds)
    out.print(table)
    claimed = shrunk.spec.parameters
    verdict = (
        "as stated" if shrunk.parameters == claimed["stored"] else f"[red]NOT the {claimed['stored']:,} stated[/red]"
    )
    out.print(f"{shrunk.parameters:,} parameters of {claimed['dense']:,}, {verdict}", highlight=False)


def _print_unread(unread: Mapping[str, str]) -> None:
    """One line: how many, and why the first cannot be seen."""
    if unread:
        name, why = next(iter(unread.items()))
        out.print(literal(f"{len(unread)} matrices are unseen, first {name}: {why}"), highlight=False, soft_wrap=True)


def _verify(folder: str, masks: Path | None, as_json: bool) -> None:
    from topiarist.evaluation.verify import verify

    found = verify(folder, masks)
    if as_json:
        sys.stdout.write(json.dumps(asdict(found) | {"holds": found.holds}, indent=2) + "\n")
    else:
        for breach in found.breaches:
            out.print(f"[red]broken[/red] {literal(str(breach))}", highlight=False, soft_wrap=True)
        compared = [f"{found.patterns} patterns"] * bool(found.patterns) + [f"{found.masks} masks"] * bool(found.masks)
        _print_unread(found.unread)
        unseen = f"unseen in {len(found.unread)} tensors" if found.unread else "held"
        verdict = f"broken in {len({b.name for b in found.breaches})} tensors" if found.breaches else unseen
        out.print(f"{' and '.join(compared)}: {verdict}", highlight=False)
    if not found.holds:
        raise typer.Exit(BROKEN if found.breaches else UNSEEN)


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="pruned checkpoints")],
    output: Annotated[
        Path | None, typer.Option("--out", help="one page over all; default pruning_comparison.html for several")
    ] = None,
) -> None:
    """Pages to look at: each DIR's own again, with what is measured by now; of several, quality by size and by speed, and
    which of them are dominated. Give dense models that were only quantised (`topiarist quantize`) as points of reference.
    """
    from topiarist.checkpoints.atomic import refuse_foreign, write_atomically
    from topiarist.results.frontier import sentences_of
    from topiarist.results.pages import MARK, Result, compare_page, refresh

    results = [Result.from_folder(folder) for folder in folders]
    page = output or Path("pruning_comparison.html")
    several = len(results) > 1 or output is not None
    if several:
        refuse_foreign(page, MARK)
    for folder in folders:
        out.print(literal(f"written {refresh(folder, results)}"), highlight=False, soft_wrap=True)
    if several:
        for sentence in sentences_of(results):
            out.print(literal(sentence), highlight=False, soft_wrap=True)
        write_atomically(page, compare_page(results, links_from=page.parent))
        out.print(literal(f"written {page}"), highlight=False, soft_wrap=True)


COMMANDS = {"eval": evaluate, "inspect": inspect, "report": report}
