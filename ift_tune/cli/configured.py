"""``--config FILE`` and ``--dump-config`` of every command that has settings."""

from __future__ import annotations

import logging
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.main
from typer.core import TyperCommand

from ift_tune.base.command import carrying_out
from ift_tune.base.errors import UsageError, nearest
from ift_tune.cli.settings import Setting

_log = logging.getLogger(__name__)

_GIVEN = ("COMMANDLINE", "ENVIRONMENT")  # what stands instead of a file's values
_OF_THE_CALL = {"out", "resume", "trust", "quiet", "json"}  # not of the run that it makes


class ConfiguredCommand(TyperCommand):
    """A command that takes its flags from a file as well, and shows what they come to."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params = [*self.params, *_own_options()]

    @property
    def settings(self) -> list[Setting]:
        """What a file may set, in the order of the help."""
        hints = typing.get_type_hints(self.callback)
        return [
            Setting.of(param, hints[param.name]) for param in self.params if param.name in hints
        ]

    def make_parser(self, ctx: Any) -> Any:
        """Let every flag that a file can set be taken back: ``--no-quiet``, ``--baseline``.

        They are no options of their own, which the help would list beside each.
        """
        parser = super().make_parser(ctx)
        for param in self.params:
            own: Any = param
            is_flag = getattr(own, "is_bool_flag", False) and own.name != "help"
            if is_flag and not own.secondary_opts:
                opposite = [_opposite(flag) for flag in own.opts if flag.startswith("--")]
                parser.add_option(
                    obj=own, opts=opposite, dest=own.name, action="store_const", const=False
                )
        return parser

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words of a command line, and the file that they name."""
        _require_one_file(args)
        rest = super().parse_args(ctx, _with_place(args))
        if ctx.resilient_parsing:  # completion
            return rest
        from_file = ctx.default_map or {}
        for setting in self.settings:
            source = ctx.get_parameter_source(setting.name).name
            if setting.name not in from_file:
                continue
            written = from_file[setting.name]
            if source in _GIVEN:
                if setting.is_mapping:  # key by key
                    ctx.params[setting.name] = _merged(written, ctx.params[setting.name])
                continue
            setting.refuse_hidden(written, ctx.meta[CONFIG])
            if setting.key == "storage" and ctx.meta[OF_A_RUN]:
                ctx.params[setting.name] = _storage_of_a_run(written, ctx.params)
        if (place := ctx.meta.get(DUMP_CONFIG)) is not None:
            from ift_tune.cli.dump import dump

            dump(self.name or "", self.settings, ctx.params, place)
            raise typer.Exit
        return rest

    def invoke(self, ctx: Any) -> Any:
        """Carry the command out; the run that it makes notes what was given to it."""
        given = {
            setting.key: setting.plain(ctx.params[setting.name])
            for setting in self.settings
            if ctx.get_parameter_source(setting.name).name != "DEFAULT"
            and setting.key not in _OF_THE_CALL
            and ctx.params[setting.name] is not None
        }
        with carrying_out(self.name or "", given):
            return super().invoke(ctx)


CONFIG = f"{__name__}.config"
OF_A_RUN = f"{__name__}.of_a_run"
DUMP_CONFIG = f"{__name__}.dump_config"


def _take(ctx: typer.Context, path: Path | None) -> None:
    """Let the values of a file stand where the command line has none."""
    if path is None or ctx.resilient_parsing:
        return
    from ift_tune.cli.config_files import read_config

    command: Any = ctx.command
    by_key = {setting.key: setting for setting in command.settings}
    found: dict[str, Any] = {}
    content, ctx.meta[OF_A_RUN] = read_config(path, command.name)
    for key, written in content.items():
        setting = by_key.get(key.replace("_", "-"))
        if setting is None:
            raise UsageError(
                f"{command.name} has no {key!r} that {path} could set{nearest(key, by_key)}"
            )
        if setting.name in found:
            raise UsageError(f"{path} has {setting.key} twice: keep one, got {key!r} as well")
        if written is not None:  # as if it were not there
            found[setting.name] = setting.value_of(written, path)
    ctx.default_map = found
    ctx.meta[CONFIG] = path


def _show(ctx: typer.Context, place: str | None) -> None:
    if place is not None:
        ctx.meta[DUMP_CONFIG] = place


def _options(
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            is_eager=True,
            expose_value=False,
            callback=_take,
            help="take flags from FILE.yaml, .json or .toml, or a run's run.json; those given here "
            "stand instead",
        ),
    ] = None,
    dump_config: Annotated[
        str | None,
        typer.Option(
            metavar="[FILE.yaml]",
            expose_value=False,
            callback=_show,
            help="print all settings as they would be used, or write them there; run nothing",
        ),
    ] = None,
) -> None:
    """Options that each such command has."""


def _own_options() -> Sequence[Any]:
    app = typer.Typer(add_completion=False)
    app.command()(_options)
    return typer.main.get_command(app).params


def _opposite(flag: str) -> str:
    name = flag.removeprefix("--")
    return f"--{name[3:]}" if name.startswith("no-") else f"--no-{name}"


def _require_one_file(args: Sequence[str]) -> None:
    """Raise a `UsageError` if several files are named, of which click would take the last."""
    own = args[: args.index("--")] if "--" in args else args
    named = [word for word in own if word.partition("=")[0] == "--config"]
    if len(named) > 1:
        raise UsageError(
            f"--config takes one file: put the settings of all into it, got {len(named)} files"
        )


def _with_place(args: Sequence[str]) -> list[str]:
    """Return the words with a place after each ``--dump-config``, which may stand without one."""
    words: list[str] = []
    for number, word in enumerate(args):
        if word == "--":
            return [*words, *args[number:]]
        after = args[number + 1] if number + 1 < len(args) else ""
        bare = word == "--dump-config" and not after.endswith((".yaml", ".yml", ".json", ".toml"))
        words.append(f"{word}=-" if bare else word)
    return words


def _merged(from_file: Sequence[str], given: Sequence[str]) -> list[str]:
    """Return pairs of a file with those given, which stand instead of others of their keys."""
    keys = {text.partition("=")[0] for text in given}
    return [*(text for text in from_file if text.partition("=")[0] not in keys), *given]


def _storage_of_a_run(url: str, values: Mapping[str, Any]) -> str | None:
    """Return where the study of a run lies that is given back: its own, if it goes on."""
    if values.get("resume"):
        return url
    _log.warning(
        "the study of the run is in %s and stays as it is: this one is kept in --out, or where "
        "--storage says; with the same --storage it joins that study",
        url,
    )
    return None
