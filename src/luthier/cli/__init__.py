"""The command line: each verb parses, calls one function and prints."""

from __future__ import annotations

import logging
import os
import sys

import typer

from luthier.errors import FailedElsewhere, UserError

app = typer.Typer(
    name="luthier",
    help="Fine-tune a language model on your examples, with proof of what changed.\n\n"
    "[bold]luthier init DATA[/bold] writes a recipe, [bold]luthier check[/bold] looks before you leap, "
    "[bold]luthier train[/bold] does the rest.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line; a user's mistake is one message on stderr and exit code 2."""
    from luthier.cli import commands, data, evaluation, exporting, publishing, quantizing, serving

    assert all(verbs.app is app for verbs in (commands, evaluation, exporting, publishing, quantizing, serving))
    if not app.registered_groups:
        app.add_typer(data.app)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Where torchao is installed, PEFT imports it whenever it is imported itself; it warns of kernels for GPUs.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except FailedElsewhere as error:
        from luthier.cli.launch import FAILED_ELSEWHERE, LAUNCHER

        if not error.told and LAUNCHER not in os.environ:
            print(f"error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(FAILED_ELSEWHERE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away (`luthier check … | head`): nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
