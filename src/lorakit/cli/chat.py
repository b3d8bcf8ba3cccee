"""The verb chat: a conversation in the terminal, with adapters to switch between.

Lines come from standard input, so a conversation can be piped in; lines that begin with / are
commands. An adapter answers as it was trained: after messages with the whole conversation, after
prompts with each line alone.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, cast

import torch
from transformers import TextStreamer, set_seed

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.card import TrainedUse
from lorakit.adapter.hub import local_path, short_name, short_names
from lorakit.answering.answer import generation_settings, sampling_of
from lorakit.answering.ends import ends_of_rows
from lorakit.attachment.attach import detach
from lorakit.attachment.open_model import Opened, open_model
from lorakit.bank import AdapterBank
from lorakit.cli.verbs import Result
from lorakit.config.verbs import ChatConfig
from lorakit.data.chat import with_template
from lorakit.data.encode import encode_prompt
from lorakit.data.row_types import Message, MessagesRow, PromptRow, Row
from lorakit.errors import ConfigError, LorakitError, did_you_mean
from lorakit.kernels.few_rows import few_rows
from lorakit.models.shape import context_length

HELP = """\
/adapter NAME    let this adapter answer; without a name, list them
/base            let the base answer
/load PLACE      load another adapter, a folder or OWNER/NAME, and let it answer
/system TEXT     start anew with a message of the system; without text, without one
/clear           forget the conversation
/retry           answer the last line again
/help            print this
/exit            end, as Ctrl-D does"""


def run(settings: ChatConfig) -> Result:
    """Answer lines until they end."""
    short_names(settings.adapters)
    first = settings.adapters[0] if settings.adapters else None
    opened = open_model(
        first,
        model=settings.model,
        dtype=settings.dtype,
        quantize=settings.quantize,
        device=settings.device,
        allow_other_base=settings.allow_other_base,
    )
    chat = Chat(settings, opened)
    for place in settings.adapters:
        chat.load(place)
    if first is not None:
        chat.choose(short_name(first))
    set_seed(settings.seed)
    if sys.stdin.isatty():
        _say(f"{chat.who} answers; /help lists the commands, Ctrl-D ends")
    for line in _lines():
        if line == "/exit":
            break
        try:
            chat.take(line)
        except LorakitError as error:
            _say(f"error: {error}")
    return Result(text="", data={"turns": chat.turns})


class Chat:
    """A conversation with a base and its adapters."""

    def __init__(self, settings: ChatConfig, opened: Opened) -> None:
        """Check that the model writes text, and take the adapter out that it was opened with.

        Raises:
            ConfigError: it has labels, and writes no text.
        """
        if opened.task != "generation":
            raise ConfigError(f"this adapter does {opened.task}: it has labels, and writes no text")
        self.turns: list[dict[str, Any]] = []
        """What was asked and answered, and by which adapter."""
        self._settings = settings
        self._tokenizer = with_template(opened.tokenizer, opened.base_template)
        if opened.adapter is not None:
            detach(opened.model)
        self._bank = AdapterBank(opened.model, allow_other_base=settings.allow_other_base)
        self._uses: dict[str, TrainedUse] = {}
        self._active: str | None = None
        self._messages: list[Message] = []
        self._begin(settings.system)
        self._commands: dict[str, Callable[[str], None]] = {
            "/adapter": self._adapter,
            "/base": lambda _: self._chosen(None),
            "/load": lambda place: self._chosen(self.load(place)),
            "/system": lambda text: self._begin(text or None),
            "/clear": lambda _: self._begin(self._system),
            "/retry": lambda _: self._retry(),
            "/help": lambda _: _say(HELP),
        }

    @property
    def who(self) -> str:
        """The name of what answers."""
        return self._active or "the base"

    def load(self, place: str) -> str:
        """Load an adapter under the name of its folder, or that on the hub, which is the result.

        Raises:
            LorakitError: its files or card are unusable, or do not fit the base; nothing changed.
        """
        if not place:
            raise ConfigError("/load needs a folder, or OWNER/NAME on the hub")
        name = short_name(place)
        # The bank takes an adapter with any card, so that it is read before.
        with Adapter.reading(local_path(place)) as adapter:
            use = TrainedUse.on(adapter.card)
        self._bank.load(name, place)
        self._uses[name] = use
        return name

    def choose(self, name: str | None) -> None:
        """Let an adapter answer, or the base; the conversation goes on.

        Raises:
            ConfigError: there is no such adapter.
        """
        if name is not None and name not in self._uses:
            known = ", ".join(self._uses) or "none: /load PLACE loads one"
            hint = did_you_mean(name, self._uses) or f"; those loaded are {known}"
            raise ConfigError(f"there is no adapter {name!r}{hint}")
        self._bank.switch(name)
        self._active = name

    def take(self, line: str) -> None:
        """Do what a line says, or answer it.

        Raises:
            LorakitError: it cannot be done; the conversation is as before.
        """
        if not line.startswith("/"):
            self._answer(line)
            return
        name, _, rest = line.partition(" ")
        if name not in self._commands:
            hint = did_you_mean(name, self._commands) or "; /help lists them"
            raise ConfigError(f"there is no command {name}{hint}")
        self._commands[name](rest.strip())

    def _adapter(self, name: str) -> None:
        if name:
            self._chosen(name)
            return
        names = (f"{'*' if each == self._active else ' '} {each}" for each in self._uses)
        _say("\n".join(names) or "no adapter is loaded: /load PLACE loads one")

    def _chosen(self, name: str | None) -> None:
        self.choose(name)
        use = self._uses.get(name or "", TrainedUse())
        how = "" if name is None or use.as_messages else ", each line alone"
        _say(f"{self.who} answers{how}{', as it was trained' if how and use.rows_kind else ''}")

    def _begin(self, system: str | None) -> None:
        self._system = system
        self._messages = [Message(role="system", content=system)] if system else []

    def _retry(self) -> None:
        if not self.turns:
            raise ConfigError("nothing was asked yet")
        while self._messages and self._messages[-1].role != "system":
            if self._messages.pop().role == "user":
                break
        self._answer(self.turns.pop()["prompt"])

    def _as_messages(self) -> bool:
        """Whether what answers gets the whole conversation, through the chat template."""
        if self._active is not None:
            return self._uses[self._active].as_messages
        return bool(self._tokenizer.chat_template)

    def _answer(self, line: str) -> None:
        """Answer a line, printing each word as it comes; Ctrl-C ends the answer alone."""
        asked = [*self._messages, Message(role="user", content=line)]
        row: Row = PromptRow(prompt=line, completion="")
        if self._as_messages():
            row = MessagesRow(messages=tuple(asked))
        use = self._uses[self._active] if self._active else TrainedUse()
        ids = encode_prompt(row, with_template(self._tokenizer, use.chat_template), use.data)
        try:
            text = self._stream(ids)
        except KeyboardInterrupt:
            _say("\nstopped")
            return
        self._messages = [*asked, Message(role="assistant", content=text)]
        self.turns.append({"adapter": self._active, "prompt": line, "answer": text})

    @torch.no_grad()
    def _stream(self, ids: Sequence[int]) -> str:
        model, settings = cast(Any, self._bank.model), self._settings
        tokens = torch.tensor([ids], device=model.device)
        context = context_length(model) or len(ids) + settings.max_new_tokens
        if len(ids) >= context:
            raise ConfigError(
                f"the conversation has {len(ids)} tokens, and the model's context is {context}: "
                "/clear forgets it"
            )
        ends = ends_of_rows(model, self._tokenizer, 1)[0]
        room = min(settings.max_new_tokens, context - len(ids))
        options: dict[str, Any] = {"skip_prompt": True, "skip_special_tokens": True}
        with few_rows(model, 1):
            written = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                generation_config=generation_settings(
                    self._tokenizer, ends, max_new_tokens=room, sampling=sampling_of(settings)
                ),
                streamer=TextStreamer(cast(Any, self._tokenizer), **options),
            )
        text = self._tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True)
        assert isinstance(text, str)
        return text.strip()


def _lines() -> Iterator[str]:
    """The lines that are typed or piped in, but for empty ones."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  # Gives `input` a history and keys to edit the line.
    while True:
        try:
            line = input("> ") if sys.stdin.isatty() else next(sys.stdin)
        except (EOFError, StopIteration):
            return
        if line.strip():
            yield line.strip()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
