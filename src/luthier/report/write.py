"""The files of a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.errors import UserError
from luthier.report.content import content
from luthier.report.gather import Report
from luthier.report.html import render_html
from luthier.report.markdown import render_markdown
from luthier.training.checkpoint import writing
from luthier.training.runlog import write_json

if TYPE_CHECKING:
    from rich.console import Console

FORMATS = ("html", "md", "json", "card")
CARD = "README.md"


def write_reports(
    run: str | Path, formats: Sequence[str] = ("html", "md", "json"), output: Path | None = None
) -> list[Path]:
    """Write the report of a run, finished or not.

    Args:
        run: the run folder.
        formats: of :data:`FORMATS`.
        output: a folder; or, of one format alone, a file. None: the run folder, and of a card
            that of the tuned weights.

    Raises:
        UserError: the folder holds no run, a format is unknown, or a card is asked for where no model is saved.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise UserError(
            f"there is no format {', '.join(map(repr, unknown)) or 'named'}", where="--format",
            remedy=f"name some of {','.join(FORMATS)}",
        )  # fmt: skip
    report = Report.of(run)
    title, blocks = f"Report of {report.name}", content(report)
    written = []
    for name in dict.fromkeys(formats):
        if name == "card":
            target = _target(output, CARD, formats) or _saved(report) / CARD
            write_card(report, target)
        else:
            target = _target(output, f"report.{name}", formats) or report.folder / f"report.{name}"
            if name == "json":
                write_json(target, report.to_json())
            else:
                _write(target, (render_html if name == "html" else render_markdown)(title, blocks))
        written.append(target)
    return written


def tell(run: Path, console: Console) -> None:
    """What a run writes of itself at its end: the reports, and a card wherever weights are saved.

    The weights are safe by now, so what cannot be written is told and costs no run.
    """
    try:
        write_reports(run)
        report = Report.of(run)
        for folder in (run / "adapter", run / "model", run / "merged"):
            if folder.is_dir():
                write_card(report, folder / CARD)
    except UserError as error:
        console.print(f"the model is saved, but not its report: {error}", style="yellow", highlight=False)


def write_card(report: Report, target: Path) -> None:
    """Write a run's model card, in the place of PEFT's."""
    from luthier.report.card import model_card

    _write(target, model_card(report, target.parent))


def _target(output: Path | None, name: str, formats: Sequence[str]) -> Path | None:
    if output is None:
        return None
    file = len(set(formats)) == 1 and bool(output.suffix) and not output.is_dir()
    return output.expanduser() if file else output.expanduser() / name


def _saved(report: Report) -> Path:
    if report.saved is None:
        raise UserError(
            "the run has saved no model that a card could describe",
            where=str(report.folder),
            remedy="finish it with `luthier train RECIPE --resume`",
        )
    return report.saved


def _write(target: Path, text: str) -> None:
    """Written aside and renamed."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.writing")
        aside.write_text(text, encoding="utf-8")
        aside.replace(target)
