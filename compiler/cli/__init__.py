"""The command line, ``tilewright COMMAND``: one file per command.

Command files import only click and what is as light; numpy, rich, the runtime and the compiler are imported when a
command runs. ``run``, ``generate``, ``bench``, ``inspect``, ``tune`` and ``doctor`` work without PyTorch.
"""

from __future__ import annotations

from ... import __version__
from .application import Application, show_version
from .bench import bench
from .compile import compile_source
from .demo import demo
from .doctor import doctor
from .generate import generate
from .inspect import inspect
from .run import run
from .tune import tune
from .verify import verify

HELP = """Compile trained models ahead of time, and run them without PyTorch.

\b
A first tour:
  tilewright demo                                  compile a sentence encoder and use it
  tilewright compile resnet50 -o resnet50.tw       a model of the registry
  tilewright compile path/to/checkpoint -o out.tw  a Hugging Face folder
  tilewright run out.tw inputs.npz -o outputs.npz  run it
  tilewright generate llm.tw --prompt "Once"       text from a language model
  tilewright bench out.tw                          how fast, and which kernels take the time
  tilewright inspect out.tw                        what is inside

Results go to standard output, progress and messages to standard error. With --json, standard output holds one JSON
document and nothing else.

\b
Exit codes: 0 done, 1 failure, 2 wrong usage or no model, 3 operators that are not supported,
4 results beyond tolerance, 5 damaged artifact or weights, 130 interrupted.
"""

cli = Application("tilewright", help=HELP, params=[show_version(__version__)])
for command in (compile_source, run, generate, bench, inspect, verify, tune, doctor, demo):
    cli.add_command(command)


def main() -> None:
    """Run the command line on the process's arguments and exit."""
    cli.main()
