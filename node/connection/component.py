"""A Fed-BioMed component as its files describe it, read without Fed-BioMed, which would write into its folder."""

from __future__ import annotations

import configparser
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import UsageError

NODE, RESEARCHER = "NODE", "RESEARCHER"
CONFIG = Path("etc", "config.ini")
APPROVAL, DEFAULT_PLANS = "security.training_plan_approval", "security.allow_default_training_plans"  # options
ADDRESS_KEYS = {NODE: ("researcher", "ip"), RESEARCHER: ("server", "host")}
COMMANDS = {NODE: "fedfactory site check", RESEARCHER: "fedfactory check"}


@dataclass(frozen=True, kw_only=True)
class Component:
    """A node or a researcher.

    Attributes:
        root: its folder.
        kind: NODE or RESEARCHER.
        host: of the researcher's server.
        port: of the researcher's server.
        certificate: PEM file.
        key: PEM file.
        database: JSON file; it exists as soon as something was registered.
        name: for people; empty for a researcher.
        options: section and key, as "security.training_plan_approval", to the value in force.
    """

    root: Path
    kind: str
    host: str
    port: int
    certificate: Path
    key: Path
    database: Path
    name: str = ""
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def config(self) -> Path:
        """The file with its settings."""
        return self.root / CONFIG

    def is_on(self, option: str) -> bool:
        """Whether an option such as "security.training_plan_approval" is on, as Fed-BioMed reads it."""
        return self.options.get(option, "False").lower() in ("true", "1")

    def records(self, table: str) -> list[dict[str, object]]:
        """The rows of a table of its database; none if there is no database yet.

        Raises: OSError if the file cannot be read, ValueError if it is damaged.
        """
        if not self.database.is_file():
            return []
        content = json.loads(self.database.read_text(encoding="utf-8") or "{}")
        rows = content.get(table, {}) if isinstance(content, dict) else None
        if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
            raise ValueError(f"{table} is no table")
        return list(rows.values())


def require_component(root: str | Path, kind: str) -> Path:
    """The folder of a component as an absolute path. Raises: UsageError if there is none of any kind."""
    root, wanted = Path(root).resolve(), kind.lower()
    if not (root / CONFIG).is_file():
        raise UsageError(
            f"{root}: no Fed-BioMed {wanted} here; make one with `fedbiomed component create -c {wanted} -p {root}`"
        )
    return root


def read_component(root: str | Path, kind: str, environment: Mapping[str, str] | None = None) -> Component:
    """Read a component's configuration, with the environment variables that override it, as Fed-BioMed does.

    Args:
        root: folder of the component.
        kind: NODE or RESEARCHER.
        environment: of the process that runs the component; None: of this process.

    Raises: UsageError if there is none, if it is of the other kind, or if its configuration cannot be used.
    """
    root, environment = require_component(root, kind), os.environ if environment is None else environment
    file, wanted = root / CONFIG, kind.lower()
    settings = configparser.ConfigParser(interpolation=None)
    try:
        settings.read_string(file.read_text(encoding="utf-8"))
        options = {f"{part}.{key}": value for part in settings.sections() for key, value in settings[part].items()}
        options |= {
            name: environment[variable]
            for name in options
            if (variable := f"FBM_{name.replace('.', '_').upper()}") in environment
        }
        found = options["default.component"].upper()
        if found != kind:
            advice = f"use `{COMMANDS[found]} {root}`" if found in COMMANDS else f"choose the folder of a {wanted}"
            raise UsageError(f"{root}: this is a Fed-BioMed {found.lower()}, no {wanted}; {advice}")
        part, host = ADDRESS_KEYS[kind]
        return Component(
            root=root,
            kind=kind,
            host=options[f"{part}.{host}"].strip(),
            port=_port(options[f"{part}.port"], file),
            certificate=file.parent / options["certificate.public_key"],
            key=file.parent / options["certificate.private_key"],
            database=file.parent / options["default.db"],
            name=options.get("default.name", ""),
            options=options,
        )
    except (OSError, UnicodeError, configparser.Error) as error:
        raise UsageError(f"{file}: not readable ({str(error).splitlines()[0]}); put it back from a backup") from None
    except KeyError as error:
        raise UsageError(f"{file}: it has no {error.args[0]}; put the file back from a backup") from None


def _port(text: str, file: Path) -> int:
    if text.strip().isdecimal() and 1 <= int(text) <= 65535:
        return int(text)
    raise UsageError(f"{file}: port is '{text}'; it must be a whole number from 1 to 65535")
