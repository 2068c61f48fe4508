"""The group of commands: how errors become one message and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import click

from ...runtime.environment import DEBUG
from ...runtime.errors import TilewrightError

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

# Top-level modules of the optional dependencies, by the extra that brings them.
_EXTRAS = {
    "compile": ("torch", "onnx", "networkx", "jinja2", "safetensors", "transformers", "ziglang", "sympy", "triton"),
    "text": ("tokenizers",),
    "cuda": ("cuda",),
}
_USES = {"compile": "the compiler", "text": "a tokenizer", "cuda": "NVIDIA's driver bindings"}


class Application(click.Group):
    """A click group that lists commands in the order in which they are used and reports every error the same way."""

    def main(
        self, args: Sequence[str] | None = None, prog_name: str | None = None, *rest: Any, **extra: Any
    ) -> NoReturn:
        """Run, and exit with the code that ``runtime/errors.py`` gives the error, if there is one."""
        arguments = list(sys.argv[1:] if args is None else args) or ["--help"]
        extra["standalone_mode"] = False
        with warnings.catch_warnings():
            _choose_warnings()
            code = guarded(lambda: super(Application, self).main(arguments, prog_name or "tilewright", *rest, **extra))
        sys.exit(code)

    def list_commands(self, context: click.Context) -> list[str]:
        """As they were added, not sorted."""
        return list(self.commands)


def show_version(version: str) -> click.Option:
    """The ``--version`` option."""

    def show(context: click.Context, option: click.Parameter, value: bool) -> None:
        if value:
            click.echo(f"tilewright {version}")
            context.exit()

    return click.Option(
        ["--version"], is_flag=True, expose_value=False, is_eager=True, callback=show, help="Show the version and exit."
    )


def guarded(action: Callable[[], Any]) -> int:
    """Run a command; what it raises is reported on standard error.

    Returns:
        The exit code.
    """
    try:
        result = action()
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, click.exceptions.Abort):
        return _report("interrupted", INTERRUPTED, prefix="")
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "tilewright"
        return _report(f"{error.format_message()} (see '{command} --help')", error.exit_code)
    except click.ClickException as error:
        return _report(error.format_message(), error.exit_code)
    except TilewrightError as error:
        return _report(str(error), error.exit_code)
    except BrokenPipeError:
        _drop_output()  # the reader (head, less) has gone
        return 1
    except OSError as error:
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
        return _report(f"{error.filename or 'reading or writing failed'}: {error.strerror or error}", 1)
    except ModuleNotFoundError as error:
        return _report(_missing_module(error), 1)
    except MemoryError:
        return _report("out of memory", 1)
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        return _report(
            f"unexpected {type(error).__name__}{': ' + text if text else ''}. This is a bug in Tilewright; set "
            f"{DEBUG.name}=1 to see the traceback, and please report it",
            1,
        )


def _drop_output() -> None:
    """Let go of what cannot be written: Python flushes once more at exit, which must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report(message: str, code: int, prefix: str = "error: ") -> int:
    if _debugging() and sys.exc_info()[0] is not None:
        traceback.print_exc()
    click.echo(f"{prefix}{message}", err=True)
    return code


def _debugging() -> bool:
    return DEBUG.get() not in (None, "0", "off")


def _missing_module(error: ModuleNotFoundError) -> str:
    missing = (error.name or "").partition(".")[0]
    for extra, modules in _EXTRAS.items():
        if missing in modules:
            return (
                f"this command needs {_USES[extra]}, but {missing} is not installed; pip install 'tilewright[{extra}]'"
            )
    return f"the module {error.name} is not installed; this installation of Tilewright is incomplete, install it again"


def _choose_warnings() -> None:
    """Our own warnings as one line each; those of libraries only for who debugs."""
    if _debugging():
        return
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", category=UserWarning, module=r"tilewright(\.|$)")
    warnings.showwarning = lambda message, *_, **__: click.echo(f"warning: {message}", err=True)
