"""Settings of serve."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from lorakit.config.base import Device, DType, HeldIn, Names, PositiveInt, Settings


class ServeConfig(Settings):
    """Settings of serve: the base, its adapters, who may ask, and how much is done at once."""

    positional: ClassVar[tuple[str, ...]] = ("adapters",)

    adapters: Path | None = None
    """Folder of adapters, each in a folder of its own that names it, or one adapter's folder. They
    are loaded at the start, and requests may load others from there, from nowhere else."""

    resolve: bool = False
    """Load an adapter when it is first asked for, by the name of its folder in `adapters`, in place
    of all at the start. One that was unloaded stays so until a request loads it."""

    hub: str | None = None
    """Namespace of the hub: an adapter that is asked for and is not in `adapters` is fetched from
    NAMESPACE/NAME. None: nothing is fetched."""

    model: str | None = None
    """Base model. None: the one that the adapter in `adapters` was trained on, if it is one."""

    name: str | None = None
    """What requests call the base. None: as `model` does."""

    dtype: DType = "float32"
    """Precision of the base."""

    adapter_dtype: DType | None = None
    """Precision of A and B in the batch. None: the base's."""

    quantize: HeldIn = "none"
    """How the base's linear layers are held: none (in `dtype`), 4bit or 8bit; as-trained (as in the
    training of the one adapter in `adapters`)."""

    device: Device = "auto"
    """What the model computes on: cpu, cuda, or auto (a GPU where torch sees one, else the CPU)."""

    allow_other_base: bool = False
    """Accept adapters that were trained on a base with other weights."""

    host: str = "127.0.0.1"
    """Address to listen on. Any but this machine's own needs api_key_file."""

    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0: any that is free."""

    api_key_file: Path | None = None
    """File of keys, one a line: a request needs one in its header, Authorization: Bearer KEY. After
    a key may stand adapters=NAME,NAME (which it may ask, beside the base), load=no, and requests=N
    (a minute). None: whoever can reach the server may ask, and load adapters."""

    lenient: bool = False
    """Ignore fields of requests that the server does not know, in place of refusing them."""

    most_bytes: PositiveInt = 8_000_000
    """Largest body of a request."""

    slots: PositiveInt = 16
    """Requests that are answered at once."""

    slot_rank: PositiveInt = 64
    """Largest rank that each of these has room for, as far as an adapter needed it: one of rank 256
    would make all 16 as wide. Adapters with more are computed one by one, without compiled steps.
    """

    compile: Literal["auto", "off", "wait"] = "off"
    """Compile the decode step: auto (answer at once, with compiled steps as they get ready), wait
    (answer when the first ones are), or off."""

    batch_invariant: bool = False
    """Give each answer the same bits whatever else is answered beside it or was before: else its
    rounding depends on that, and in half precision one drawn answer in seven is another. Long
    prompts take longer. The server refuses to start where the processor does not allow it."""

    max_length: PositiveInt | None = None
    """Longest prompt and answer together, in tokens. None: the model's context."""

    prefill_tokens: PositiveInt = 512
    """Tokens of prompts that are read at most between two tokens of the answers, several prompts in
    one pass: more read waiting prompts faster, and let answers pause longer. While others are
    answered, one prompt alone gets no more of them than take about as long as two tokens."""

    prefix_bytes: Annotated[int, Field(ge=0)] = 256_000_000
    """Memory of keys and values of prompts that were read: one that begins alike and asks the same
    weights goes on from there. 0: none are kept."""

    waiting_requests: PositiveInt = 256
    """Requests that may wait for a slot; beyond them the server answers 429."""

    waiting_tokens: PositiveInt = 1_000_000
    """Tokens that these may have, prompts and answers together."""

    budget_bytes: PositiveInt | None = None
    """Memory of adapters: beyond it, those that were not used for the longest time are read again
    from their folders when they are asked for. None: no limit."""

    upstream: Names = ()
    """URLs of servers of lorakit or vLLM that answer in place of this one, which has no model then:
    it checks keys and adapters, has these loaded there, and gives each request to one that holds
    its adapter. They read copies of adapters in `adapters`/.copies, under the same path."""

    upstream_key_file: Path | None = None
    """File of the keys that these servers ask for: a line has a key for all, or URL KEY."""

    upstream_holders: PositiveInt | None = None
    """How many of them hold each adapter. None: all."""

    @field_validator("upstream")
    @classmethod
    def _check_urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [url for url in value if not url.startswith(("http://", "https://"))]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: a URL begins with http:// or https://")
        if len(set(value)) < len(value):
            raise ValueError("names one server twice")
        return value

    @model_validator(mode="after")
    def _check_upstream(self) -> "ServeConfig":
        given = self.model_fields_set
        if self.upstream and given & OF_THE_MODEL:
            raise ValueError(
                f"{', '.join(sorted(given & OF_THE_MODEL))}: of a model, which the upstream "
                "servers have: give it there"
            )
        if self.upstream and self.hub is not None and self.adapters is None:
            raise ValueError("upstream and hub need adapters, a folder that the servers see too")
        if not self.upstream and given & OF_UPSTREAM:
            raise ValueError(f"{', '.join(sorted(given & OF_UPSTREAM))}: of upstream; give it too")
        if self.batch_invariant and self.compile != "off":
            raise ValueError(
                "batch_invariant and compile: compiled steps add up in another order than the "
                "model's own; leave one of them off"
            )
        return self


OF_THE_MODEL = {
    "model",
    "dtype",
    "adapter_dtype",
    "quantize",
    "device",
    "allow_other_base",
    "slots",
    "slot_rank",
    "batch_invariant",
    "compile",
    "max_length",
    "prefill_tokens",
    "prefix_bytes",
    "waiting_requests",
    "waiting_tokens",
    "budget_bytes",
}
"""The settings of serve that mean nothing where other servers answer."""
OF_UPSTREAM = {"upstream_key_file", "upstream_holders"}
