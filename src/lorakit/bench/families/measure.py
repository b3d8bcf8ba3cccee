"""The table of models: which use of an adapter works on which family, tried one by one."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from lorakit.bench.families.recipes import FAMILIES, REAL, TriedBase, base_of, is_known
from lorakit.bench.families.uses import USES
from lorakit.bench.result import Findings, Goal
from lorakit.config.bench import ModelsConfig
from lorakit.errors import ConfigError, LorakitError, did_you_mean

MOST_REFUSED_PERCENT = 15.0
FEWEST_FAMILIES = 40
CHECKED = "yes"
"""The cell of a use that works."""


@dataclass
class _Reasons:
    """Why uses are refused, each with a number."""

    numbers: dict[str, int] = field(default_factory=dict)
    failures: int = 0

    def cell(self, base: TriedBase, use: str) -> str:
        """The cell of a use: whether it works, else the number of the reason."""
        try:
            USES[use](base)
        except LorakitError as error:
            reason = _told(error, base)
        # What fails otherwise is a mistake of lorakit's, which the table shows.
        except Exception as error:
            self.failures += 1
            reason = f"fails: {base.name}: {type(error).__name__}: {_told(error, base)}"
        else:
            return CHECKED
        return f"no ({self.numbers.setdefault(reason, len(self.numbers) + 1)})"


def measure_models(settings: ModelsConfig) -> Findings:
    """Try every use on every family, each on a base of its own.

    Raises:
        ConfigError: there is no such family.
        MissingExtraError: PEFT or bitsandbytes is not installed.
    """
    names = settings.families or FAMILIES
    unknown = [name for name in names if not is_known(name)]
    if unknown:
        known = (*FAMILIES, *REAL)
        raise ConfigError(
            f"families names {', '.join(unknown)}, for which there is no tiny model"
            f"{did_you_mean(unknown[0], known) or '.'} There are {', '.join(known)}"
        )
    reasons, slowest = _Reasons(), ("", 0.0)
    rows: list[dict[str, str]] = []
    for name in names:
        started = time.monotonic()
        base = base_of(name)
        rows.append(
            {
                "family": base.name,
                "kind": base.kind,
                **{use: reasons.cell(base, use) for use in USES},
            }
        )
        took = time.monotonic() - started
        slowest = max(slowest, (name, took), key=lambda each: each[1])
        print(f"{name}  {took:.1f} s", file=sys.stderr)
    cells = [row[use] for row in rows for use in USES]
    refused = sum(cell != CHECKED for cell in cells)
    whole = settings.families == ()
    return Findings(
        timings={},
        goals=tuple(_goals(rows, refused, len(cells), reasons.failures)) if whole else (),
        checks={"families": len(rows), "cells": len(cells), "of them refused": refused},
        tables={
            "models": rows,
            "reasons": [{"number": n, "reason": reason} for reason, n in reasons.numbers.items()],
        },
    )


def _goals(
    rows: Sequence[dict[str, str]], refused: int, cells: int, failures: int
) -> Iterator[Goal]:
    yield Goal(
        what="families",
        got=float(len(rows)),
        limit=float(FEWEST_FAMILIES),
        unit="",
        at_least=True,
    )
    yield Goal(
        what="refused cells", got=100 * refused / cells, limit=MOST_REFUSED_PERCENT, unit="%"
    )
    yield Goal.never("cells that fail", failures)


def _told(error: Exception, base: TriedBase) -> str:
    """An error's first two lines as a reason that other families may have too."""
    text = "; ".join(line.strip() for line in str(error).splitlines()[:2])
    # Where it begins the path of a layer it stays.
    family = rf"(?<![\w.-]){re.escape(base.model.config.model_type)}(?![\w-]|\.\w)"
    return re.sub(family, "the family", text).rstrip(".")
