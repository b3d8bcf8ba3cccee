"""Many adapters on one base: load, evict, reload, route rows to them, switch, merge."""

from lorakit.bank.bank import AdapterBank as AdapterBank
from lorakit.bank.entries import Held as Held
