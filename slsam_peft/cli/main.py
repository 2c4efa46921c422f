"""The `slsam-peft` command picks a subcommand, and turns errors into messages and exit codes."""

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

from slsam_peft import __version__
from slsam_peft.cli.parsing import Parser, nearest
from slsam_peft.cli.quiet import silence_kernels
from slsam_peft.errors import DivergedError, Interrupted, UserError

PROG = "slsam-peft"

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # these are no bug of ours: the disk is full or may not be written

# One module per subcommand, imported only when it is needed: none of them imports torch at its top, so that help is
# instant. A module has NAME and HELP, and either `add_arguments(parser)` and `run(args)` or, where another parser
# reads the arguments, RAW_ARGV = True and `run_raw(argv)`. Both run functions return the exit code.
GROUPS = {
    "before training": ("plan", "bench"),
    "training": ("quickstart", "sft"),
    "after training": ("plot", "inspect", "check", "chat", "export", "sharpness"),
    "research": ("compare",),
}
SUBCOMMANDS = tuple(name for names in GROUPS.values() for name in names)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv (`Sequence[str]`, *optional*): Arguments without the program's name; `sys.argv[1:]` where it is missing.

    Returns:
        `int`: Exit code: 0 done, 1 training has diverged or `check` has found a problem, 2 what was asked for cannot
            be done (message on stderr), 130 interrupted (Ctrl-C, SIGINT), 143 terminated (SIGTERM).
    """
    typed = list(sys.argv[1:] if argv is None else argv)
    position = next((i for i, argument in enumerate(typed) if not argument.startswith("-")), len(typed))
    debug = "--debug" in typed
    # OpenMP's threads spin while they wait and starve each other where cores are shared with other work: measured 5 to
    # 7 times slower steps on two busy cores, for 4 % of CPU time saved. Read when torch is imported, hence here.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not debug:
        silence_kernels()
    try:
        with _terminable():
            return _dispatch(typed[:position], typed[position:])
    except UserError as error:
        if debug:
            raise
        _say(f"{PROG}: {error}")
        return 2
    except DivergedError as error:
        if debug:
            raise
        _say(f"{PROG}: training has diverged: {error}")
        return 1
    except OSError as error:
        if debug or error.errno not in _DISK:
            raise
        _say(
            f"{PROG}: {error.filename or 'a file'} cannot be written: {error.strerror}. Free some space and run again."
        )
        return 2
    except KeyboardInterrupt as stop:
        if debug:
            raise
        _say(f"{PROG}: {str(stop) or 'interrupted.'}")
        return 128 + (stop.signal if isinstance(stop, Interrupted) else signal.SIGINT)
    except SystemExit as leaving:  # argparse leaves this way after --help and --version
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind as Ctrl-C does, so that what is open is closed and what is half made is removed."""

    def terminate(number: int, frame: object) -> None:
        raise Interrupted(number, "terminated.")

    if threading.current_thread() is not threading.main_thread():  # Python allows no handler there
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _dispatch(own: list[str], rest: list[str]) -> int:
    parser = _top_parser()
    parser.read(own)
    if not rest:
        parser.print_help()
        return 2
    name, arguments = rest[0], rest[1:]
    if name not in SUBCOMMANDS:
        raise UserError(
            f"there is no subcommand {name!r}.{nearest(name, SUBCOMMANDS)}\nThere are: {', '.join(SUBCOMMANDS)}. "
            f"See `{PROG} --help`."
        )
    command = _load(name)
    if getattr(command, "RAW_ARGV", False):
        return command.run_raw(arguments)
    parser = Parser(f"{PROG} {name}", command.HELP)
    command.add_arguments(parser)
    _add_debug(parser)
    return command.run(parser.read(arguments))


def _top_parser() -> Parser:
    parser = Parser(PROG, "Sparse-layer sharpness-aware minimisation (SL-SAM) for LoRA and QLoRA.")
    parser.usage = f"{PROG} [--help] [--version] [--debug] <subcommand> ..."
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    _add_debug(parser)
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            # Shown in the help only: `_dispatch` has taken the subcommand off before this parser reads.
            group.add_argument(name, nargs="?", help=_load(name).HELP)
    parser.epilog = (
        f"`{PROG} <subcommand> --help` lists what a subcommand takes. New here? Begin with `{PROG} quickstart`."
    )
    return parser


def _add_debug(parser: Parser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _load(name: str) -> ModuleType:
    return import_module(f"slsam_peft.cli.{name}")


def _say(message: str) -> None:
    from rich.console import Console

    Console(stderr=True, soft_wrap=True, markup=False, highlight=False).print(message)


if __name__ == "__main__":
    sys.exit(main())
