"""The command `run`: a file of requests in, a file of answers out."""

from __future__ import annotations

import gc
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from headrace.commands.common import (
    INTERRUPTED,
    NOT_ALL_SUCCEEDED,
    SUCCESS,
    AsJson,
    Gpus,
    Interrupts,
    Refused,
    interruptible,
    open_producer,
)

if TYPE_CHECKING:
    from headrace.serving import Serving
    from headrace.show import Terminal
    from jobs.settings import Settings
    from producer.bulk import BulkOptions, BulkProgress, BulkReport, BulkRun

InputFile = Annotated[Path, typer.Argument(metavar="IN.jsonl", exists=True, dir_okay=False, help="One request a line.")]
OutputFile = Annotated[Path, typer.Option("--output", "-o", metavar="OUT.jsonl", help="One answer a line.")]
ErrorsFile = Annotated[
    Path | None,
    typer.Option("--errors", metavar="ERR.jsonl", help="Bad lines and failed ones. Default: OUT.errors.jsonl."),
]


def run(
    source: InputFile,
    *,
    output: OutputFile,
    errors: ErrorsFile = None,
    model: Annotated[str | None, typer.Option(help="Model of every line, whatever it says.")] = None,
    prompt_field: Annotated[
        str | None, typer.Option(metavar="FIELD", help="The lines are no requests: this field of each is the prompt.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, whatever a line says.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 (greedy) to 2, whatever a line says.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a finished output.")] = False,
    show: Annotated[int, typer.Option("--show", metavar="N", min=0, help="Show some questions and answers.")] = 0,
    gpus: Gpus = None,
    as_json: AsJson = False,
) -> int:
    """Answer every line of a JSONL file: OpenAI batch requests, or any objects with --prompt-field.

    Uses the stack that is configured or up, and starts workers it lacks; else starts a stack for this run.
    The same command again goes on where it was left.

    Exit status: 0 all succeeded, 3 some lines failed, 130 stopped by Ctrl-C, 2 wrong usage or input, 1 otherwise.
    """
    from headrace.show import Terminal
    from jobs.settings import Settings
    from producer.bulk import BulkOptions, BulkPaused

    gc.freeze()  # what was imported stays; a long run need not look through it again and again
    settings = Settings.load()
    options = BulkOptions(source, output, errors, model, prompt_field, max_tokens, temperature, force)
    terminal = Terminal()
    try:
        with interruptible() as interrupts:
            ended = _run(settings, options, gpus, terminal, interrupts)
    except BulkPaused as paused:
        terminal.note(str(paused))
        return INTERRUPTED
    if as_json:
        _emit(ended, samples=show)
    else:
        _show(ended, samples=show)
    return SUCCESS if ended.report.succeeded == ended.report.total else NOT_ALL_SUCCEEDED


class _Ended(NamedTuple):
    report: BulkReport
    options: BulkOptions
    continued: bool
    private: bool  # whether the stack ended with it


def _run(
    settings: Settings, options: BulkOptions, gpus: str | None, terminal: Terminal, interrupts: Interrupts
) -> _Ended:
    from headrace.progress import display
    from headrace.serving import serving
    from producer.bulk import BulkRun

    with (
        serving(settings, gpus=gpus, teller=terminal) as stack,
        open_producer(stack.settings) as producer,
    ):
        if options.prompt_field is not None and options.model is None:
            options = replace(options, model=stack.default_model)
            terminal.note(f"model: {options.model}")
        bulk = BulkRun(producer, options)
        interrupts.action = bulk.pause
        _open(bulk)
        if bulk.continued:
            terminal.note("going on with the unfinished run")
        with display(terminal.console) as show_progress:
            report = bulk.run(_watching(stack, show_progress), stack.serve)
        return _Ended(report, options, bulk.continued, stack.private)


def _open(bulk: BulkRun) -> None:
    from producer.bulk import BulkError

    try:
        bulk.open()
    except BulkError as error:
        raise Refused(str(error)) from error


def _watching(stack: Serving, show_progress: Any) -> Any:
    """Look after the workers whenever the run says how far it is."""

    def on_progress(progress: BulkProgress) -> None:
        show_progress(progress)
        stack.check()

    return on_progress


def _emit(ended: _Ended, samples: int) -> None:
    from headrace.show import emit

    files = {"output": str(ended.options.output), "errors": str(ended.options.errors_path)}
    shown = {"samples": ended.report.samples[:samples], "continued": ended.continued}
    emit(asdict(ended.report) | shown | files)


def _show(ended: _Ended, samples: int) -> None:
    from headrace import show

    report, options = ended.report, ended.options
    console = show.out()
    for question, answer in report.samples[:samples]:
        console.print(show.sample(question, answer))
    console.print(show.report(report, options.output, continued=ended.continued))
    if report.succeeded < report.total:
        without = f"{report.total - report.succeeded:,} of {report.total:,} lines have no answer; "
        console.print(f"{without}why is in {options.errors_path}", soft_wrap=True, markup=False)
    if ended.private:
        console.print(show.next_steps())


def register(app: Any) -> None:
    """Put the command into the application."""
    app.command(rich_help_panel="Jobs")(run)
