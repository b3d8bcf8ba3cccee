"""The page docs/cli.md, made from the help: `python -m lorakit.cli.reference > docs/cli.md`."""

from lorakit.cli.overview import overview
from lorakit.cli.parsing.help import ALL, verb_help
from lorakit.cli.verbs import VERBS, settings_of

INTRODUCTION = """\
# The command line

Made from `--help` by `make docs`.

A verb's settings come from a YAML file and from flags; a flag overrides the file. The flag
`--lora.rank 4` is the line `rank: 4` in the file's section `lora:`. Booleans are `--overwrite` and
`--no-overwrite`, lists are `q,v`, mappings are `'{k: 4}'`, and `none` empties a setting that may be
empty. A value that starts with two dashes is written `--name=--value`. An unknown name is an error,
as is a wrong value; all of them are reported at once.

Results are on stdout, progress and messages on stderr. With `--json` stdout has one JSON object:
the result, or `{"error": {"type": …, "message": …}}`.

| exit code | meaning |
|---|---|
| 0 | success |
| 2 | a mistake you can mend, told in one message |
| 130 | stopped with Ctrl-C |
| 1 | a defect of lorakit; the trace says where |
"""


def reference() -> str:
    """The text of docs/cli.md: every verb and every setting."""
    helps = {"lorakit": overview()} | {
        f"lorakit {name}": verb_help(name, settings_of(name), ALL) for name in VERBS
    }
    sections = (f"## {title}\n\n```text\n{text}```\n" for title, text in helps.items())
    return "\n".join([INTRODUCTION, *sections])


if __name__ == "__main__":
    print(reference(), end="")
