"""One command of the program: flags to configuration, stage function, what the person sees, exit code."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel

from prune_onnx.graph_ops.files import check_output
from prune_onnx.pipeline.config import keys, parse
from prune_onnx.pipeline.results import StageResult

from .listing import Listing
from .main import ARGV, DEBUG
from .options import UNSET, Flag, flag_name, given_values, merged, schema_flags, schema_texts
from .output import Console

COMMON = "Common options"


class StageCommand(click.Command):
    """A command that runs one stage of the pipeline.

    Args:
        name: the command's name, and the name of its table in a configuration file.
        schema: the stage's configuration; its fields become flags.
        work: calls the stage function with the configuration, progress, and the values of ``extra`` by name.
        show: prints the result as tables.
        arguments: keys that may be given by position, with how they are shown: ``{"input": "IN.onnx"}``; one that is
            shown with ``...`` takes all that are left. The key ``config`` is the configuration file itself.
        sections: headings of the help page to keys, see :func:`~.options.schema_flags`.
        epilog: the end of the help page: examples.
        metavars: how values of some keys are shown.
        exclusive: keys of which one is enough, see :func:`~.options.merged`.
        listings: flags that list what exists.
        extra: flags that are no part of the configuration.
        hidden_keys: keys that are no flags.
        config_of: finds a configuration file from what was given, when ``--config`` is not.
    """

    def __init__(
        self,
        name: str,
        schema: type[BaseModel],
        work: Callable[..., StageResult],
        show: Callable[[Console, Any], None],
        *,
        arguments: Mapping[str, str],
        sections: Mapping[str, Sequence[str]],
        epilog: str,
        metavars: Mapping[str, str] | None = None,
        exclusive: Sequence[str] = (),
        listings: Sequence[Listing] = (),
        extra: Sequence[Flag] = (),
        hidden_keys: Sequence[str] = (),
        config_of: Callable[[Mapping[str, Any]], Path | None] = lambda given: None,
    ) -> None:
        self.schema, self.work, self.show = schema, work, show
        self.arguments, self.exclusive, self.listings, self.extra = arguments, exclusive, listings, extra
        self.config_of = config_of
        # A key of a section is a flag even where it can be given by position.
        flags = schema_flags(schema, sections, metavars or {}, (*_COMMON_KEYS, *arguments, *hidden_keys))
        positions = [
            click.Argument([_position(key)], required=False, metavar=m, nargs=-1 if "..." in m else 1)
            for key, m in arguments.items()
        ]
        lists = [_common(listing.flag, is_flag=True, help=listing.help) for listing in listings]
        super().__init__(
            name,
            params=[*positions, *extra, *flags, *lists, *_common_flags(schema, "config" not in arguments)],
            callback=self._run,
            help=work.__doc__,
            epilog=epilog,
            context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
        )

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what may be given by position, then the options under their sections, the common ones last."""
        texts = schema_texts(self.schema)
        given = [(metavar, texts[key]) for key, metavar in self.arguments.items() if key in texts]
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": given} if given else {}
        common: list[tuple[str, str]] = []
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                section = getattr(param, "section", COMMON)
                (common if section == COMMON else sections.setdefault(section, [])).append(record)
        for section, records in {**sections, COMMON: common}.items():
            with formatter.section(section):
                formatter.write_dl(records, col_max=34)

    def _run(self, **params: Any) -> None:
        ctx = click.get_current_context()
        line = shlex.join(["prune-onnx", *ctx.meta.get(ARGV, [])])
        console = Console(verbosity=params["verbose"] - params["quiet"], as_json=params["json"], line=line)
        for listing in self.listings:
            if params[listing.flag.lstrip("-").replace("-", "_")]:
                console.listing(listing.rows())
                return
        config = self._configure(params)
        if params["print_config"]:
            console.config(config)
            return
        # A schema without the field leaves the report to us; either way it is refused before the work is done.
        report = params["report"] if "report" not in self.schema.model_fields else None
        if report is not None:
            check_output(report, force=getattr(config, "force", False))
        result = self.work(config, console.progress, **{flag.name: params[flag.name] for flag in self.extra})
        if report is not None:
            result.write(report)
        console.result(result, self.show)
        ctx.exit(getattr(result, "exit_code", 0))

    def _configure(self, params: Mapping[str, Any]) -> BaseModel:
        """Return the configuration: flags over the file over the schema's defaults."""
        given = given_values(params, self.schema)
        config = params.get("config")
        for key, metavar in self.arguments.items():
            value = params[_position(key)]
            if value is None or value == ():
                continue
            if key in given or (key == "config" and config):
                raise click.UsageError(f"{metavar} and {flag_name(key)} say the same; give one.")
            if key == "config":
                config = value
            else:
                given[key] = value
        path = Path(config) if config else self.config_of(given)
        values, file_labels = merged(given, path, self.name, self.exclusive)
        labels = {key: flag_name(key) for key in keys(self.schema)} | self.arguments | file_labels
        return parse(self.schema, values, labels=labels)


_COMMON_KEYS = ("seed", "report", "force")


def _common_flags(schema: type[BaseModel], with_config: bool) -> list[Flag]:
    """Return the flags that every command has."""
    own = [key for key in _COMMON_KEYS if key in schema.model_fields]
    flags = schema_flags(schema, {COMMON: own}, {"report": "FILE.json"}, keys(schema))
    if "report" not in own:
        text = "Where the JSON report is written."
        flags.append(_common("--report", type=click.Path(), metavar="FILE.json", help=f"{text}  [default: {UNSET}]"))
    if with_config:
        text = "Options as TOML, in a table of the command's name or at the top; flags overrule them."
        flags.append(_common("--config", type=click.Path(), metavar="FILE.toml", help=text))
    return [
        *flags,
        _common("--print-config", is_flag=True, help="Print all options with their values as TOML, and stop."),
        _common("--json", is_flag=True, help="Print the result as one JSON object, and nothing else, on stdout."),
        _common("-v", "--verbose", count=True, help="Show more: every group and why it is pinned, the environment."),
        _common("-q", "--quiet", count=True, help="Show the result and warnings only."),
        _common("--debug", is_flag=True, expose_value=False, callback=_keep_debug, help="Show tracebacks."),
    ]


def _common(*names: str, **options: Any) -> Flag:
    return Flag(names, section=COMMON, **options)


def _keep_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    ctx.meta[DEBUG] = value


def _position(key: str) -> str:
    return f"{key}_argument"
